"""Draws validation curves of several variants against steps, seconds and FLOPs, with error bars."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megachat.studies.sweep_picture import saved_figure

Axis = tuple[str, Callable[[str, Mapping], float]]  # label, and (variant, point of its curve) -> place


def axes_of(variants: Mapping[str, Mapping]) -> list[Axis]:
    """Returns the horizontal axes: steps, seconds if they were measured, and FLOPs."""
    axes: list[Axis] = [("steps", lambda _, point: point["step"])]
    if all("step_s" in variant for variant in variants.values()):
        axes.append(("seconds of training steps", lambda name, point: point["step"] * variants[name]["step_s"]))
    return [*axes, ("training FLOPs, 10^12", lambda _, point: point["flops"] / 1e12)]


def draw_curves(path: Path, title: str, variants: Mapping[str, Mapping]) -> None:
    """Draws a panel for each axis. Raises UserError without matplotlib, and if the file cannot be written.

    variants: name -> {"curve": [{"step", "flops", "bpb", "error"}]} and, if timed, "step_s".
    """
    axes = axes_of(variants)
    with saved_figure(path, len(axes), title) as panels:
        plot_curves(panels, variants)


def plot_curves(panels: Sequence[Any], variants: Mapping[str, Mapping]) -> None:
    """Plots all variants into matplotlib's axes, one for each of `axes_of`. The first point of each curve is left out:
    it would hide the differences at the end."""
    for panel, (label, value) in zip(panels, axes_of(variants), strict=True):
        for number, (name, variant) in enumerate(variants.items()):
            points = variant["curve"][1:]
            panel.errorbar(
                [value(name, point) for point in points],
                [point["bpb"] for point in points],
                [point["error"] or 0 for point in points],
                label=name,
                linestyle="-" if number < 10 else "--",  # matplotlib's colors repeat
            )
        panel.set(xlabel=label, ylabel="bits per byte")
    panels[-1].legend(fontsize="small", frameon=False)
