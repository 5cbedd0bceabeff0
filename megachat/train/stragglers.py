"""Compares how long the ranks work in a step, to name a slow rank and its host."""

import math
import statistics
from collections.abc import Sequence

from megachat.train.rank_reports import Report

RANK_TIMES_WINDOW = 50  # steps: the ranks' times are compared once per window
SLOW_RATIO = 1.2  # times the median of the ranks with equal work


def ratios_to_median(work_s: Sequence[float], ranks: Sequence[Report]) -> list[float]:
    """Returns each rank's seconds relative to the median of its pipeline stage, whose ranks have equal work in a step;
    of two ranks that is the faster. ranks: as of gather_reports.
    """
    of_stage: dict[int, list[float]] = {}
    for seconds, rank in zip(work_s, ranks, strict=True):
        of_stage.setdefault(rank["pipeline"], []).append(seconds)
    medians = {stage: statistics.median_low(times) for stage, times in of_stage.items()}
    return [
        seconds / medians[rank["pipeline"]] if medians[rank["pipeline"]] > 0 else 1.0
        for seconds, rank in zip(work_s, ranks, strict=True)
    ]


def rank_values(work_s: Sequence[float], ranks: Sequence[Report]) -> dict[str, float | int | str]:
    """Returns the metrics of one window. work_s: each rank's median seconds of work per step."""
    ordered, ratios = sorted(work_s), ratios_to_median(work_s, ranks)
    slowest = max(range(len(ratios)), key=lambda rank: (ratios[rank], work_s[rank]))
    return {
        "ranks/work_s_median": statistics.median(work_s),
        "ranks/work_s_p95": ordered[math.ceil(0.95 * len(ordered)) - 1],
        "ranks/slowest": slowest,
        "ranks/slowest_host": ranks[slowest]["host"],
        "ranks/slowest_ratio": ratios[slowest],
    }


class SlowRanks:
    """Decides which slow ranks are worth a log line: those that were not slow in the window before."""

    def __init__(self) -> None:
        self._slow: set[int] = set()

    def line(self, work_s: Sequence[float], ranks: Sequence[Report]) -> str | None:
        """Returns a line if ranks have become slow in this window, about the slowest of them."""
        ratios = ratios_to_median(work_s, ranks)
        slow = {rank for rank, ratio in enumerate(ratios) if ratio > SLOW_RATIO}
        new, self._slow = slow - self._slow, slow
        if not new:
            return None
        worst = max(new, key=lambda rank: ratios[rank])
        others = ", ".join(str(rank) for rank in sorted(new - {worst}))
        return (
            f"rank {worst} ({ranks[worst]['host']}) is slow: it worked {work_s[worst]:.3f} s per step for "
            f"{RANK_TIMES_WINDOW} steps, {ratios[worst]:.2f} times the median rank of its stage"
            + (f"; also ranks {others}" if others else "")
        )
