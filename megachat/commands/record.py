"""Make a record of the speedrun from finished runs of one recipe: a text for a pull request, with the evidence.

    megachat record runs/speedrun-public-2026-1 runs/speedrun-public-2026-2

Time is the leaderboard's: training steps after step 10, without evaluation, sampling and saving. CORE has its error
and the verdict against GPT-2's value. If a piece of evidence is missing, or differs between the runs, there is no
record: docs/speedrun.md lists the pieces. --draft shows the text anyway, marked as no record, with what it lacks.
"""

import argparse
from pathlib import Path

from megachat.commands.options import Parser, print_result


def add_arguments(parser: Parser) -> None:
    """Adds the options of `megachat record`."""
    add = parser.add_argument
    add(
        "runs", nargs="+", type=Path, metavar="RUN", help="folders of finished runs that differ in nothing but the seed"
    )
    add("--name", help="name of the recipe (default: of the first run)")
    draft = "where a record is refused: its text without a verdict, marked as no record, with the reasons"
    add("--draft", action="store_true", help=draft)
    add("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> None:
    """Prints the record."""
    from megachat.studies.record import build_record
    from megachat.studies.record_text import record_text
    from megachat.studies.runs import load_run

    record = build_record([load_run(folder) for folder in options.runs], draft=options.draft)
    name = options.name or options.runs[0].resolve().name
    print_result(options, record, record_text(record, name))
