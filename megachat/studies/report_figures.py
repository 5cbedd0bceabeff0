"""Figures of a report, drawn by plotly. The only module that imports it."""

import statistics
from collections.abc import Sequence
from typing import Any

from megachat.errors import UserError
from megachat.studies.curves import AXES
from megachat.studies.runs import RunRecord

_COLORS = ("#2563a8", "#c2571a")  # told apart in gray and by color-blind readers
_LABELS = {"steps": "step", "seconds": "training time (s)", "flops": "training FLOPs"}
_KEYS = {"steps": "step", "seconds": "total_training_time", "flops": "total_training_flops"}


def import_plotly() -> Any:
    """Returns plotly.graph_objects. Raises UserError where plotly is not installed."""
    try:
        import plotly.graph_objects
    except ImportError:
        raise UserError("reports need plotly, which is not installed: pip install 'megachat[report]'") from None
    return plotly.graph_objects


def plotly_script() -> str:
    """Returns the source of plotly.js, so that a report needs no network."""
    import plotly.offline

    return plotly.offline.get_plotlyjs()


def curve_figure(runs: Sequence[RunRecord], key: str, title: str) -> Any:
    """Returns a metric of the runs over steps, with buttons for the other axes; None if no run has two values."""
    go = import_plotly()
    figure, shown = go.Figure(), []
    for run, color in zip(runs, _COLORS, strict=False):
        lines = [line for line in run.lines if isinstance(line.get(key), int | float) and _KEYS["seconds"] in line]
        if len(lines) < 2:
            continue
        axes = {axis: [line[_KEYS[axis]] for line in lines] for axis in AXES}
        shown.append(axes)
        mode = "lines+markers" if len(lines) < 60 else "lines"
        figure.add_scatter(
            x=axes["steps"], y=[line[key] for line in lines], name=run.folder.name, mode=mode, line={"color": color}
        )
    if not shown:
        return None
    buttons = [
        {
            "label": {"steps": "steps", "seconds": "time", "flops": "FLOPs"}[axis],
            "method": "update",
            "args": [{"x": [axes[axis] for axes in shown]}, {"xaxis.title.text": _LABELS[axis]}],
        }
        for axis in AXES
    ]
    menu = {"type": "buttons", "direction": "right", "buttons": buttons, "x": 1, "xanchor": "right", "y": 1.13}
    figure.update_layout(**_layout(title, _LABELS["steps"], ""), updatemenus=[menu | {"pad": {"r": 0, "t": 0}}])
    figure.update_layout(showlegend=len(shown) > 1)
    return figure


def step_figure(run: RunRecord) -> Any:
    """Returns the step times with the slow steps marked (above 1.5 medians); None without steps."""
    go = import_plotly()
    lines = [line for line in run.lines if isinstance(line.get("train/dt"), int | float)]
    if len(lines) < 2:
        return None
    median = statistics.median(line["train/dt"] for line in lines)
    figure = go.Figure()
    for name, color, slow in (("steps", _COLORS[0], False), ("above 1.5 medians", _COLORS[1], True)):
        some = [line for line in lines if (line["train/dt"] > 1.5 * median) == slow]
        if some:
            figure.add_scatter(
                x=[line["step"] for line in some],
                y=[1000 * line["train/dt"] for line in some],
                mode="markers",
                marker={"color": color, "size": 5},
                name=name,
            )
    figure.add_hline(y=1000 * median, line={"color": "#888", "dash": "dot"}, annotation_text="median")
    figure.update_layout(**_layout("Time per step", "step", "ms"))
    return figure


def parameter_figure(parameters: dict[str, int]) -> Any:
    """Returns bars of the parameters by kind."""
    go = import_plotly()
    kinds = {name: count for name, count in parameters.items() if name != "total" and count}
    names = sorted(kinds, key=lambda name: kinds[name])
    figure = go.Figure(go.Bar(x=[kinds[name] for name in names], y=names, orientation="h", marker_color=_COLORS[0]))
    figure.update_layout(**_layout(f"Parameters by kind, {sum(kinds.values()):,} together", "", ""))
    return figure


def layout_figure(plan: dict[str, Any]) -> Any:
    """Returns which layers each pipeline stage holds, and how many ranks share a stage."""
    go = import_plotly()
    stages, layout = plan["stages"], plan["layout"]
    ranks = layout["data"] * layout["tensor"]
    figure = go.Figure()
    for number, (first, last) in enumerate(stages):
        held = f"layers {first} to {last - 1}"
        figure.add_bar(
            x=[last - first],
            y=[f"stage {number}"],
            base=first,
            orientation="h",
            marker={"color": _COLORS[number % 2], "line": {"color": "white", "width": 1}},
            text=f"{held} on ranks {number * ranks} to {(number + 1) * ranks - 1}",
            textposition="inside",
            insidetextanchor="middle",
            hovertemplate=held + "<extra></extra>",
        )
    title = f"Layers by stage: data {layout['data']} x tensor {layout['tensor']} x pipeline {layout['pipeline']}"
    figure.update_layout(**_layout(title, "layer", ""), showlegend=False)
    figure.update_yaxes(autorange="reversed")
    return figure


def _layout(title: str, x: str, y: str) -> dict[str, Any]:
    return {
        "title": {"text": title, "x": 0, "xref": "paper", "y": 0.98, "yanchor": "top", "font": {"size": 15}},
        "xaxis": {"title": {"text": x}, "gridcolor": "#e5e5e5", "zeroline": False},
        "yaxis": {"title": {"text": y}, "gridcolor": "#e5e5e5", "zeroline": False, "automargin": True},
        "template": "none",
        "font": {"family": "system-ui, sans-serif", "size": 13, "color": "#222"},
        "margin": {"l": 50, "r": 10, "t": 70, "b": 45},
        "height": 350,
        "hovermode": "closest",
        "legend": {"orientation": "h", "y": -0.3},
    }
