"""Learning rate, momentum and weight decay as pure functions of the step (nanochat, scripts/base_train.py)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from megachat.errors import UserError


class ScheduleSettings(Protocol):
    """The settings of a config's optimizer section that the schedule uses."""

    @property
    def warmup_steps(self) -> int: ...
    @property
    def warmup_ratio(self) -> float | None: ...
    @property
    def warmdown_ratio(self) -> float: ...
    @property
    def warmdown_shape(self) -> str: ...
    @property
    def final_lr_fraction(self) -> float: ...
    @property
    def momentum_start(self) -> float: ...
    @property
    def momentum_top(self) -> float: ...
    @property
    def momentum_end(self) -> float: ...
    @property
    def momentum_warmup_steps(self) -> int: ...
    @property
    def decay_shape(self) -> str: ...
    @property
    def ramp(self) -> tuple[float, float] | None: ...
    @property
    def ramp_rates(self) -> Sequence[str]: ...


@dataclass(frozen=True)
class ScheduledValues:
    """The values of one step. rate, decay: multipliers of the learning rates and of Muon's weight decay. ramp: of a
    learning-rate range test, for the rates named in ramped, or all if it is empty.
    """

    rate: float
    momentum: float
    decay: float
    ramp: float = 1.0
    ramped: tuple[str, ...] = ()

    def multiplier(self, rate: str) -> float:
        """Returns the multiplier of a rate. rate: key of Plan.rates."""
        return self.rate * self.ramp if not self.ramped or rate in self.ramped else self.rate


def scheduled_values(settings: ScheduleSettings, step: int, steps: int) -> ScheduledValues:
    """Returns what a run of `steps` steps uses in step `step`, counted from 0."""
    rate = learning_rate_multiplier(settings, step, steps)
    decay = rate if settings.decay_shape == "rate" else weight_decay_multiplier(step, steps, settings.decay_shape)
    ramp = ramp_multiplier(settings, step, steps)
    return ScheduledValues(rate, muon_momentum(settings, step, steps), decay, ramp, tuple(settings.ramp_rates))


def ramp_multiplier(settings: ScheduleSettings, step: int, steps: int) -> float:
    """Rises exponentially from the first step to the last (Smith 2017, arXiv 1506.01186); 1 without a ramp."""
    if settings.ramp is None:
        return 1.0
    low, high = settings.ramp
    return low * (high / low) ** (step / max(1, steps - 1))


def check_schedule(settings: ScheduleSettings) -> None:
    """Raises UserError for a warm-down that cannot reach its end."""
    if settings.warmdown_shape in ("exponential", "step") and not settings.final_lr_fraction:
        raise UserError(
            f"optimizer.warmdown_shape {settings.warmdown_shape} multiplies the rates and never reaches "
            "optimizer.final_lr_fraction 0: give a fraction above 0, or another shape"
        )


def due(step: int, every: int) -> bool:
    """Returns True on every `every`-th step; never if `every` is 0."""
    return every > 0 and step % every == 0


def warmup_length(settings: ScheduleSettings, steps: int) -> int:
    """Returns the steps of the rates' warm-up."""
    return settings.warmup_steps if settings.warmup_ratio is None else round(settings.warmup_ratio * steps)


def learning_rate_multiplier(settings: ScheduleSettings, step: int, steps: int) -> float:
    """Rises linearly over the warm-up, stays at 1, then falls to `final_lr_fraction` at `steps`. Steps count from 0.

    As in nanochat, the last step that is executed has index steps - 1, one step before the end of the fall. With a
    fraction of 0 its multiplier is therefore above 0 (linear: 1 / steps of the warm-down), and no step is wasted.
    """
    warmup, warmdown = warmup_length(settings, steps), round(settings.warmdown_ratio * steps)
    if step < warmup:
        return (step + 1) / warmup
    if step <= steps - warmdown or not warmdown:
        return 1.0
    return _falling(settings.warmdown_shape, (steps - step) / warmdown, settings.final_lr_fraction)


def _falling(shape: str, left: float, final: float) -> float:
    """Falls from 1 to `final`. left: share of the warm-down that is left, from 1 to 0. sqrt: Haegele et al. 2024."""
    if shape == "exponential":
        return final ** (1 - left)
    if shape == "step":  # after the start of each third
        return final ** (min(3, 1 + int(3 * (1 - left))) / 3)
    if shape == "cosine":
        left = 0.5 * (1 - math.cos(math.pi * left))
    elif shape == "sqrt":
        left = 1 - math.sqrt(1 - left)
    return left + (1 - left) * final


def muon_momentum(settings: ScheduleSettings, step: int, steps: int) -> float:
    """Rises over the momentum's warm-up and falls linearly during the learning rate's warm-down."""
    start, top = steps - round(settings.warmdown_ratio * steps), settings.momentum_top
    if step < settings.momentum_warmup_steps:
        share = step / settings.momentum_warmup_steps
        return (1 - share) * settings.momentum_start + share * top
    if step >= start and steps > start:
        share = (step - start) / (steps - start)
        return top * (1 - share) + settings.momentum_end * share
    return top


def weight_decay_multiplier(step: int, steps: int, shape: str = "cosine") -> float:
    """Falls from 1 to 0 over the run: as half a cosine (nanochat), linearly, or not at all (constant)."""
    if shape == "constant":
        return 1.0
    if shape == "linear":
        return 1 - step / steps
    return 0.5 * (1 + math.cos(math.pi * step / steps))
