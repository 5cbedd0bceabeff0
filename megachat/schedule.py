"""Learning rate, momentum and weight decay as pure functions of the step (nanochat, scripts/base_train.py)."""

import math
from dataclasses import dataclass
from typing import Protocol

MOMENTUM_START, MOMENTUM_TOP, MOMENTUM_END = 0.85, 0.97, 0.90
MOMENTUM_WARMUP_STEPS = 400


class ScheduleSettings(Protocol):
    """The settings of a config's optimizer section that the schedule uses."""

    @property
    def warmup_steps(self) -> int: ...
    @property
    def warmdown_ratio(self) -> float: ...
    @property
    def final_lr_fraction(self) -> float: ...


@dataclass(frozen=True)
class ScheduledValues:
    """The values of one step. rate, decay: multipliers of the learning rates and of Muon's weight decay."""

    rate: float
    momentum: float
    decay: float


def scheduled_values(settings: ScheduleSettings, step: int, steps: int) -> ScheduledValues:
    """Returns what a run of `steps` steps uses in step `step`, counted from 0."""
    ratio = settings.warmdown_ratio
    rate = learning_rate_multiplier(
        step,
        steps,
        warmup_steps=settings.warmup_steps,
        warmdown_ratio=ratio,
        final_fraction=settings.final_lr_fraction,
    )
    momentum = muon_momentum(step, steps, warmdown_ratio=ratio)
    return ScheduledValues(rate, momentum, weight_decay_multiplier(step, steps))


def due(step: int, every: int) -> bool:
    """Returns True on every `every`-th step; never if `every` is 0."""
    return every > 0 and step % every == 0


def learning_rate_multiplier(
    step: int, steps: int, *, warmup_steps: int, warmdown_ratio: float, final_fraction: float
) -> float:
    """Rises linearly over the warm-up, stays at 1, then falls linearly to `final_fraction` at `steps`.

    Steps count from 0.
    """
    warmdown = round(warmdown_ratio * steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if step <= steps - warmdown or not warmdown:
        return 1.0
    left = (steps - step) / warmdown
    return left + (1 - left) * final_fraction


def muon_momentum(step: int, steps: int, *, warmdown_ratio: float) -> float:
    """Rises over the first 400 steps and falls during the learning rate's warm-down."""
    start = steps - round(warmdown_ratio * steps)
    if step < MOMENTUM_WARMUP_STEPS:
        share = step / MOMENTUM_WARMUP_STEPS
        return (1 - share) * MOMENTUM_START + share * MOMENTUM_TOP
    if step >= start and steps > start:
        share = (step - start) / (steps - start)
        return MOMENTUM_TOP * (1 - share) + MOMENTUM_END * share
    return MOMENTUM_TOP


def weight_decay_multiplier(step: int, steps: int) -> float:
    """Falls from 1 to 0 over the run as half a cosine."""
    return 0.5 * (1 + math.cos(math.pi * step / steps))
