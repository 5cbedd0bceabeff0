"""Fits through the trials of a sweep: where a setting is best, with its interval, and how that place moves. Pure."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from megachat.studies.curves import student_95
from megachat.studies.space import Dimension, contexts, is_number


class Optimum(NamedTuple):
    """The lowest point of a quadratic in the logarithm of a setting, and its 95 % interval (None: not bounded)."""

    value: float
    low: float | None
    high: float | None
    points: int


def fit_optimum(values: Sequence[float], results: Sequence[float]) -> Optimum | None:
    """Returns where a parabola through (log value, result) is lowest.

    The interval is that of the delta method with the residuals' deviation. None with fewer than four points or three
    different values, for values not above 0, or for a parabola without a lowest point inside or near the range.
    """
    if len(values) < 4 or len(set(values)) < 3 or min(values) <= 0:
        return None
    x = np.log(np.array(values, dtype=np.float64))
    center = x.mean()
    design = np.stack([(x - center) ** 2, x - center, np.ones_like(x)], 1)
    y = np.array(results, dtype=np.float64)
    fit, *_ = np.linalg.lstsq(design, y, rcond=None)
    a, b, _ = fit
    if a <= 0:
        return None
    lowest = -b / (2 * a)
    if not x.min() - center - 1 <= lowest <= x.max() - center + 1:
        return None
    freedom = len(values) - 3
    residual = y - design @ fit
    covariance = np.linalg.inv(design.T @ design) * float(residual @ residual) / freedom
    slope = np.array([b / (2 * a * a), -1 / (2 * a), 0.0])
    width = student_95(freedom) * math.sqrt(float(slope @ covariance @ slope))
    bounded = width < x.max() - x.min()
    low, high = (math.exp(center + lowest + sign * width) if bounded else None for sign in (-1, 1))
    return Optimum(math.exp(center + lowest), low, high, len(values))


def parabola(values: Sequence[float], results: Sequence[float]) -> tuple[list[float], list[float]]:
    """Returns 50 points of the curve that `fit_optimum` fits, over the values' range."""
    x = np.log(np.array(values, dtype=np.float64))
    places = np.linspace(x.min(), x.max(), 50)
    curve = np.polyval(np.polyfit(x - x.mean(), results, 2), places - x.mean())
    return np.exp(places).tolist(), curve.tolist()


def optima(rows: Sequence[Mapping[str, Any]], space: Sequence[Dimension]) -> list[dict[str, Any]]:
    """Returns the fitted optimum of each numeric setting, for each combination of the other settings; of sizes only
    where nothing else varies (see space.contexts).
    """
    fitted, sizes = [], contexts(space)[0].keys()
    ended = [row for row in rows if row["bpb"] is not None and row["verdict"] != "ended early"]
    for dimension in space:
        if dimension.key in sizes:
            continue
        others: dict[str, list[Mapping[str, Any]]] = {}
        for row in ended:
            rest = json.dumps({key: value for key, value in row["values"].items() if key != dimension.key})
            others.setdefault(rest, []).append(row)
        for rest, group in others.items():
            points = [(row["values"][dimension.key], last) for row in group for last in row["seeds"] or [row["bpb"]]]
            if not all(is_number(value) for value, _ in points):
                continue
            if optimum := fit_optimum([value for value, _ in points], [last for _, last in points]):
                fitted.append({"key": dimension.key, "others": json.loads(rest), **optimum._asdict()})
    return fitted


def power_laws(fits: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns how the optimum of a setting moves with another one, by a line through the logarithms of three optima or
    more: {"key", "with", "exponent", "low", "high", "points"}. low, high: the exponent's interval, which follows from
    those of the optima; None if one of them is not bounded.
    """
    laws = []
    for key in dict.fromkeys(fit["key"] for fit in fits):
        mine = [fit for fit in fits if fit["key"] == key and len(fit["others"]) == 1]
        for other in {name for fit in mine for name in fit["others"]}:
            points = [(fit["others"][other], fit["value"]) for fit in mine if other in fit["others"]]
            numbers = [x for x, _ in points if is_number(x) and x > 0]
            if len(set(numbers)) >= 3 and len(numbers) == len(points):
                logs = np.log(np.array(points, dtype=np.float64))
                exponent = float(np.polyfit(logs[:, 0], logs[:, 1], 1)[0])
                law = {"key": key, "with": other, "exponent": exponent, "low": None, "high": None}
                if all(fit["low"] for fit in mine):
                    away = logs[:, 0] - logs[:, 0].mean()
                    widths = np.array([math.log(fit["high"] / fit["low"]) / 2 for fit in mine])
                    width = float(np.linalg.norm(away * widths) / (away @ away))
                    law |= {"low": exponent - width, "high": exponent + width}
                laws.append(law | {"points": len(points)})
    return laws
