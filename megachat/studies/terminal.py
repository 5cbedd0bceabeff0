"""A run as lines of text for a terminal. The only module that imports plotext."""

import time

from megachat.errors import UserError
from megachat.studies.runs import RunRecord, run_row
from megachat.studies.space import is_number

_NEWEST = ("val/bpb", "train/loss", "train/grad_norm", "train/lrm", "train/tok_per_sec", "train/mfu", "core_metric")


def run_lines(run: RunRecord, metric: str, *, width: int, height: int) -> list[str]:
    """Returns a heading, the curve of the metric over steps, and the newest value of each metric.

    width, height: characters and lines of the terminal. Raises UserError for a metric that no line has.
    """
    row, points = run_row(run), [(line["step"], line[metric]) for line in run.lines_with(metric)]
    known = sorted({key for line in run.lines for key, value in line.items() if is_number(value)} - {"step"})
    if not points and run.lines and metric != "val/bpb":
        raise UserError(f"{run.folder} has no {metric}: it has {', '.join(known)}")
    steps = row["steps"] or 0
    share = f" ({100 * row['step'] / steps:.1f} %)" if steps else ""
    head = f"{run.folder.name}: {run.state}, step {row['step']:,} of {steps:,}{share}, {row['layout']}"
    newest = {key: value for line in run.lines for key, value in line.items() if key in _NEWEST and is_number(value)}
    values = "  ".join(f"{key} {value:,.6g}" for key, value in newest.items())
    stamp = f"{time.strftime('%H:%M:%S')}  {values}"
    if len(points) < 2:
        return [head, f"{len(points)} values of {metric} so far: the curve begins with the second", stamp]
    return [head, *_plot(points, metric, width, max(8, height - 6)), stamp]


def _plot(points: list[tuple[int, float]], metric: str, width: int, height: int) -> list[str]:
    try:
        import plotext
    except ImportError:
        raise UserError("watch needs plotext, which is not installed: pip install 'megachat[report]'") from None
    plotext.clear_figure()
    plotext.plotsize(width, height)
    plotext.theme("clear")
    plotext.plot(*zip(*points, strict=True), marker="braille")
    plotext.title(metric)
    first, last = points[0][0], points[-1][0]
    ticks = sorted({first + (last - first) * part // 4 for part in range(5)})
    plotext.xticks(ticks, [f"{tick:,}" for tick in ticks])
    plotext.xlabel("step")
    return plotext.uncolorize(plotext.build()).splitlines()
