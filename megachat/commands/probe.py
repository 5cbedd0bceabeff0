"""Measure this machine in about two minutes, for `megachat plan --probe`.

    megachat probe --config configs/d4_cpu.json --out probe.json

Measures matrix products at the config's shapes, attention, memory, head and loss, the optimizer, collectives between
ranks on this machine, and one real step. Prints by how much a prediction from these parts misses that step. The file is
for this machine, and for models of about the config's size.
"""

import argparse
import json
from pathlib import Path

from megachat.commands.options import Parser, add_config, add_set, text_moved


def _rank_counts(text: str) -> tuple[int, ...]:
    """Returns the numbers of ranks of a list like 1,2."""
    counts = [int(part) if part.isdecimal() else 0 for part in text.split(",")]
    if not all(1 <= count <= 1024 for count in counts):
        raise argparse.ArgumentTypeError(f"{text}: give numbers of ranks from 1 to 1,024, as 1,2")
    return tuple(counts)


def add_arguments(parser: Parser) -> None:
    """Adds the options of `megachat probe`."""
    add_config(parser, required=True)
    add_set(parser)
    ranks = "numbers of ranks to measure with, as 1,2: default one and all GPUs, 1 and 2 without GPUs"
    parser.add_argument("--ranks", type=_rank_counts, metavar="LIST", help=ranks)
    parser.add_argument("--out", type=Path, default=Path("probe.json"), help="the file to write (default probe.json)")
    parser.add_argument("--json", action="store_true", help="print the document, and everything else on standard error")


def run(options: argparse.Namespace) -> None:
    """Measures, and writes the file."""
    from megachat.programs.probe import probe_this_machine

    with text_moved(options):
        document = probe_this_machine(options)
    if options.json:
        print(json.dumps(document, indent=1))
