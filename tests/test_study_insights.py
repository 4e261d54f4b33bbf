"""Sentences from made-up numbers: what is said, and what must not be said."""

import math
from dataclasses import replace

import pytest

from qatfast.study import Settings, Study, find_insights
from qatfast.study.data import digits_samples
from qatfast.study.experiments import ModelFile, Run
from qatfast.study.insights import time_insights
from qatfast.study.noise import Spread, compare
from qatfast.study.tables import accuracy_table
from qatfast.study.timing import StepTime

SEEDS = range(42, 47)
WOBBLE = (0.002, -0.001, 0.0, 0.001, -0.002)


def made_up(accuracies, *, seeds=5, bits=(4,), train=1437, test=360, batches=None):
    """A study in which each (model, bits) has the given mean accuracy, a little different for each seed."""
    study = Study(Settings(bits=bits, seeds=seeds), digits_samples(), train_samples=train, test_samples=test)
    for number, (key, accuracy) in enumerate(accuracies.items()):
        for index in range(seeds):
            value = accuracy + WOBBLE[(index + number) % 5]
            one, many = (batches or {}).get(key, (value, value))
            study.runs.append(Run(42 + index, *key, 0.1, value, one, many))
    return study


def texts(study, kind):
    return [insight.text for insight in find_insights(study) if insight.kind == kind]


def test_a_clear_drop_a_clear_gain_and_the_share_won_back():
    study = made_up({("fp32", 32): 0.95, ("ptq", 4): 0.75, ("qat_finetuned", 4): 0.90})
    (drop,), (gain,), (back,) = (texts(study, kind) for kind in ("ptq_drop", "qat_advantage", "recovery"))
    assert "loses 20.0" in drop and "points against FP32" in drop
    assert "15.0" in gain and "better than PTQ" in gain
    assert "wins back 75%" in back


def test_differences_within_noise_are_called_noise():
    study = made_up({("fp32", 32): 0.950, ("ptq", 4): 0.949, ("qat_finetuned", 4): 0.951})
    for kind in ("ptq_drop", "qat_advantage"):
        (insight,) = [found for found in find_insights(study) if found.kind == kind]
        assert not insight.clear and "within noise" in insight.text
        assert not any(word in insight.text for word in ("loses", "gains", "better", "worse"))
    assert texts(study, "recovery") == []
    assert "No clear loss" in texts(study, "threshold")[0]


def test_no_recovery_of_a_drop_within_noise_even_if_qat_gains_clearly():
    study = made_up({("fp32", 32): 0.900, ("ptq", 4): 0.899, ("qat_finetuned", 4): 0.95})
    assert "better than PTQ" in texts(study, "qat_advantage")[0]
    assert texts(study, "recovery") == []


def test_worse_is_called_worse():
    study = made_up({("fp32", 32): 0.95, ("ptq", 4): 0.85, ("qat_finetuned", 4): 0.45})
    assert "points worse than PTQ" in texts(study, "qat_advantage")[0]
    assert texts(study, "recovery") == []
    better = made_up({("fp32", 32): 0.90, ("ptq", 4): 0.97})
    assert "gains 7.0" in texts(better, "ptq_drop")[0]
    assert "No clear loss" in texts(better, "threshold")[0]


def test_more_than_all_is_not_a_percentage():
    study = made_up({("fp32", 32): 0.90, ("ptq", 4): 0.80, ("qat_finetuned", 4): 0.95})
    assert "wins back all" in texts(study, "recovery")[0]


def test_threshold_names_the_highest_number_of_bits_that_loses():
    study = made_up(
        {("fp32", 32): 0.95, ("ptq", 8): 0.95, ("ptq", 4): 0.9, ("ptq", 2): 0.5, ("qat_finetuned", 8): 0.95},
        bits=(8, 4, 2),
    )
    (text,) = texts(study, "threshold")
    assert "PTQ, weights + activations: 4" in text and "tried: QAT, fine-tuned." in text


def test_the_sentences_and_the_table_round_alike():
    for hits in (
        (309, 294),
        (307, 296),
        (300, 303),
        (311, 292),
    ):  # of 360: in the middle between 83.7 and 83.8
        study = made_up({("fp32", 32): 0.8}, seeds=2)
        study.runs[:] = [replace(run, accuracy=hit / 360) for run, hit in zip(study.runs, hits, strict=True)]
        (row,) = accuracy_table(study).rows
        assert f"classifies {row[1].split()[0]}% of" in texts(study, "baseline")[0]


def test_a_difference_of_nothing_has_no_minus():
    study = made_up({("fp32", 32): 0.95, ("ptq", 4): 0.95})
    study.runs[:] = [replace(run, accuracy=0.95) for run in study.runs]
    assert "(+0.0 ±" in texts(study, "ptq_drop")[0]


@pytest.mark.parametrize("epochs, said", [(1, "1 more epoch,"), (3, "3 more epochs,")])
def test_epochs_are_counted_in_words_that_fit(epochs, said):
    study = made_up({("fp32", 32): 0.95, ("fp32_longer", 32): 0.95})
    study.settings = replace(study.settings, epochs=epochs)
    assert said in texts(study, "longer")[0]


