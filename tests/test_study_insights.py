"""The sentences about synthetic results: what they must and must not say."""

import math
from dataclasses import replace

import pytest

from qatfast.study import Settings, Study, find_insights
from qatfast.study.data import digits_samples
from qatfast.study.experiments import ModelFile, Run
from qatfast.study.insights import Spread, best, compare, definition, time_insights
from qatfast.study.results import accuracy_table, difference_table
from qatfast.study.timing import StepTime

SEEDS = range(42, 47)
WOBBLE = (0.002, -0.001, 0.0, 0.001, -0.002)


def made_up(accuracies, *, seeds=5, bits=(4,), train=1437, test=360, batch_1=None):
    """Returns a study with these mean accuracies per (model, bits); seeds differ slightly."""
    study = Study(
        Settings(bits=bits, seeds=seeds, every_model=True),
        digits_samples(),
        train_samples=train,
        test_samples=test,
    )
    for number, (key, accuracy) in enumerate(accuracies.items()):
        for index in range(seeds):
            value = accuracy + WOBBLE[(index + number) % 5]
            study.runs.append(Run(42 + index, *key, 0.1, value, (batch_1 or {}).get(key)))
    return study


def texts(study, kind):
    return [insight.text for insight in find_insights(study) if insight.kind == kind]


def compared(fp32, ptq, qat, **options):
    return made_up({("fp32_longer", 32): fp32, ("ptq_mse", 4): ptq, ("qat_learned", 4): qat}, **options)


@pytest.mark.parametrize(
    "ptq, qat, headline, verdict",
    [
        (
            0.95,
            0.95,
            "Lowest bits without a loss: 4. PTQ is enough there.",
            "4 bits: PTQ is enough. PTQ has no loss",
        ),
        (
            0.75,
            0.95,
            "Lowest bits without a loss: 4, with QAT. PTQ is without a loss at none",
            "QAT is worth it",
        ),
        (0.75, 0.90, "No number of bits tried is without a loss.", "QAT helps, but not enough"),
        (0.75, 0.75, "No number of bits tried is without a loss.", "neither is enough"),
        (0.90, 0.45, "No number of bits tried is without a loss.", "QAT is worse than PTQ"),
    ],
)
def test_headline_and_verdict(ptq, qat, headline, verdict):
    study = compared(0.95, ptq, qat)
    first, second, *findings = find_insights(study)
    assert (first.kind, second.kind) == ("headline", "verdict")
    assert first.text.startswith(headline) and verdict in second.text and second.text.startswith("4 bits: ")
    assert all(insight.clear for insight in (first, second, *findings))


def test_the_lowest_bits_without_a_loss_come_first():
    accuracies = {("fp32_longer", 32): 0.95}
    for bits, ptq, qat in ((8, 0.95, 0.95), (4, 0.949, 0.95), (3, 0.90, 0.95), (2, 0.5, 0.8)):
        accuracies |= {("ptq_mse", bits): ptq, ("qat_learned", bits): qat}
    study = made_up(accuracies, bits=(8, 4, 3, 2))
    insights = find_insights(study)
    assert insights[0].text == "Lowest bits without a loss: 3, with QAT. PTQ needs 4."
    assert [insight.bits for insight in insights[1:5]] == [8, 4, 3, 2]
    assert best(study) == (3, "qat_learned")


def test_all_are_compared_with_fp32_trained_as_long():
    accuracies = {
        ("fp32", 32): 0.80,
        ("fp32_longer", 32): 0.95,
        ("ptq_mse", 4): 0.85,
        ("qat_learned", 4): 0.90,
    }
    (verdict,) = texts(made_up(accuracies), "verdict")
    assert "PTQ loses 10.0" in verdict and "QAT loses 5.0" in verdict
    del accuracies["fp32_longer", 32]
    assert find_insights(made_up(accuracies)) == []


