"""Show a run in the terminal while it trains: the curve of a metric and the newest values.

    megachat watch runs/d12
    megachat watch runs/d12 --metric train/loss --every 5

It reads the run folder only and works over ssh. It ends with Ctrl-C, or by itself with one line that says why: the run
is finished, or no job holds it and it has written nothing for a minute. Until then a supervisor may start it again. It
needs plotext: pip install 'megachat[report]'.
"""

import argparse
import shutil
import sys
import time
from pathlib import Path

from megachat.activity import duration
from megachat.commands.options import Parser
from megachat.errors import UserError

QUIET_S = 60  # without a job and a new line: a supervisor or a queue starts a run again sooner


def add_arguments(parser: Parser) -> None:
    """Adds the options of `megachat watch`."""
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="run folder")
    add("--metric", default="val/bpb", help="what is drawn (default val/bpb; another of the run's metrics: train/loss)")
    add("--every", type=float, default=10.0, metavar="SECONDS", help="time between refreshes (default 10)")
    add("--once", action="store_true", help="print once and end")


def run(options: argparse.Namespace) -> None:
    """Draws until the run has ended or the user ends it."""
    from megachat.studies.runs import load_run, quiet_s, state_text
    from megachat.studies.terminal import run_lines

    if options.every <= 0:
        raise UserError(f"--every is {options.every:g}: give a number of seconds above 0")
    while True:
        record = load_run(options.run)
        width, height = shutil.get_terminal_size()
        lines = run_lines(record, options.metric, width=min(width, 120), height=min(height, 40))
        refreshes = sys.stdout.isatty() and not options.once
        print(("\033[H\033[2J" if refreshes else "") + "\n".join(lines), flush=True)
        silent = quiet_s(options.run)
        ended = record.state == "finished" or (record.state != "running" and silent > QUIET_S)
        if ended:
            since = "" if record.state == "finished" else f"; no job holds it, no new line for {duration(silent)}"
            print(f"{record.folder.name}: {state_text(record)}{since}")
        if options.once or ended:
            return
        time.sleep(options.every)
