"""List the runs of a folder: state, step, bits per byte, CORE, tokens, hours, MFU, layout, and what differs.

    megachat runs                                  the runs in runs/
    megachat runs runs --filter 'd4*' --filter state=finished --sort bpb
    megachat runs --clean                          what may be removed, with its size; asks before it removes

States: running (a job holds the folder), finished (all steps, or those until horizon.stop_step), stopped (the last step
is saved: `--resume auto` continues), crashed (steps after the newest checkpoint are lost), new (no step yet). It may be
used while runs train.
"""

import argparse
import json
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megachat.commands.options import Parser
from megachat.errors import UserError
from megachat.text import shortened, text_table

COLUMNS = ("name", "state", "step", "bpb", "core", "tokens", "hours", "mfu", "layout")


def add_arguments(parser: Parser) -> None:
    """Adds the options of `megachat runs`."""
    add = parser.add_argument
    add("folder", nargs="?", type=Path, default=Path("runs"), help="folder with run folders (default runs)")
    add("--sort", metavar="COLUMN", choices=COLUMNS, default="name", help=f"one of {', '.join(COLUMNS)}")
    filters = "only runs whose name matches a pattern, or KEY=VALUE of a column or a setting; repeatable"
    add("--filter", action="append", default=[], metavar="PATTERN", help=filters)
    add("--json", action="store_true", help="print JSON, with the settings that differ")
    add("--clean", action="store_true", help="list what may be removed, and ask for each kind")
    add("--yes", action="store_true", help="with --clean: remove everything listed without asking")


def run(options: argparse.Namespace) -> None:
    """Prints the table, or cleans."""
    from megachat.studies.runs import config_differences, filter_runs, find_leftovers, find_runs, run_row

    if options.yes and not options.clean:
        raise UserError("--yes belongs to --clean: add that")
    runs = filter_runs(find_runs(options.folder), options.filter)
    if options.clean:
        return _clean(find_leftovers(runs), as_json=options.json, yes=options.yes)
    differences = config_differences(runs)
    rows = [run_row(record) for record in runs]
    for number, row in enumerate(rows):
        row["settings"] = {key: values[number] for key, values in differences.items()}
    rows.sort(key=lambda row: (row[options.sort] is None, row[options.sort]))
    if options.json:
        return print(json.dumps(rows, indent=1))
    for line in _runs_table(rows):
        print(line)
    for note in (note for row in rows for note in row["notes"]):
        print(f"note: {note}")
    return None


def _runs_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    if not rows:
        return ["no run passes the filters"]
    formats = {"bpb": "{:.4f}", "core": "{:.4f}", "tokens": "{:,}", "hours": "{:.2f}", "mfu": "{:.1f}%"}
    shown = [name for name in COLUMNS if any(row[name] is not None for row in rows)]
    lines = [(*shown, "what differs")]
    for row in rows:
        cells = ["-" if row[name] is None else formats.get(name, "{}").format(row[name]) for name in shown]
        cells[shown.index("step")] = f"{row['step']}/{row['steps'] or '?'}"
        if row["state"] == "finished" and row["step"] < (row["steps"] or 0):
            cells[shown.index("state")] = "finished (stop_step)"
        settings = (f"{key}={json.dumps(value)}" for key, value in row["settings"].items() if value is not None)
        lines.append((*cells, " ".join(settings)))
    right = [number for number, name in enumerate(shown) if name not in ("name", "state", "layout")]
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    return [line[:width] for line in text_table(lines, right=right)]


def _list_by_folder(leftovers: Sequence[Any]) -> None:
    for folder in dict.fromkeys(each.path.parent for each in leftovers):
        inside = [each for each in leftovers if each.path.parent == folder]
        names = shortened((each.path.name for each in inside), most=3)
        print(f"{sum(each.size for each in inside) / 1e6:10,.1f} MB  {folder}: {names}")


def _clean(leftovers: Sequence[Any], *, as_json: bool, yes: bool) -> None:
    """Lists the leftovers by kind, and removes the kinds that the user confirms."""
    from megachat.studies.runs import remove_leftover

    if as_json:
        print(
            json.dumps([{"path": str(each.path), "why": each.why, "bytes": each.size} for each in leftovers], indent=1)
        )
    elif not leftovers:
        print("nothing to remove")
    if as_json and not yes:
        return
    for why in Counter(each.why for each in leftovers):
        kind = [each for each in leftovers if each.why == why]
        if not as_json:
            _list_by_folder(kind)
        total = f"{len(kind)} of the kind: {why}, {sum(each.size for each in kind) / 1e6:,.1f} MB"
        if not yes and not sys.stdin.isatty():
            print(f"{total}: kept, because this is no terminal for an answer; --yes removes them")
        elif yes or input(f"remove {total}? [y/N] ").strip().lower() in ("y", "yes"):
            for each in kind:
                remove_leftover(each)
            print(f"removed {total}", file=sys.stderr if as_json else sys.stdout)