def test_seeds_that_scatter_more_than_they_differ_cannot_tell():
    study = compared(0.95, 0.95, 0.95)
    wide = [0.01, -0.02, 0.015, -0.01, 0.02]
    study.runs[:] = [
        replace(run, accuracy=run.accuracy + wide[run.seed - 42]) if run.model != "fp32_longer" else run
        for run in study.runs
    ]
    headline, verdict, *findings = find_insights(study)
    assert (
        headline.text == "5 seeds cannot tell which numbers of bits are without a loss."
        and not headline.clear
    )
    assert "5 seeds cannot tell. PTQ is unclear (" in verdict.text and not verdict.clear
    assert findings == [] and best(study) is None
    assert "; QAT minus PTQ is " in verdict.text and verdict.text.count("\u00a0±") == 3
    assert "no loss" not in verdict.text and "loses" not in verdict.text


def test_one_seed_never_tells():
    for qat in (0.95, 0.5):
        study = compared(0.95, 0.94, qat, seeds=1)
        headline, verdict, *findings = find_insights(study)
        assert headline.text.startswith("One seed cannot tell") and findings == []
        assert verdict.text.startswith("4 bits: one seed cannot tell. PTQ is at -1.") and not verdict.clear
        assert "±" not in verdict.text and "loss" not in verdict.text and best(study) is None
        assert "One seed has no spread" in definition(study)


def failing(study, model, bits, seeds, reason="the loss rose"):
    study.runs[:] = [
        replace(
            run,
            diverged=reason if (run.model, run.bits) == (model, bits) and run.seed in seeds else run.diverged,
        )
        for run in study.runs
    ]
    return study


def test_a_diverged_training_is_said_and_not_averaged():
    study = failing(compared(0.95, 0.75, 0.95), "qat_learned", 4, (42, 44))
    headline, verdict = (texts(study, kind)[0] for kind in ("headline", "verdict"))
    assert headline == "No number of bits tried is without a loss."
    assert "QAT does not work here. PTQ loses 20.0" in verdict and "QAT diverged in 2 of 5 seeds" in verdict
    assert texts(study, "diverged") == ["QAT learned diverged at 4 bits in 2 of 5 seeds: the loss rose."]
    assert "better" not in verdict
    rows = {row[0]: row[1:] for row in accuracy_table(study).rows}
    assert rows["QAT learned"] == ("", "2 of 5 diverged") and rows["PTQ MSE"] == ("", "75.0")


def test_nothing_is_compared_with_an_fp32_that_did_not_learn():
    study = failing(compared(0.1, 0.1, 0.1), "fp32_longer", 32, (43,), "the accuracy is that of guessing")
    (insight,) = find_insights(study)
    assert insight.text.startswith(
        "FP32 itself did not learn in 1 of 5 seeds (the accuracy is that of guessing)"
    )


def test_a_finding_is_more_than_chance():
    accuracies = {("fp32_longer", 32): 0.95}
    for bits, minmax, ptq, average, tutorial in ((8, 0.95, 0.95, 0.95, 0.95), (4, 0.7, 0.9, 0.97, 0.9)):
        accuracies |= {("ptq_minmax", bits): minmax, ("ptq_mse", bits): ptq, ("qat_learned", bits): 0.95}
        accuracies |= {("qat_moving_average", bits): average, ("qat_tutorial", bits): tutorial}
    study = made_up(accuracies, bits=(8, 4), batch_1={("qat_tutorial", 4): 0.5})
    average, tutorial, minmax = texts(study, "gain")
    assert average.startswith("QAT learned is worse than QAT moving average by 2.0\u00a0±")
    assert tutorial.startswith("QAT learned is better than QAT tutorial by 5.0\u00a0±")
    assert minmax.startswith("PTQ MSE is better than PTQ min-max by 20.0\u00a0±")
    assert all(text.endswith(" points at 4 bits.") and "8 bits" not in text for text in texts(study, "gain"))
    (batch,) = texts(study, "batch")
    assert "at 4 bits one sample at a time is 40.0" in batch and "worse than 256 at a time" in batch
    same = {(model, bits): 0.95 for model, bits in accuracies}
    assert {insight.kind for insight in find_insights(made_up(same, bits=(8, 4)))} == {"headline", "verdict"}


