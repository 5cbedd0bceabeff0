"""Curves of runs on three axes (steps, seconds, FLOPs), and how much of an axis one run needs to reach another's value.

An improvement must show on all three axes (nanochat's rule): a change that learns more per step may lose it again by
slower steps. All of it is arithmetic on recorded values; nothing is loaded but numpy.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from megachat.errors import UserError
from megachat.evals.uncertainty import CONFIDENCE

AXES = ("steps", "seconds", "flops")
# Two-sided 95 % quantiles of Student's t for 1, 2, ... degrees of freedom; scipy is not installed for this.
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)


class Curve(NamedTuple):
    """A falling metric of one run. All arrays are float64 [points]; axes: per name of AXES, never falling."""

    axes: dict[str, np.ndarray]
    values: np.ndarray


def curve_of(lines: Sequence[dict], key: str = "val/bpb") -> Curve:
    """Returns the curve of a metric from the lines of metrics.jsonl.

    seconds: nanochat's clock, training steps after step 10 without evaluation and saving. A point at which an axis
    has not moved yet has the value 0 there. Raises UserError if fewer than two points are recorded.
    """
    points = [
        (line["step"], line["total_training_time"], line["total_training_flops"], line[key])
        for line in lines
        if isinstance(line.get(key), int | float) and "total_training_time" in line and math.isfinite(line[key])
    ]
    if len(points) < 2:
        known = sorted({name for line in lines for name in line if name.startswith(("train/", "val/"))} - {key})
        fix = "train longer" if points or not known else f"train longer, or give one of {', '.join(known)}"
        raise UserError(f"{len(points)} values of {key} are recorded, and a curve needs 2: {fix}")
    table = np.array(sorted(points), dtype=np.float64)
    return Curve({name: table[:, number] for number, name in enumerate(AXES)}, table[:, 3])


def falling_fit(values: np.ndarray) -> np.ndarray:
    """Returns the least-squares fit of a sequence that never rises: isotonic regression by pooling adjacent violators
    (Ayer et al., 1955). It smooths noise without a width to choose and keeps a falling sequence as it is.
    """
    blocks: list[list[float]] = []  # mean, count
    for value in values:
        blocks.append([float(value), 1])
        while len(blocks) > 1 and blocks[-2][0] < blocks[-1][0]:
            mean, count = blocks.pop()
            before, number = blocks[-1]
            blocks[-1] = [(before * number + mean * count) / (number + count), number + count]
    return np.concatenate([np.full(int(count), mean) for mean, count in blocks])


def noise_of(curve: Curve) -> float:
    """Returns the standard deviation of a curve's values around a smooth curve, from second differences of neighbors.

    A straight line has none; for independent noise of deviation s at equal distances the second difference has the
    deviation sqrt(6) s. The median over the curve's later half leaves out the steep start. A bend that is no noise is
    counted as noise, so it is an upper estimate. 0 for fewer than 4 values, without that of the untrained model.
    """
    values = curve.values[curve.axes["steps"] > 0]
    if len(values) < 4:
        return 0.0
    later = values[min(len(values) // 2, len(values) - 4) :]
    return float(np.median(np.abs(np.diff(later, 2))) / (0.6745 * math.sqrt(6)))


def reach(curve: Curve, value: float, axis: str) -> float | None:
    """Returns where on the axis the smoothed curve reaches the value first, by linear interpolation; None if it does
    not. The first point counts as the start of the axis: nothing is known before it.
    """
    fit, places = falling_fit(curve.values), curve.axes[axis]
    below = np.flatnonzero(fit <= value)
    if not below.size:
        return None
    after = int(below[0])
    if after == 0:
        return float(places[0])
    high, low = fit[after - 1], fit[after]
    return float(places[after - 1] + (places[after] - places[after - 1]) * (high - value) / (high - low))


class Ratio(NamedTuple):
    """How much of an axis the second side needs, per amount that the first side needs. low, high: 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """ "better" if the second side needs less beyond the interval, "worse" if more, else "cannot tell"."""
        return "better" if self.high < 1 else "worse" if self.low > 1 else "cannot tell"

    def times(self, other: "Ratio") -> "Ratio":
        """Returns the product of independent ratios: the distances of the interval's ends add in squares of logs."""
        value = self.value * other.value
        down, up = (
            math.hypot(*(math.log(each.value / getattr(each, end)) for each in (self, other)))
            for end in ("low", "high")
        )
        return Ratio(value, value * math.exp(-down), value * math.exp(up))


def common_value(first: Sequence[Curve], second: Sequence[Curve]) -> float:
    """Returns the lowest value that every curve reaches. Raises UserError if the curves share no range of values."""
    curves = [*first, *second]
    value = max(float(falling_fit(curve.values)[-1]) for curve in curves)
    highest = min(float(curve.values[0]) for curve in curves)
    if value >= highest:
        raise UserError(
            f"the curves share no values: one ends at {value:.4f} and one starts at {highest:.4f}; train longer, or "
            "evaluate more often"
        )
    return value


