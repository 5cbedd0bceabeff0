"""A run as one HTML file that opens without a network: summary, curves on three axes, steps, layout, CORE, samples,
environment; with a second run also the comparison.
"""

import html
import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from megachat.activity import duration
from megachat.errors import UserError, summary
from megachat.evals.results import CORE_COLUMNS, core_lines, core_rows, find_newest_results, load_results
from megachat.files import REPORT_NAME, SAMPLES, list_folder, write_atomically
from megachat.planning.memory import MEMORY_USES
from megachat.studies.comparison import compare_curves, curve_lines
from megachat.studies.predicted import Predicted, predicted_run_rows, try_predict, wall_clock
from megachat.studies.report_figures import (
    bar_figure,
    curve_figure,
    layout_figure,
    memory_figure,
    owner_figure,
    plotly_script,
    ranks_figure,
    step_figure,
)
from megachat.studies.runs import RunRecord, flat_config, load_run, newest_facts, read_starts, run_row, state_text
from megachat.text import plural

_STYLE = """
:root { color-scheme: light }
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1080px; margin: 0 auto; padding: 1rem }
h1 { font-size: 1.5rem; margin: 0 0 .2rem }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; border-bottom: 1px solid #ddd }
table { border-collapse: collapse; margin: .5rem 0; max-width: 100%; display: block; overflow-x: auto }
td, th { padding: .2rem .8rem .2rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid #eee }
td { overflow-wrap: anywhere }
td:first-child { white-space: nowrap; overflow-wrap: normal }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums }
pre { white-space: pre-wrap; background: #f6f6f6; padding: .6rem; border-radius: 4px; overflow-wrap: anywhere }
.warning { color: #8a4b00 }
.figures { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 480px), 1fr)) }
.figures > div { min-width: 0 }
@media print {
  .figures { display: block } h2 { break-after: avoid } .plot { break-inside: avoid }
  .updatemenu-container { display: none }
}
"""


_TERMS = (
    "Bits per byte: what the model needs to encode a byte of the validation text; lower is better. CORE: mean score "
    "over 22 tasks; 0 is guessing, 1 is perfect. MFU: the share of the device's peak FLOPs that the model uses."
)
_SAMPLES = 20  # earlier steps whose samples are shown


def write_report(
    run: RunRecord,
    out: Path,
    against: RunRecord | None = None,
    *,
    probe: Path | None = None,
    price: float | None = None,
) -> int:
    """Writes the report and returns its size in bytes. Raises UserError without plotly, or for a run without steps.

    probe: a file of `megachat probe`, to predict the run's time. price: of a GPU-hour, on a CPU of the machine's hour.
    """
    text = report_html(run, against, probe, price)
    write_atomically(out, text.encode())
    return len(text.encode())


def report_line(folder: Path) -> str:
    """Writes the report of a run that has ended, and returns a line for its log; whatever goes wrong is in the line."""
    try:
        size = write_report(load_run(folder), folder / REPORT_NAME)
        return f"wrote {folder / REPORT_NAME}, {size / 1e6:.1f} MB"
    except Exception as error:  # the training is done: a picture of it must not fail the job
        return f"{folder / REPORT_NAME} is not written ({summary(error)}): `megachat report {folder}` tries again"


