"""Write a run as one HTML file that opens without a network. It has summary, curves on steps, time and FLOPs, memory,
time and price as predicted and measured, step times, layout, parameters, CORE, samples, settings and environment.

    megachat report runs/d12                           writes runs/d12/report.html
    megachat report runs/d12 --against runs/base       with the comparison of `megachat compare`
    megachat report runs/d12 --probe probe.json --price 2.5

It needs plotly: pip install 'megachat[report]'. The run may still train. With log.report=true a run
writes its report at its end.
"""

import argparse
import json
from pathlib import Path

from megachat.commands.options import Parser
from megachat.commands.pretrain import check_price


def add_arguments(parser: Parser) -> None:
    """Adds the options of `megachat report`."""
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="run folder")
    add("--against", type=Path, metavar="RUN", help="a second run, shown beside it")
    add("--out", type=Path, metavar="FILE", help="the HTML file (default: report.html in the run folder)")
    add("--probe", type=Path, metavar="FILE", help="file of `megachat probe`, to predict time on the run's machine")
    add("--price", type=float, help="of a GPU-hour in any currency, on a CPU of the machine's hour")
    add("--json", action="store_true", help="print the file's path and size as JSON")


def run(options: argparse.Namespace) -> None:
    """Writes the report."""
    from megachat.files import check_writable
    from megachat.studies.report_figures import import_plotly
    from megachat.studies.runs import load_run

    check_price(options.price)
    import_plotly()
    record = load_run(options.run)
    against = load_run(options.against) if options.against else None
    from megachat.files import REPORT_NAME
    from megachat.studies.report import write_report  # imports torch

    out = options.out or options.run / REPORT_NAME
    check_writable(out)
    size = write_report(record, out, against, probe=options.probe, price=options.price)
    print(json.dumps({"report": str(out), "bytes": size}) if options.json else f"wrote {out}, {size / 1e6:.1f} MB")
