"""The ladder: a change is tried at growing depths, cheapest first.

Settings tuned on a small model may hurt a larger one, and gains shrink with size. nanochat's log uses d12 for a signal,
d20 to validate and d24 to decide.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from megachat.activity import hours_minutes
from megachat.studies.comparison import compare_curves
from megachat.studies.curves import AXES, Curve, curve_of
from megachat.studies.runs import RunRecord, run_row
from megachat.studies.trials import FIRST_SEED, Diverged, Train, Trial

# Instead of a comparison.
_DIVERGED_RESULT: dict[str, Any] = {"verdict": "worse (diverged)", "axes": dict.fromkeys(AXES)}
_READ_S = 1.0  # what takes less was not trained, but read


class Rung(NamedTuple):
    """The runs of one depth and their comparison (see compare_curves). change: empty if one of its losses diverged."""

    depth: int
    base: list[RunRecord]
    change: list[RunRecord]
    comparison: dict[str, Any]

    @property
    def verdict(self) -> str:
        """better, worse or cannot tell."""
        return self.comparison["verdict"].split(":")[0].split(" (")[0]


def rung_trials(depth: int, changes: Sequence[str], seeds: Sequence[int]) -> tuple[list[Trial], list[Trial]]:
    """Returns the trials of the baseline and of the change at a depth, one per seed."""
    sides = []
    for name, settings in (("base", ()), ("change", tuple(changes))):
        common = (f"model.depth={depth}", *settings)
        sides.append([Trial(f"d{depth}_{name}_s{seed}", (*common, f"run.seed={seed}")) for seed in seeds])
    return sides[0], sides[1]


def climb(
    train: Train,
    changes: Sequence[str],
    depths: Sequence[int],
    *,
    seeds: Sequence[int] = (FIRST_SEED,),
    stop_at: Sequence[str] = ("worse",),
    log: Callable[[str], object] = print,
    train_base: Train | None = None,
    flops: Mapping[int, float] | None = None,
) -> list[Rung]:
    """Trains the rungs from the lowest depth, and ends after one whose verdict is in `stop_at`.

    A change whose loss is no number is worse at that depth; a baseline's raises Diverged. Trials that are finished are
    not trained again, so a ladder that was ended continues. train_base: trains the
    baselines, if these are in another folder. flops: of a rung, for the time that is left.
    """
    rungs: list[Rung] = []
    clock, depths = _Clock(flops or {}), sorted(set(depths))
    for number, depth in enumerate(depths, 1):
        sides: list[list[RunRecord]] = []
        both = rung_trials(depth, changes, seeds)
        for side, trials in zip((train_base or train, train), both, strict=True):
            sides.append([])
            for trial in trials:
                log(f"rung {number} of {len(depths)}, depth {depth}: {trial.name}{clock.eta(depths[number - 1 :])}")
                try:
                    with clock.training(depth, 2 * len(seeds)):
                        sides[-1].append(side(trial, None))
                except Diverged as error:
                    if len(sides) == 1:
                        raise
                    log(str(error))
                    sides[-1] = []
                    break
        base, change = sides
        rungs.append(Rung(depth, base, change, compare_curves(base, change) if change else _DIVERGED_RESULT))
        log(f"depth {depth}: the change is {rungs[-1].comparison['verdict']}")
        if rungs[-1].verdict in stop_at:
            log(f"the ladder ends here: --stop-at {','.join(stop_at)}")
            break
    return rungs


class _Clock:
    """Estimates how long a ladder still takes, by the FLOPs per second of its runs. flops: of a rung by depth."""

    def __init__(self, flops: Mapping[int, float]) -> None:
        self.flops, self.done, self.seconds, self.trained = flops, dict.fromkeys(flops, 0.0), 0.0, 0.0

    @contextlib.contextmanager
    def training(self, depth: int, runs: int) -> Iterator[None]:
        """Measures one of the runs of a rung."""
        begin = time.monotonic()
        yield
        share, seconds = self.flops.get(depth, 0.0) / runs, time.monotonic() - begin
        self.done[depth] = self.done.get(depth, 0.0) + share
        if seconds > _READ_S:
            self.seconds, self.trained = self.seconds + seconds, self.trained + share

    def eta(self, depths: Sequence[int]) -> str:
        """Returns the time that the rungs of these depths still take, if it is known."""
        if not self.trained:
            return ""
        left = sum(self.flops[depth] - self.done[depth] for depth in depths)
        return f", eta {hours_minutes(self.seconds / self.trained * left)}"


def ladder_rows(rungs: Sequence[Rung]) -> list[dict[str, Any]]:
    """Returns a row per rung. It has the mean last bits per byte of both sides, gain, the ratios of the axes, the mean
    CORE of both sides (None if a run has none), and the verdict. A change that diverged has no values.
    """
    rows = []
    for rung in rungs:
        base, change = ([curve_of(run.lines) for run in side] for side in (rung.base, rung.change))
        axes = rung.comparison["axes"]
        rows.append(
            {
                "depth": rung.depth,
                "base": _mean_last(base),
                "change": _mean_last(change) if change else None,
                "gain": _mean_last(base) - _mean_last(change) if change else None,
                **{axis: axes[axis] and axes[axis]["value"] for axis in AXES},
                "core": [_mean_core(rung.base), _mean_core(rung.change) if change else None],
                "verdict": rung.comparison["verdict"],
            }
        )
    return rows


def compute_multiplier(rungs: Sequence[Rung]) -> dict[str, Any] | None:
    """Returns {"value", "rungs", "residual"}, None with fewer than two rungs. value: by how much fewer FLOPs the change
    needs on the whole ladder, from a line through log FLOPs and log bits per byte of the baseline's rungs.

    residual: the largest distance of a baseline's rung from the line, in log bits per byte. With two rungs the line has
    no residual, and with few rungs the value is a guess.
    """
    rungs = [rung for rung in rungs if rung.change]  # none of a change that diverged
    if len(rungs) < 2:
        return None
    points = [[_log_end(run) for run in rung.base] for rung in rungs]
    flops = [sum(each[0] for each in rung) / len(rung) for rung in points]
    values = [sum(each[1] for each in rung) / len(rung) for rung in points]
    center, height = sum(flops) / len(flops), sum(values) / len(values)
    spread = sum((x - center) ** 2 for x in flops)
    slope = sum((x - center) * (y - height) for x, y in zip(flops, values, strict=True)) / spread if spread else 0.0
    if slope >= 0:
        return None
    residual = max(abs(height + slope * (x - center) - y) for x, y in zip(flops, values, strict=True))
    logs = []
    for rung in rungs:
        for run in rung.change:
            x, y = _log_end(run)
            logs.append(center + (y - height) / slope - x)  # the FLOPs that the baseline's line needs for this value
    return {"value": math.exp(sum(logs) / len(logs)), "rungs": len(rungs), "residual": residual}


def _mean_last(curves: Sequence[Curve]) -> float:
    return float(sum(curve.values[-1] for curve in curves) / len(curves))


def _mean_core(runs: Sequence[RunRecord]) -> float | None:
    values = [run_row(run)["core"] for run in runs]
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None


def _log_end(run: RunRecord) -> tuple[float, float]:
    curve = curve_of(run.lines)
    return math.log(curve.axes["flops"][-1]), math.log(curve.values[-1])
