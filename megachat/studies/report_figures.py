"""Figures of a report, drawn by plotly. The only module that imports it."""

import importlib.util
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from megachat.errors import UserError
from megachat.planning.layouts import describe_layout
from megachat.planning.plan import Layout
from megachat.settings import LogConfig
from megachat.studies.curves import AXES
from megachat.studies.runs import RunRecord

_COLORS = ("#2563a8", "#c2571a")  # differ in gray and for color-blind readers
_SHADES = ("#174a7c", "#2563a8", "#5b93d1", "#a9c8ea", "#c2571a", "#e9b18c")  # of parts of one bar
_MOST_POINTS = 1000  # of a curve, so that the report of a long run stays small
_MOST_RANKS = 64  # rows of a picture of the ranks
_AXIS_LABELS = {"steps": "step", "seconds": "training time (s)", "flops": "training FLOPs"}
_KEYS = {"steps": "step", "seconds": "total_training_time", "flops": "total_training_flops"}


_NO_PLOTLY = "plotly is not installed: pip install 'megachat[report]'"


def check_report(log: LogConfig) -> None:
    """Raises UserError when log.report is on but plotly is not installed. Nothing is imported."""
    if log.report and importlib.util.find_spec("plotly") is None:
        raise UserError(f"log.report is true, but {_NO_PLOTLY}, or set log.report=false")


def import_plotly() -> Any:
    """Returns plotly.graph_objects. Raises UserError where plotly is not installed."""
    try:
        import plotly.graph_objects
    except ImportError:
        raise UserError(f"reports need plotly, but {_NO_PLOTLY}") from None
    return plotly.graph_objects


def plotly_script() -> str:
    """Returns the source of plotly.js, so that a report needs no network."""
    import plotly.offline

    return plotly.offline.get_plotlyjs()


def thinned(lines: Sequence[dict], most: int = _MOST_POINTS) -> list[dict]:
    """Returns at most `most` of the lines at equal distances, with the first and the last."""
    if len(lines) <= most:
        return list(lines)
    return [lines[round(number * (len(lines) - 1) / (most - 1))] for number in range(most)]


def curve_figure(runs: Sequence[RunRecord], key: str, title: str) -> Any:
    """Returns a metric of the runs over steps, with buttons for the other axes; None if no run has two values."""
    go = import_plotly()
    figure, shown = go.Figure(), []
    for run, color in zip(runs, _COLORS, strict=False):
        lines = [line for line in run.lines_with(key) if _KEYS["seconds"] in line]
        if len(lines) < 2:
            continue
        lines = thinned(lines)
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
            "args": [{"x": [axes[axis] for axes in shown]}, {"xaxis.title.text": _AXIS_LABELS[axis]}],
        }
        for axis in AXES
    ]
    menu = {"type": "buttons", "direction": "right", "buttons": buttons, "x": 1, "xanchor": "right", "y": 1.13}
    figure.update_layout(**_layout(title, _AXIS_LABELS["steps"], ""), updatemenus=[menu | {"pad": {"r": 0, "t": 0}}])
    figure.update_layout(showlegend=len(shown) > 1)
    return figure


def step_figure(run: RunRecord) -> Any:
    """Returns the step times with the slow steps marked (above 1.5 medians); None without steps."""
    go = import_plotly()
    lines = run.lines_with("train/dt")
    if len(lines) < 2:
        return None
    median = statistics.median(line["train/dt"] for line in lines)
    figure = go.Figure()
    for name, color, slow in (("steps", _COLORS[0], False), ("above 1.5 medians", _COLORS[1], True)):
        some = thinned([line for line in lines if (line["train/dt"] > 1.5 * median) == slow])
        if some:
            figure.add_scatter(
                x=[line["step"] for line in some],
                y=[1000 * line["train/dt"] for line in some],
                mode="markers",
                marker={"color": color, "size": 5},
                name=name,
            )
    figure.add_hline(
        y=1000 * median, line={"color": "#888", "dash": "dot"}, annotation_text="median", annotation_position="top left"
    )
    figure.update_layout(**_layout("Time per step", "step", "ms"))
    return figure


def ranks_figure(run: RunRecord) -> Any:
    """Returns the ranks' work per step in each window of steps (ranks/work_s_*): the median rank and the 95th
    percentile, with the slowest rank under the pointer; None where no window is recorded."""
    lines = thinned([line for line in run.lines if "ranks/work_s_median" in line and "ranks/work_s_p95" in line])
    if not lines:
        return None
    go = import_plotly()
    figure = go.Figure()
    slowest = [[line.get(f"ranks/slowest{key}") for key in ("", "_host", "_ratio")] for line in lines]
    hover = "slowest: rank %{customdata[0]} on %{customdata[1]}, %{customdata[2]:.2f} times its stage's median"
    for name, key, color in (("median rank", "median", _COLORS[0]), ("95th percentile", "p95", _COLORS[1])):
        figure.add_scatter(
            x=[line["step"] for line in lines],
            y=[1000 * line[f"ranks/work_s_{key}"] for line in lines],
            name=name,
            mode="lines+markers",
            line={"color": color},
            customdata=slowest,
            hovertemplate=f"{name} %{{y:,.0f}} ms<br>{hover}<extra></extra>",
        )
    figure.update_layout(**_layout("Work of the ranks per step, without waiting", "step", "ms"))
    return figure