def report_html(
    run: RunRecord, against: RunRecord | None = None, probe: Path | None = None, price: float | None = None
) -> str:
    """Returns the page; see `write_report`."""
    if not run.lines:
        raise UserError(f"{run.folder} has no recorded step: train first")
    runs = [run] if against is None else [run, against]
    name = html.escape(" against ".join(each.folder.name for each in runs))
    predicted, why = try_predict(run, probe)
    parameters = {kind: count for kind, count in run.plan.get("parameters", {}).items() if kind != "total"}
    title = f"Parameters by kind, {sum(parameters.values()):,} in all"
    sections = [
        _section("Summary", _summary(runs)),
        *([_section("Comparison", _comparison_section(run, against))] if against else []),
        _section("Curves", _figures(_curve_figures(runs))),
        _section("Predicted and measured", _predicted(run, predicted, why, price)),
        _section("Time", _figures(_times(run, predicted)) + _saves(run)),
        _section("Layout and parameters", _figures([*_layouts(run, predicted), bar_figure(title, parameters)])),
        _section("CORE", "".join(map(_core_section, runs))),
        _section("Samples", _samples(run)),
        _section("Settings that differ from the defaults", _settings_section(runs)),
        _section("Environment", _environment(run)),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{name}</title><style>{_STYLE}</style>'
        f"<script>{plotly_script()}</script></head><body>\n<h1>{name}</h1>\n"
        + "\n".join(sections)
        + f"\n<script>{_RESIZE}</script>\n</body></html>\n"
    )


def _section(title: str, body: str) -> str:
    return f"<h2>{html.escape(title)}</h2>\n{body}" if body else ""


def _html_table(rows: Iterable[Sequence[object]], *, head: Sequence[str] = (), right: Iterable[int] = ()) -> str:
    right = set(right)

    def line(cells: Sequence[object], tag: str) -> str:
        each = (
            f"<{tag}{' class=number' if number in right else ''}>{html.escape(str(cell))}</{tag}>"
            for number, cell in enumerate(cells)
        )
        return f"<tr>{''.join(each)}</tr>"

    return f"<table>{line(head, 'th') if head else ''}{''.join(line(row, 'td') for row in rows)}</table>"


def _figures(figures: Iterable[Any]) -> str:
    drawn = [
        f'<div class="plot">{figure.to_html(full_html=False, include_plotlyjs=False, config=_CONFIG)}</div>'
        for figure in figures
        if figure is not None
    ]
    return f'<div class="figures">{"".join(drawn)}</div>' if drawn else ""


# A figure is drawn before the figures beside it are there, with the width of all of them.
_RESIZE = "addEventListener('load', () => document.querySelectorAll('.js-plotly-plot').forEach(Plotly.Plots.resize))"
_CONFIG = {"responsive": True, "displaylogo": False, "displayModeBar": False}


def _curve_figures(runs: Sequence[RunRecord]) -> list[Any]:
    smooth = any(line.get("train/loss_raw") is not None for run in runs for line in run.lines)  # older runs: the step's
    wanted = (
        ("val/bpb", "Validation, bits per byte"),
        ("train/loss", "Training loss, moving average (nats)" if smooth else "Training loss (nats)"),
        ("train/lrm", "Learning-rate multiplier"),
        ("train/grad_norm", "Norm of the gradient"),
        ("train/mfu", "Model FLOPs utilization (%)"),
    )
    return [curve_figure(runs, key, title) for key, title in wanted]


def _summary(runs: Sequence[RunRecord]) -> str:
    """Returns a table with one column per run, without the rows that no run has a value for."""
    columns = [_summary_column(run) for run in runs]
    rows = [(name, *(column[name] for column in columns)) for name in columns[0]]
    notes = "".join(f'<p class="warning">{html.escape(note)}</p>' for run in runs for note in run.notes)
    return _html_table(row for row in rows if any(row[1:])) + f"<p>{_TERMS}</p>" + notes


def _summary_column(run: RunRecord) -> dict[str, str]:
    """Returns the text of each row of the summary; "" where the run has no such value."""
    row, bpb = run_row(run), run.values("val/bpb")
    peaks, step_times = run.values("train/peak_memory_bytes"), run.values("train/dt")
    return {
        "run folder": str(run.folder),
        "state": state_text(run),
        "steps": f"{row['step']:,} of {row['steps'] or 0:,}",
        "bits per byte": f"{bpb[0]:.4f} to {bpb[-1]:.4f}, lowest {min(bpb):.4f}" if bpb else "not evaluated",
        "CORE": "not evaluated" if row["core"] is None else f"{row['core']:.4f}",
        "tokens": f"{row['tokens'] or 0:,}",
        "training time": "" if row["hours"] is None else f"{duration(3600 * row['hours'])} after step 10",
        "time per step": f"median {1000 * statistics.median(step_times):,.0f} ms" if step_times else "",
        "MFU": "not known for this device" if row["mfu"] is None else f"mean {row['mfu']:.1f} %",
        "peak memory": f"{max(peaks) / 1e9:.2f} GB on a rank" if peaks else "",
        "layout": row["layout"],
        "documents read": _ledger(run),
    }


