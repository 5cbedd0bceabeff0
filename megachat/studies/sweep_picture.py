"""Pictures of a sweep and of a learning-rate range test, drawn by matplotlib. The only module of studies that imports
it.
"""

import contextlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megachat.errors import UserError
from megachat.studies.fits import parabola
from megachat.studies.space import Dimension, contexts, is_number

_MOST_LINES = 8  # with more combinations of the other settings, their points have one color


def import_figure() -> Any:
    """Returns matplotlib's Figure. Raises UserError where it is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("pictures need matplotlib, which is not installed: pip install 'megachat[sweep]'") from None
    return Figure


def draw_sweep(result: Mapping[str, Any], space: Sequence[Dimension], path: Path) -> None:
    """Draws bits per byte against each setting, one color for each combination of the others, with the fitted parabola
    and its optimum, and a panel for each power law. result: what `megachat sweep` writes to sweep.json.
    """
    sizes = contexts(space)[0].keys()
    space = [dimension for dimension in space if dimension.key not in sizes]
    panels = len(space) + len(result["power_laws"])
    title = "bits per byte against each setting; bars: 95 % interval of the optimum"
    with saved_figure(path, panels, title) as all_axes:
        for dimension, axes in zip(space, all_axes, strict=False):
            _draw_setting(axes, dimension, result)
        for law, axes in zip(result["power_laws"], all_axes[len(space) :], strict=True):
            _draw_law(axes, law, result["optima"])


def draw_range_test(result: Mapping[str, Any], path: Path) -> None:
    """Draws the loss of each step against the factor of the rates, smoothed, with the three places that it gives."""
    with saved_figure(path, 1, "learning-rate range test: a guess, unreliable for transformers") as (axes,):
        factors, losses, smooth = zip(*result["points"], strict=True)
        axes.plot(factors, losses, ".", color="gray", markersize=3, label="loss of a step")
        axes.plot(factors, smooth, color="C0", label="smoothed")
        for number, name in enumerate(("steepest", "lowest", "diverged"), 1):
            if result[name]:
                axes.axvline(result[name], color=f"C{number}", linestyle="--", label=f"{name}: {result[name]:.3g}")
        axes.set(xscale="log", xlabel="factor of the rates", ylabel="training loss (nats)")
        axes.legend(fontsize="small", frameon=False)


@contextlib.contextmanager
def saved_figure(path: Path, panels: int, title: str) -> Iterator[list[Any]]:
    """Yields the axes of a figure, from left to right, and saves it at the end of the block. Raises UserError."""
    figure = import_figure()(figsize=(4.6 * panels, 3.8), layout="constrained")
    all_axes = list(figure.subplots(1, panels, squeeze=False)[0])
    for axes in all_axes:
        axes.spines[["top", "right"]].set_visible(False)
    yield all_axes
    figure.suptitle(title, fontsize="medium")
    try:
        figure.savefig(path, dpi=120, metadata={"Date": None} if path.suffix == ".svg" else None)
    except (OSError, ValueError) as error:
        raise UserError(f"the picture {path} cannot be written ({error})") from None


def _grouped_rows(rows: Sequence[Mapping[str, Any]], key: str) -> dict[str, list[Mapping[str, Any]]]:
    """Returns the rows with a result by the values of the other settings, as text."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["bpb"] is not None:
            others = {name: value for name, value in row["values"].items() if name != key}
            groups.setdefault(_settings_text(others), []).append(row)
    return groups if len(groups) <= _MOST_LINES else {"": [row for group in groups.values() for row in group]}


def _settings_text(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name.split('.')[-1]}={json.dumps(value)}" for name, value in sorted(values.items()))


def _draw_setting(axes: Any, dimension: Dimension, result: Mapping[str, Any]) -> None:
    fits = {_settings_text(fit["others"]): fit for fit in result["optima"] if fit["key"] == dimension.key}
    numeric = True
    for number, (name, group) in enumerate(sorted(_grouped_rows(result["trials"], dimension.key).items())):
        color = f"C{number}"
        points = [(row["values"][dimension.key], last) for row in group for last in row["seeds"] or [row["bpb"]]]
        numeric = all(is_number(value) for value, _ in points)
        x = [value if numeric else json.dumps(value) for value, _ in points]
        axes.plot(x, [last for _, last in points], "o", color=color, markersize=4, label=name or None)
        if name in fits:
            fit = fits[name]
            line = parabola([value for value, _ in points], [last for _, last in points])
            axes.plot(line[0], line[1], "-", color=color, linewidth=1)
            if fit["low"]:
                lowest = min(line[1])
                axes.plot([fit["low"], fit["high"]], [lowest, lowest], "|-", color=color, linewidth=3, alpha=0.5)
    if result["baselines"][0]["context"] == {}:
        base = result["baselines"][0]
        limits = (base["mean"] - 2 * base["deviation"], base["mean"] + 2 * base["deviation"])
        axes.axhspan(*limits, color="gray", alpha=0.25, linewidth=0, label="baseline, 2 deviations")
    if numeric and _needs_log_axis([row["values"][dimension.key] for row in result["trials"]]):
        axes.set_xscale("log")
    axes.set(xlabel=dimension.key, ylabel="bits per byte")
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize="small", frameon=False)


def _needs_log_axis(values: Sequence[float]) -> bool:
    return min(values) > 0 and max(values) / min(values) >= 8


def _draw_law(axes: Any, law: Mapping[str, Any], fits: Sequence[Mapping[str, Any]]) -> None:
    mine = [fit for fit in fits if fit["key"] == law["key"] and list(fit["others"]) == [law["with"]]]
    for fit in mine:
        place = fit["others"][law["with"]]
        axes.plot([place], [fit["value"]], "o", color="C0")
        if fit["low"]:
            axes.plot([place, place], [fit["low"], fit["high"]], "_-", color="C0", alpha=0.5)
    places = sorted(fit["others"][law["with"]] for fit in mine)
    logs = [sum(math.log(value) for value in values) / len(mine) for values in (places, [fit["value"] for fit in mine])]
    line = [math.exp(logs[1] + law["exponent"] * (math.log(place) - logs[0])) for place in places]
    axes.plot(places, line, "--", color="gray", label=f"exponent {law['exponent']:.2f}")
    axes.set(xscale="log", yscale="log", xlabel=law["with"], ylabel=f"best {law['key']}")
    axes.legend(fontsize="small", frameon=False)
