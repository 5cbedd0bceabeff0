import pytest

from megachat.schedule import (
    ScheduledValues,
    due,
    learning_rate_multiplier,
    muon_momentum,
    scheduled_values,
    weight_decay_multiplier,
)
from megachat.settings import OptimizerConfig


def test_learning_rate_rises_stays_and_falls_to_its_end():
    def at(step):
        return learning_rate_multiplier(step, 100, warmup_steps=10, warmdown_ratio=0.5, final_fraction=0.05)

    assert (at(0), at(9), at(10), at(50)) == (0.1, 1.0, 1.0, 1.0)
    assert at(75) == pytest.approx(0.5 + 0.5 * 0.05)
    assert at(100) == pytest.approx(0.05)
    assert learning_rate_multiplier(99, 100, warmup_steps=0, warmdown_ratio=0.0, final_fraction=0.05) == 1.0


def test_momentum_rises_over_400_steps_and_falls_with_the_rate():
    assert muon_momentum(0, 2000, warmdown_ratio=0.65) == 0.85
    assert muon_momentum(200, 2000, warmdown_ratio=0.65) == pytest.approx(0.91)
    assert muon_momentum(500, 2000, warmdown_ratio=0.65) == 0.97
    assert muon_momentum(700, 2000, warmdown_ratio=0.65) == 0.97
    assert muon_momentum(2000, 2000, warmdown_ratio=0.65) == pytest.approx(0.90)


def test_weight_decay_is_half_a_cosine():
    assert [weight_decay_multiplier(step, 100) for step in (0, 50, 100)] == pytest.approx([1.0, 0.5, 0.0])


def test_one_function_gives_all_values_of_a_step():
    """With settings that differ, so that none can stand for another."""
    optimizer = OptimizerConfig(warmup_steps=10, warmdown_ratio=0.5, final_lr_fraction=0.05)
    assert scheduled_values(optimizer, 0, 100) == ScheduledValues(0.1, 0.85, 1.0)
    values = scheduled_values(optimizer, 75, 100)
    assert (values.rate, values.momentum) == (pytest.approx(0.525), muon_momentum(75, 100, warmdown_ratio=0.5))
    assert values.decay == weight_decay_multiplier(75, 100)


def test_due():
    assert [step for step in range(7) if due(step, 3)] == [0, 3, 6]
    assert not due(5, 0)
