"""What a run does about a loss or gradient that is not finite, and which steps are spikes. Pure functions."""

import math
import statistics
from collections.abc import Sequence
from typing import Literal

from megachat.parallel.build import LOSS_SCALE_MINIMUM
from megachat.train.rank_reports import Report, ranks_text

Fault = Literal["loss", "gradient"]
SPIKE_WINDOW = 64  # steps that a spike is compared with
LEAST = 20  # of them
_NORMAL = 1.4826  # deviation of a normal distribution in units of its median absolute deviation


def find_fault(loss: float, norm: float, loss_scale: float) -> Fault | None:
    """Returns what is not finite. An overflow of float16's gradients is no fault while the loss scale can fall."""
    if not math.isfinite(loss):
        return "loss"
    return "gradient" if not math.isfinite(norm) and loss_scale <= LOSS_SCALE_MINIMUM else None


def chosen_action(policy: str, fault: Fault, *, skipped: bool) -> str:
    """Returns "stop", "skip" or "rewind". policy: reliability.on_nonfinite. skipped: no weight has changed.

    An update that was made cannot be skipped: then "skip" is "stop".
    """
    if policy == "auto":
        policy = "stop" if fault == "loss" else "skip"
    return "stop" if policy == "skip" and not skipped else policy


def fault_sentence(step: int, loss: float, fault: Fault, sightings: Sequence[Report], *, skipped: bool) -> str:
    """Returns what is not finite, on which ranks, and that no weight has changed. sightings: see train/sightings.py."""
    if fault == "loss":
        ranks = [seen for seen in sightings if isinstance(seen["loss"], str)]
        what = f"the loss is {loss}"
    else:
        ranks = [seen for seen in sightings if seen["gradient"]]
        names = ", ".join(sorted({seen["gradient"] for seen in ranks})[:3])
        what = f"the gradient{' of ' if names else ''}{names} is not finite"
    changed = "this step changed no weight and the checkpoints are" if skipped else "the checkpoints are"
    return f"step {step}: {what} on {ranks_text(ranks) or 'no single rank'}; {changed} untouched"


def deviations_above(value: float, recent: Sequence[float], sigma: float) -> float | None:
    """Returns how many deviations the value is above the median of the recent ones, or None if at most sigma.

    The deviation is 1.4826 times the median absolute deviation, which earlier spikes hardly change.
    """
    if len(recent) < LEAST:
        return None
    median = statistics.median(recent)
    deviation = _NORMAL * statistics.median(abs(other - median) for other in recent)
    above = (value - median) / deviation if deviation else 0.0
    return above if above > sigma else None
