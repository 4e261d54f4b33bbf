"""Step times: the three networks compute the same and are timed equally often."""

import itertools

import torch

from qatfast.bench import tutorial
from qatfast.study import ThreeLayerNetQAT, time_training_steps, timing
from qatfast.study.networks import FunctionalQATNet
from qatfast.study.training import seeded


def test_the_tutorials_network_computes_what_ours_computes():
    with seeded(1):
        theirs, ours = FunctionalQATNet(tutorial.FakeQuantize.apply, 12, 16, 4), ThreeLayerNetQAT(12, 16, 4)
    ours.load_state_dict(theirs.state_dict())
    inputs = torch.randn(64, 12, generator=torch.Generator().manual_seed(2))
    expected, actual = theirs(inputs), ours(inputs)
    # The networks round to different levels only next to ties.
    difference = (actual - expected).detach().abs()
    assert float(difference.max()) < 0.05 and float(difference.mean()) < 2e-3
    for scores in (expected, actual):
        scores.square().sum().backward()
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(parameter.grad, ours.get_parameter(name).grad, atol=0.3, rtol=0.05)


def test_each_network_is_timed_against_fp32():
    times = time_training_steps(6, 8, 2, repetitions=5)
    assert [entry.model for entry in times] == ["fp32", "tutorial", "qatfast"]
    for entry in times:
        assert entry.seconds > 0 and entry.quartiles[0] <= entry.ratio <= entry.quartiles[1]
        assert "6 → 8 → 8 → 2, batch 32" in entry.network
    assert (times[0].ratio, times[0].quartiles) == (1.0, (1.0, 1.0))


def test_a_ratio_is_taken_round_by_round(monkeypatch):
    # The machine is twice as slow in every other round, and a step of qatfast takes 1.5 times as
    # long as FP32.
    factors = iter([1.0, 3.0, 1.5])

    def turn_of(step, device):
        factor, rounds = next(factors), itertools.count()
        return lambda: (1 + next(rounds) % 2) * factor

    monkeypatch.setattr(timing, "turn_of", turn_of)
    fp32, theirs, ours = time_training_steps(6, 8, 2, repetitions=6)
    assert (fp32.seconds, fp32.ratio) == (1.5, 1.0)
    assert (ours.ratio, ours.quartiles) == (1.5, (1.5, 1.5)) and theirs.ratio == 3.0


def test_one_repetition_is_enough():
    assert len(time_training_steps(6, 8, 2, repetitions=1)) == 3
