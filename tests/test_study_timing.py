"""Step times: the three networks do the same, and each is timed as often as the others."""

import torch

from qatfast.study import ThreeLayerNetQAT, time_training_steps, timing
from qatfast.study.timing import TutorialNet
from qatfast.study.training import seeded


def test_the_tutorials_network_computes_what_ours_computes():
    with seeded(1):
        tutorial, ours = TutorialNet(12, 16, 4), ThreeLayerNetQAT(12, 16, 4)
    ours.load_state_dict(tutorial.state_dict())
    inputs = torch.randn(64, 12, generator=torch.Generator().manual_seed(2))
    one, other = tutorial(inputs), ours(inputs)
    # the two round to another level only next to ties
    difference = (one - other).detach().abs()
    assert float(difference.max()) < 0.05 and float(difference.mean()) < 2e-3
    for scores in (one, other):
        scores.square().sum().backward()
    for name, parameter in tutorial.named_parameters():
        torch.testing.assert_close(parameter.grad, ours.get_parameter(name).grad, atol=0.3, rtol=0.05)


def test_each_network_is_timed_against_fp32():
    times = time_training_steps(6, 8, 2, repetitions=5)
    assert [entry.model for entry in times] == ["fp32", "tutorial", "qatfast"]
    for entry in times:
        assert entry.seconds > 0 and entry.quartiles[0] <= entry.ratio <= entry.quartiles[1]
        assert "6 → 8 → 8 → 2, batch 32" in entry.network
    assert (times[0].ratio, times[0].quartiles) == (1.0, (1.0, 1.0))


def test_a_ratio_is_taken_turn_by_turn(monkeypatch):
    # the machine is twice as slow in every other turn; a qatfast step takes 1.5 times as long in each of them
    clock = iter([(1 + turn % 2) * factor for turn in range(8) for factor in (1.0, 3.0, 1.5)])
    monkeypatch.setattr(timing, "_calls_per_timing", lambda step, device: 1)
    monkeypatch.setattr(timing, "_time", lambda step, calls, device: next(clock))
    fp32, tutorial, ours = time_training_steps(6, 8, 2, repetitions=6)
    assert (fp32.seconds, fp32.ratio) == (1.5, 1.0)
    assert (ours.ratio, ours.quartiles) == (1.5, (1.5, 1.5)) and tutorial.ratio == 3.0


def test_one_repetition_is_enough():
    assert len(time_training_steps(6, 8, 2, repetitions=1)) == 3