def test_differences_are_paired_and_listed_with_their_intervals():
    study = made_up(
        {("fp32_longer", 32): 0.95, ("ptq_mse", 4): 0.9, ("qat_learned", 4): 0.94, ("qat_tutorial", 4): 0.8}
    )
    rows = dict(difference_table(study).rows)
    assert list(rows) == [
        "PTQ MSE − FP32",
        "QAT tutorial − FP32",
        "QAT learned − FP32",
        "QAT learned − PTQ MSE",
        "QAT learned − QAT tutorial",
    ]
    accuracies = study.accuracies("qat_learned", 4), study.accuracies("ptq_mse", 4)
    expected = compare(*accuracies, train=1437, test=360)
    assert rows["QAT learned − PTQ MSE"] == expected.points and expected.points.startswith("+4.0\u00a0±")
    failing(study, "qat_tutorial", 4, (43,))
    assert [row for row, _ in difference_table(study).rows if "tutorial" in row] == []


def test_worse_is_called_worse():
    (text,) = texts(compared(0.95, 0.85, 0.45), "verdict")
    assert "; QAT is 40.0" in text and text.endswith(" worse than PTQ.")


def test_a_difference_of_nothing_has_no_minus():
    study = compared(0.95, 0.95, 0.95)
    study.runs[:] = [replace(run, accuracy=0.95) for run in study.runs]
    assert "PTQ has no loss (+0.0\u00a0±" in texts(study, "verdict")[0]


def test_the_size_is_that_of_the_lowest_bits_without_a_loss():
    study = compared(0.95, 0.75, 0.95)
    study.sizes = [ModelFile("fp32_longer", 32, 4000, "a"), ModelFile("qat_learned", 4, 1000, "b")]
    assert texts(study, "size") == [
        "The QAT learned file at 4 bits has 1,000 bytes, 4.0 times smaller than FP32 (4,000)."
    ]
    study.sizes[1] = replace(study.sizes[1], bytes=6000)
    assert "1.5 times as large as FP32" in texts(study, "size")[0]


def test_nothing_measured_says_nothing():
    assert find_insights(Study(Settings(), digits_samples())) == []
    assert find_insights(made_up({("fp32_longer", 32): 0.95, ("ptq_mse", 4): 0.95})) == []


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


def test_one_seed_has_no_interval_and_decides_nothing():
    found = compare({42: 0.9}, {42: 0.1}, train=400, test=100)
    assert found.margin is None and not found.clear and not found.below(1)
    assert (found.points, found.size) == ("+80.0", "80.0")


def test_a_single_test_sample_is_never_a_finding():
    equal = {seed: 0.99 for seed in range(50)}
    assert not compare({seed: 1.0 for seed in range(50)}, equal, train=10_000, test=100).clear


def test_only_seeds_that_both_have_are_compared():
    found = compare({1: 0.9, 2: 0.8, 3: 0.1}, {1: 0.7, 2: 0.6}, train=400, test=100)
    assert found.seeds == 2 and found.mean == pytest.approx(0.2)
    assert compare({1: 0.9}, {2: 0.9}, train=400, test=100) is None


def test_spread():
    assert Spread.of([0.5]) == Spread(0.5, None, (0.5,))
    assert Spread.of([1.0, 3.0]).std == pytest.approx(math.sqrt(2))


def step(model, quartiles, ratio):
    return StepTime("net", model, 0.001 * ratio, ratio, quartiles)


def test_times_are_reported_with_their_quartiles():
    fp32 = step("fp32", (1.0, 1.0), 1.0)
    (text,) = time_insights([fp32, step("tutorial", (1.9, 2.2), 2.0), step("qatfast", (0.97, 1.1), 1.08)])
    assert "takes 1.08 times (0.97 to 1.10) an FP32 step" in text and "2.00 times (1.90 to 2.20)" in text


def test_times_that_scatter_widely_are_not_reported():
    fp32, tutorial = step("fp32", (1.0, 1.0), 1.0), step("tutorial", (1.9, 2.2), 2.0)
    assert time_insights([fp32, tutorial, step("qatfast", (0.55, 1.4), 0.84)]) == []