def _ledger(run: RunRecord) -> str:
    facts = newest_facts(run.folder)
    if not facts.get("ledger"):
        return ""
    return f"{facts['ledger'][:16]} at step {facts['step']:,}: runs with the same one read the same documents in order"


def _comparison_section(run: RunRecord, against: RunRecord) -> str:
    try:
        lines = curve_lines(compare_curves([against], [run]))
    except UserError as error:
        lines = [str(error)]
    return f"<pre>{html.escape(chr(10).join(lines))}</pre>"


def _predicted(run: RunRecord, predicted: Predicted | None, why: str, price: float | None) -> str:
    if predicted is None:
        return f'<p class="warning">{html.escape(why)}</p>'
    steps, peaks = run.values("train/dt"), run.values("train/peak_memory_bytes")
    rows = predicted_run_rows(predicted, run, statistics.median(steps) if steps else None, price)
    origin = f"time by the {predicted.source}" if predicted.time else f"time {predicted.source}"
    uses = [{use: getattr(stage, use) for use in MEMORY_USES} for stage in predicted.memory]
    figure = memory_figure(uses, max(peaks) if peaks and predicted.on_gpu else None)
    process = "" if predicted.on_gpu else " The measured memory is the whole process's, with python and torch."
    text = f"<p>Memory is counted from config and layout; {html.escape(origin)}.{process}</p>"
    return (
        _html_table(rows, head=("", "predicted", "measured", "difference"), right=(1, 2, 3)) + text + _figures([figure])
    )


def _times(run: RunRecord, predicted: Predicted | None) -> list[Any]:
    spent = wall_clock(run.lines, read_starts(run.folder))
    title = f"Wall clock, {duration(sum(spent.values()))} in all"
    figures = [step_figure(run), bar_figure(title, spent, "s"), ranks_figure(run)]
    if predicted and predicted.time:
        parts = {name: 1000 * seconds for name, seconds in predicted.time.step.parts.items() if seconds}
        figures.append(bar_figure("A step by part, predicted, not measured", parts, "ms"))
    return figures


def _layouts(run: RunRecord, predicted: Predicted | None) -> list[Any]:
    plan = dict(run.plan)
    if "stages" not in plan:
        return []
    owners = owner_figure(predicted.owners, plan["layout"], plan["stages"][-1][1]) if predicted else None
    return [layout_figure(plan), owners]


def _saves(run: RunRecord) -> str:
    blocked, total = run.values("checkpoint/blocked_s"), run.values("checkpoint/total_s")
    if not blocked:
        return ""
    return (
        f"<p>{plural(len(blocked), 'checkpoint')}, each of which blocked the training for "
        f"{statistics.median(blocked):.3f} s (median; longest {max(blocked):.3f} s) and was written in "
        f"{statistics.median(total):.2f} s.</p>"
    )


def _core_section(run: RunRecord) -> str:
    try:
        if (newest := find_newest_results(run.folder)) is None:
            return ""
        section = load_results(newest)["core"]
    except UserError as error:
        return f'<p class="warning">{html.escape(str(error))}</p>'
    lines = "".join(f"<p>{html.escape(line)}</p>" for line in core_lines(section))
    return _html_table(core_rows(section), head=(run.folder.name, *CORE_COLUMNS), right=range(1, 5)) + lines


