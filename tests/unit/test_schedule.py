import math

import pytest

from megachat.errors import UserError
from megachat.schedule import (
    ScheduledValues,
    check_schedule,
    due,
    learning_rate_multiplier,
    muon_momentum,
    scheduled_values,
    weight_decay_multiplier,
)
from megachat.settings import OptimizerConfig


def test_learning_rate_rises_stays_and_falls_to_its_end():
    settings = OptimizerConfig(warmup_steps=10, warmdown_ratio=0.5, final_lr_fraction=0.05)

    def at(step):
        return learning_rate_multiplier(settings, step, 100)

    assert (at(0), at(9), at(10), at(50)) == (0.1, 1.0, 1.0, 1.0)
    assert at(75) == pytest.approx(0.5 + 0.5 * 0.05)
    assert at(100) == pytest.approx(0.05)
    assert learning_rate_multiplier(OptimizerConfig(warmup_steps=0, warmdown_ratio=0.0), 99, 100) == 1.0


def test_the_warm_up_may_be_a_share_of_the_steps():
    settings = OptimizerConfig(warmup_steps=10, warmup_ratio=0.2, warmdown_ratio=0.5)
    assert [learning_rate_multiplier(settings, step, 100) for step in (0, 9, 19, 20)] == [0.05, 0.5, 1.0, 1.0]


@pytest.mark.parametrize(
    "shape, quarter, half, end",
    [
        ("linear", 0.775, 0.55, 0.1),
        ("cosine", 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)), 0.55, 0.1),
        ("sqrt", 0.1 + 0.9 * 0.5, 0.1 + 0.9 * (1 - 0.5**0.5), 0.1),
        ("exponential", 0.1**0.25, 0.1**0.5, 0.1),
        ("step", 0.1 ** (1 / 3), 0.1 ** (2 / 3), 0.1),
    ],
)
def test_shapes_of_the_warm_down(shape, quarter, half, end):
    """Of 100 steps the last 80: values after a quarter, a half and all of them; it never rises."""
    settings = OptimizerConfig(warmup_steps=0, warmdown_ratio=0.8, final_lr_fraction=0.1, warmdown_shape=shape)
    at = [learning_rate_multiplier(settings, step, 100) for step in range(101)]
    assert [at[40], at[60], at[100]] == pytest.approx([quarter, half, end])
    assert at[:21] == [1.0] * 21 and at == sorted(at, reverse=True)


@pytest.mark.parametrize("shape", ["linear", "cosine", "sqrt"])
@pytest.mark.parametrize("steps", [1, 2, 7, 100, 2519])
@pytest.mark.parametrize("ratio", [0.01, 0.2, 0.85, 1.0])
def test_a_final_rate_of_zero_is_reached_when_the_last_step_is_done(shape, steps, ratio):
    """nanochat's rule: step `steps`, which is never executed, has the final rate; every executed step changes weights.

    The last executed one is one step of the warm-down before its end.
    """
    settings = OptimizerConfig(warmup_steps=0, warmdown_ratio=ratio, final_lr_fraction=0.0, warmdown_shape=shape)
    warmdown = round(ratio * steps)
    at = [learning_rate_multiplier(settings, step, steps) for step in range(steps + 1)]
    if not warmdown:
        assert set(at) == {1.0}
        return
    share = 1 / warmdown  # of the warm-down that the last step has left
    last = {"linear": share, "cosine": 0.5 * (1 - math.cos(math.pi * share)), "sqrt": 1 - math.sqrt(1 - share)}
    assert at[-1] == 0.0 and 0 < at[-2] == pytest.approx(last[shape])
    assert at == sorted(at, reverse=True) and at[steps - warmdown] == 1.0 > at[steps - warmdown + 1]


@pytest.mark.parametrize("shape", ["exponential", "step"])
def test_shapes_that_multiply_end_at_their_fraction(shape):
    settings = OptimizerConfig(warmup_steps=0, warmdown_ratio=0.9, final_lr_fraction=0.01, warmdown_shape=shape)
    at = [learning_rate_multiplier(settings, step, 30) for step in range(31)]
    assert at[30] == pytest.approx(0.01) and min(at[:30]) >= 0.01 * (1 - 1e-9)


def test_a_shape_that_never_reaches_zero_is_refused():
    check_schedule(OptimizerConfig(warmdown_shape="sqrt", final_lr_fraction=0.0))
    with pytest.raises(UserError, match="exponential multiplies the rates and never reaches"):
        check_schedule(OptimizerConfig(warmdown_shape="exponential", final_lr_fraction=0.0))


def test_momentum_rises_over_400_steps_and_falls_with_the_rate():
    settings = OptimizerConfig()
    at = [muon_momentum(settings, step, 2000) for step in (0, 200, 500, 700, 2000)]
    assert at == [0.85, pytest.approx(0.91), 0.97, 0.97, pytest.approx(0.90)]
    other = OptimizerConfig(momentum_start=0.5, momentum_top=0.9, momentum_end=0.8, momentum_warmup_steps=10)
    assert [muon_momentum(other, step, 100) for step in (0, 5, 10, 100)] == pytest.approx([0.5, 0.7, 0.9, 0.8])
    assert muon_momentum(OptimizerConfig(momentum_warmup_steps=0), 0, 100) == 0.97


def test_weight_decay_is_half_a_cosine_or_what_is_configured():
    assert [weight_decay_multiplier(step, 100) for step in (0, 50, 100)] == pytest.approx([1.0, 0.5, 0.0])
    assert [weight_decay_multiplier(step, 100, "linear") for step in (0, 25, 100)] == [1.0, 0.75, 0.0]
    assert weight_decay_multiplier(99, 100, "constant") == 1.0
    with_rate = scheduled_values(OptimizerConfig(decay_shape="rate", warmup_steps=10), 4, 100)
    assert with_rate.decay == with_rate.rate == 0.5


def test_one_function_gives_all_values_of_a_step():
    """With settings that differ, so that none can stand for another."""
    optimizer = OptimizerConfig(warmup_steps=10, warmdown_ratio=0.5, final_lr_fraction=0.05)
    assert scheduled_values(optimizer, 0, 100) == ScheduledValues(0.1, 0.85, 1.0)
    values = scheduled_values(optimizer, 75, 100)
    assert (values.rate, values.momentum) == (pytest.approx(0.525), muon_momentum(optimizer, 75, 100))
    assert values.decay == weight_decay_multiplier(75, 100)


def test_due():
    assert [step for step in range(7) if due(step, 3)] == [0, 3, 6]
    assert not due(5, 0)