def test_the_batch_and_the_scores():
    accuracies = {("fp32", 32): 0.95, ("qat_finetuned", 2): 0.5, ("qat_finetuned_float_scores", 2): 0.9}
    study = made_up(accuracies, bits=(2,), batches={("qat_finetuned", 2): (0.8, 0.4)})
    assert (
        "40.0" in texts(study, "batch")[0]
        and "better at batch 1 than at batch 256" in texts(study, "batch")[0]
    )
    assert "gains 40.0" in texts(study, "scores")[0]
    assert "4 levels cannot tell the scores of 10 classes apart" in texts(study, "scores")[0]
    assert texts(made_up(accuracies | {("qat_finetuned", 2): 0.9}, bits=(2,)), "scores") == []
    assert texts(made_up(accuracies, bits=(2,)), "batch") == []


def test_sizes_are_compared_by_their_bytes():
    study = made_up({("fp32", 32): 0.95})
    study.sizes = [ModelFile("fp32", 32, 4000, "a"), ModelFile("ptq", 4, 1000, "b")]
    assert texts(study, "size") == [
        "4 bits: the model file has 1,000 bytes, 4.0 times smaller than the FP32 file of 4,000 bytes."
    ]


def test_one_seed_says_so_and_nothing_at_all_says_nothing():
    study = made_up({("fp32", 32): 0.95, ("ptq", 4): 0.94}, seeds=1)
    assert "one seed" in texts(study, "baseline")[0]
    assert "within noise" in texts(study, "ptq_drop")[0]
    assert find_insights(Study(Settings(), digits_samples())) == []


def test_baseline_counts_seeds_and_samples():
    (text,) = texts(made_up({("fp32", 32): 0.95}), "baseline")
    assert "95.0%" in text and "5 seeds" in text and "0.28 points" in text


def by_seed(*values):
    return dict(zip(SEEDS, values, strict=False))


def test_interval_is_the_corrected_t_interval():
    first, second = by_seed(0.90, 0.92, 0.94, 0.91, 0.93), by_seed(0.85, 0.86, 0.90, 0.85, 0.84)
    differences = [0.05, 0.06, 0.04, 0.06, 0.09]
    mean = sum(differences) / 5
    std = math.sqrt(sum((value - mean) ** 2 for value in differences) / 4)
    found = compare(first, second, train=400, test=100)
    assert found.mean == pytest.approx(mean)
    assert found.margin == pytest.approx(2.776445 * std * math.sqrt(1 / 5 + 0.25), rel=1e-5)  # t(0.975, 4)
    assert found.seeds == 5 and found.clear


def test_equal_differences_are_not_certainty():
    found = compare(by_seed(0.92, 0.92), by_seed(0.91, 0.91), train=400, test=100)
    assert found.margin > 0.1 and not found.clear
    nothing = compare(by_seed(0.9, 0.9, 0.9, 0.9, 0.9), by_seed(0.9, 0.9, 0.9, 0.9, 0.9), train=400, test=100)
    assert nothing.mean == 0 and not nothing.clear


def test_one_seed_has_the_chance_of_the_test_samples():
    found = compare({42: 0.9}, {42: 0.8}, train=400, test=100)
    assert found.margin == pytest.approx(1.959964 * math.sqrt(0.09 / 100 + 0.16 / 100), rel=1e-5)
    assert found.clear
    assert not compare({42: 0.9}, {42: 0.85}, train=400, test=100).clear


def test_a_single_test_sample_is_never_a_finding():
    assert not compare({42: 1.0}, {42: 0.99}, train=400, test=100).clear


def test_only_seeds_that_both_have_are_compared():
    found = compare({1: 0.9, 2: 0.8, 3: 0.1}, {1: 0.7, 2: 0.6}, train=400, test=100)
    assert found.seeds == 2 and found.mean == pytest.approx(0.2)
    assert compare({1: 0.9}, {2: 0.9}, train=400, test=100) is None


def test_spread():
    assert Spread.of([0.5]) == Spread(0.5, None, (0.5,))
    assert Spread.of([1.0, 3.0]).std == pytest.approx(math.sqrt(2))


def step(model, quartiles, ratio):
    return StepTime("net", model, 0.001 * ratio, ratio, quartiles)


def test_times_that_scatter_around_one_are_no_difference():
    fp32 = step("fp32", (1.0, 1.0), 1.0)
    (text,) = time_insights([fp32, step("tutorial", (1.9, 2.2), 2.0), step("qatfast", (0.97, 1.1), 1.08)])
    ours, tutorial = text.split(";")
    assert "1.08 times" in ours and "not clearly different" in ours
    assert "2.00 times" in tutorial and "not clearly different" not in tutorial
    (text,) = time_insights([fp32, step("tutorial", (1.9, 2.2), 2.0), step("qatfast", (0.8, 0.9), 0.85)])
    assert "0.85 times an FP32 step" in text and "not clearly" not in text
