"""Run a capsule: the step of a run whose loss or gradient was not finite, on one process, whatever layout wrote it.

    megachat replay runs/NAME/capsules/step_001234

Names the first module whose output or gradient is not finite, with its statistics; the rows and documents that cause
it; and whether float32 cures it. Exit status: 1 if all is finite here.
"""

import argparse
from pathlib import Path

from megachat.activity import announced, log_line
from megachat.commands.options import Parser, importing, print_result


def add_arguments(parser: Parser) -> None:
    """Adds the options of `megachat replay`."""
    parser.add_argument("capsule", metavar="CAPSULE", type=Path, help="a folder of RUN/capsules/")
    parser.add_argument("--device", default="auto", help="cpu, cuda or cuda:1 (default: a GPU if there is one)")
    dtypes = ("auto", "float32", "bfloat16", "float16")
    parser.add_argument("--dtype", default="auto", choices=dtypes, help="of the computation (default: the run's)")
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def run(options: argparse.Namespace) -> int:
    """Replays the capsule and prints the report; returns the exit status."""
    with importing():
        from megachat.programs.replay import replay_capsule, report_lines

    with announced(f"running the rows of {options.capsule}, then searching for those that cause it", write=log_line):
        report = replay_capsule(options.capsule, options.device, options.dtype)
    print_result(options, report, *report_lines(report))
    return 0 if report["reproduced"] else 1