def axis_ratio(first: Sequence[Curve], second: Sequence[Curve], value: float, axis: str) -> Ratio | None:
    """Returns the ratio of what the sides need to reach a value that every curve reaches; several curves on a side are
    runs of one recipe with other seeds. None where an axis is 0 there (no second is counted before step 11).

    The interval: with two runs or more on each side, Welch's t on the logarithms. With fewer, how far the noise of the
    values moves the places (two deviations of each curve, added in squares); then the noise from run to run is not in
    it.
    """
    places = [[reach(curve, value, axis) for curve in side] for side in (first, second)]
    if not all(place for side in places for place in side):
        return None
    logs = [np.log(np.array(side, dtype=np.float64)) for side in places]
    center = float(logs[1].mean() - logs[0].mean())
    if min(map(len, logs)) > 1:
        variances = [float(side.var(ddof=1)) / len(side) for side in logs]
        freedom = _welch_freedom(variances, [len(side) for side in logs])
        width = student_95(freedom) * math.sqrt(sum(variances))
    else:
        shifts = [_noise_in_place(curve, value, axis) for curve in (*first, *second)]
        width = math.sqrt(sum(shift**2 for shift in shifts))
    return Ratio(math.exp(center), math.exp(center - width), math.exp(center + width))


def interval_of_ratios(ratios: Sequence[float]) -> Ratio:
    """Returns the median of ratios that were measured in pairs, with an interval for it between two of them by the sign
    test. It is of 95 % or more. With fewer than 6 pairs it is all that was measured, which is less than 95 %.
    """
    ordered = sorted(ratios)
    count, cut, tail = len(ordered), 0, 0.5 ** len(ordered)
    while 2 * (tail + math.comb(count, cut + 1) * 0.5**count) <= 1 - CONFIDENCE:
        cut += 1
        tail += math.comb(count, cut) * 0.5**count
    return Ratio(float(np.median(ordered)), ordered[cut], ordered[-1 - cut])


def median_ratio(first: Sequence[float], second: Sequence[float]) -> Ratio:
    """Returns the ratio of the medians of two series, second / first, with a 95 % interval: 1.96 standard errors of the
    logarithms' medians, by their median distances from them, added in squares.
    """
    logs = [np.log(np.asarray(series, dtype=np.float64)) for series in (first, second)]
    centers = [float(np.median(series)) for series in logs]
    errors = [
        1.2533 * 1.4826 * float(np.median(np.abs(series - center))) / math.sqrt(len(series))
        for series, center in zip(logs, centers, strict=True)
    ]
    width, center = 1.959964 * math.hypot(*errors), centers[1] - centers[0]
    return Ratio(math.exp(center), math.exp(center - width), math.exp(center + width))


def _noise_in_place(curve: Curve, value: float, axis: str) -> float:
    """Returns by how much two deviations of the values move the logarithm of the place where a curve reaches a value.
    It is half of the way between reaching it two deviations above and two below.
    """
    noise = 2 * noise_of(curve)
    fit = falling_fit(curve.values)
    early = reach(curve, min(value + noise, float(fit[0])), axis)
    late = reach(curve, value - noise, axis)
    middle = reach(curve, value, axis)
    if not early or not middle:
        return 0.0
    if late is None:  # the curve ends before: the slope on the other side is used
        return math.log(middle / early)
    return math.log(late / early) / 2


def _welch_freedom(variances: Sequence[float], counts: Sequence[int]) -> float:
    total = sum(variances)
    parts = sum(variance**2 / (count - 1) for variance, count in zip(variances, counts, strict=True))
    return total**2 / parts if parts else float(sum(counts) - 2)


def student_95(freedom: float) -> float:
    """Returns the two-sided 95 % quantile of Student's t, up to 15 degrees of freedom of the next lower whole number.
    Above it is the first terms of the expansion around the normal quantile (Abramowitz and Stegun 26.7.5).
    """
    if freedom < len(_T95) + 1:
        return _T95[max(1, int(freedom)) - 1]
    z = 1.959964
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def overall_verdict(ratios: dict[str, Ratio | None]) -> str:
    """Returns the verdict over all axes: "better" only if better on each of them; else which axes say what."""
    verdicts = {axis: ratio.verdict if ratio else "cannot tell" for axis, ratio in ratios.items()}
    if len(set(verdicts.values())) == 1:
        return next(iter(verdicts.values()))
    by_verdict = {
        word: [axis for axis, verdict in verdicts.items() if verdict == word]
        for word in ("worse", "cannot tell", "better")
    }
    overall = "worse" if by_verdict["worse"] and not by_verdict["better"] else "cannot tell"
    each = "; ".join(f"{word} on {', '.join(axes)}" for word, axes in by_verdict.items() if axes)
    return f"{overall}: {each}"