def _samples(run: RunRecord) -> str:
    """Returns the newest samples, and those of earlier steps below, folded."""
    pages = []
    for path in (path for path in list_folder(run.folder / SAMPLES) if path.suffix == ".json"):
        try:
            texts: Mapping[str, str] = json.loads(path.read_bytes())
            each = "".join(f"<pre>{html.escape(text)}</pre>" for text in texts.values())
        except (OSError, ValueError, AttributeError, TypeError):
            each = f'<p class="warning">{html.escape(path.name)} cannot be read</p>'
        pages.append((html.escape(path.stem.replace("step_", "step ")), each))
    if not pages:
        return ""
    *earlier, (title, newest) = pages
    folded = "".join(f"<details><summary>{name}</summary>{each}</details>" for name, each in earlier[-_SAMPLES:])
    return f"<p>{title}</p>{newest}{folded}"


def _settings_section(runs: Sequence[RunRecord]) -> str:
    flat = [flat_config(run.config) for run in runs]
    rows = [
        (key, *(json.dumps(settings[key]) if key in settings else "default" for settings in flat))
        for key in sorted({key for settings in flat for key in settings})
    ]
    return _html_table(rows, head=("setting", *(run.folder.name for run in runs)))


def _environment(run: RunRecord) -> str:
    starts = read_starts(run.folder)
    if not starts:
        return '<p class="warning">environment.json cannot be read</p>'
    newest = starts[-1]
    diff = newest.pop("diff", None)
    rows = [(_FACT_LABELS.get(key, key.replace("_", " ")), _fact_text(key, value)) for key, value in newest.items()]
    text = f"<p>{plural(len(starts), 'start')}; the last:</p>{_html_table(row for row in rows if row[1])}"
    if diff:
        text += f"<details><summary>uncommitted changes</summary><pre>{html.escape(str(diff))}</pre></details>"
    return text


def _value_text(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(
            f"{key.replace('_', ' ')} {_value_text(each)}" for key, each in value.items() if each is not None
        )
    if isinstance(value, bool):
        return "yes" if value else "no"
    return " ".join(map(str, value)) if isinstance(value, list) else "" if value is None else str(value)


def _fact_text(key: str, value: Any) -> str:
    try:
        return _FACT_TEXTS.get(key, _value_text)(value)
    except (AttributeError, LookupError, TypeError, ValueError):  # of another version, or edited
        return _value_text(value)


def _tokenizer_text(value: Mapping[str, Any]) -> str:
    text = f"{value.get('vocab_size') or 0:,} tokens, fingerprint {str(value.get('fingerprint'))[:12]}"
    origin = value.get("origin") or {}
    shards = f" in {len(origin['shards'])} shards" if origin.get("shards") else ""
    chars = f", trained on up to {origin['max_chars']:,} characters{shards}" if "max_chars" in origin else ""
    return text + chars + (f", imported from {origin['imported_from']}" if "imported_from" in origin else "")


def _data(value: Mapping[str, Any]) -> str:
    shards = list(value.get("shards") or {})
    parts = [f"{value.get('folder')}, from {value.get('source')}"]
    if shards:
        parts.append(f"{plural(len(shards) - 1, 'train shard')} and {shards[-1]} for validation")
    return "; ".join(parts)


def _launch_text(value: Mapping[str, Any]) -> str:
    world, local = value.get("world_size") or 1, value.get("local_size") or 1
    hosts = f" on hosts of {local}" if local < world else ""
    restart = f", restarted {plural(value['attempt'], 'time')}" if value.get("attempt") else ""
    return f"{plural(world, 'rank')}{hosts}, started by {value.get('launcher')}{restart}"


def _time(value: float) -> str:
    return datetime.fromtimestamp(value, timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")


_FACT_LABELS = {"time": "started", "device_count": "GPUs of this host", "commit": "commit of megachat"}
_FACT_TEXTS: Mapping[str, Callable[[Any], str]] = {
    "time": _time,
    "tokenizer": _tokenizer_text,
    "data": _data,
    "launch": _launch_text,
    "compute_dtype": lambda value: str(value).removeprefix("torch."),
}