def bar_figure(title: str, values: Mapping[str, float], unit: str = "") -> Any:
    """Returns horizontal bars of named values, each with its value and share of the sum; None if there are none."""
    values = {name: value for name, value in values.items() if value}
    total = sum(values.values())
    if not values:
        return None
    go = import_plotly()
    names = sorted(values, key=lambda name: values[name])
    figure = go.Figure(
        go.Bar(
            x=[values[name] for name in names],
            y=names,
            orientation="h",
            marker_color=_COLORS[0],
            text=[f"{values[name] / total:.1%}" for name in names],
            textposition="auto",
            cliponaxis=False,
            hovertemplate="%{y}: %{x:,.4~r} " + unit + "<extra></extra>",
        )
    )
    figure.update_layout(**_layout(title, unit, "", bars=len(names)))
    return figure


def memory_figure(stages: Sequence[Mapping[str, int]], peak: float | None) -> Any:
    """Returns the predicted memory of the fullest rank of each stage by use, and rank 0's measured peak. stages: bytes
    by use."""
    go = import_plotly()
    figure = go.Figure()
    names = [f"stage {number}" if len(stages) > 1 else "rank" for number in range(len(stages))]
    for number, use in enumerate(stages[0]):
        figure.add_bar(
            x=[stage[use] / 1e9 for stage in stages],
            y=names,
            name=use,
            orientation="h",
            marker_color=_SHADES[number % len(_SHADES)],
            hovertemplate=use + ": %{x:.3f} GB<extra></extra>",
        )
    if peak:
        figure.add_vline(x=peak / 1e9, line={"color": "#222", "dash": "dot"})
        note = {"x": peak / 1e9, "y": 1, "yref": "paper", "yanchor": "bottom", "xanchor": "right", "showarrow": False}
        figure.add_annotation(**note, text="measured peak of rank 0")
    figure.update_layout(**_layout("Memory per rank, counted (GB)", "", "", bars=len(stages)), barmode="stack")
    figure.update_layout(legend={"orientation": "h", "traceorder": "normal", "y": -30 / (40 * len(stages)), "x": 0})
    figure.update_yaxes(autorange="reversed")
    return figure


def owner_figure(owners: Sequence[Any], layout: Mapping[str, int], layers: int) -> Any:
    """Returns ranks x layers: how many matrices each rank orthogonalizes in each layer, with their names under the
    pointer; None if there are none or more ranks than can be seen. owners: of the manifest, layers: embedding and head
    included."""
    world = Layout(**layout).world
    names: dict[tuple[int, int], list[str]] = {}
    for line in owners:
        if line.owner is not None:
            head, _, rest = line.name.removeprefix("transformer.h.").partition(".")
            layer = int(head) + 1 if head.isdecimal() else 0
            names.setdefault((line.owner, layer), []).append(rest if head.isdecimal() else line.name)
    if not names or world > _MOST_RANKS:
        return None
    go = import_plotly()
    cells = [[names.get((rank, layer), []) for layer in range(layers)] for rank in range(world)]
    figure = go.Figure(
        go.Heatmap(
            z=[[len(cell) or None for cell in row] for row in cells],
            customdata=[["<br>".join(cell) for cell in row] for row in cells],
            text=[[str(len(cell) or "") for cell in row] for row in cells],
            texttemplate="%{text}",
            hovertemplate="rank %{y}, layer %{x}<br>%{customdata}<extra></extra>",
            colorscale=[[0, "#dbe8f6"], [1, _COLORS[0]]],
            showscale=False,
            xgap=1,
            ygap=1,
            hoverongaps=False,
        )
    )
    title = "Matrices that each rank orthogonalizes, by layer"
    figure.update_layout(**_layout(title, "layer", "rank", bars=max(3, min(20, world))))
    figure.update_yaxes(autorange="reversed", dtick=max(1, world // 16), title_standoff=5)
    figure.update_xaxes(range=[-0.5, layers - 0.5], dtick=max(1, layers // 16))
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
    title = f"Layers by stage: {describe_layout(layout)}"
    figure.update_layout(**_layout(title, "layer", "", bars=len(stages)), showlegend=False)
    figure.update_yaxes(autorange="reversed")
    return figure


def _layout(title: str, x: str, y: str, *, bars: int = 0) -> dict[str, Any]:
    """Returns the layout of a figure. bars: horizontal bars that its height must fit; 0 for a curve."""
    top = 45 if bars else 70  # with the buttons of a curve
    return {
        "title": {"text": title, "x": 0, "xref": "paper", "y": 0.98, "yanchor": "top", "font": {"size": 15}},
        "xaxis": {"title": {"text": x}, "gridcolor": "#e5e5e5", "zeroline": False},
        "yaxis": {
            "title": {"text": y},
            "gridcolor": "#e5e5e5",
            "zeroline": False,
            "automargin": True,
            "ticksuffix": " ",
        },
        "template": "none",
        "font": {"family": "system-ui, sans-serif", "size": 13, "color": "#222"},
        "margin": {"l": 50, "r": 10, "t": top, "b": 45},
        "height": 105 + 40 * bars if bars else 350,
        "hovermode": "closest",
        "legend": {"orientation": "h", "y": -0.33},
    }
