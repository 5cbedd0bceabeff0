"""Compares megachat's Muon partition with other ways to distribute Muon over data-parallel ranks.

    megachat partition [--ranks 2,4,8] [--measure 2,4,8] [--json FILE]

From the plans alone it prints, for 2 to 1,024 ranks, the load of the busiest rank over the mean, and the bytes sent per
rank over the lower bound. That is (ranks - 1) / ranks x 4 bytes per element: bfloat16 gradients in and bfloat16 weights
out. With --measure, gloo ranks on this machine also run the matrices of a small model through megachat, DeepSpeed's
built-in Muon under ZeRO-1 and the two other rules.
"""

import argparse
import importlib
import json
from pathlib import Path

from megachat.commands.options import Parser, add_checkout_to_path, require_minimum, text_moved
from megachat.files import check_writable, write_json
from megachat.text import markdown_table

RANK_COUNTS = tuple(2**power for power in range(1, 11))


def rank_counts(text: str) -> tuple[int, ...]:
    """Returns the rank counts of a list like 2,4,8."""
    counts = tuple(map(int, text.split(",")))
    if min(counts) < 2:
        raise argparse.ArgumentTypeError(f"{min(counts)} is below 2 ranks")
    return counts


def add_arguments(parser: Parser) -> None:
    """Adds the options of `megachat partition`."""
    add = parser.add_argument
    add("--ranks", type=rank_counts, default=RANK_COUNTS, help="rank counts of the planned table, as 2,4,8")
    add("--measure", type=rank_counts, default=(), help="numbers of gloo ranks to run here, as 2,4,8")
    add("--rounds", type=int, default=7, help="timed rounds (default 7)")
    add("--json", type=Path, metavar="FILE", help="also write everything to this file; - prints it instead of tables")


def run(options: argparse.Namespace) -> None:
    """Prints the tables, and writes or prints the document."""
    require_minimum(options, rounds=1)
    add_checkout_to_path("partition")
    printed = options.json == Path("-")
    if options.json and not printed:
        check_writable(options.json, "--json")
    with text_moved(argparse.Namespace(quiet=options.quiet, json=printed)):
        document = measured_document(options)
    if printed:
        print(json.dumps(document, indent=1))
    elif options.json:
        write_json(options.json, document)


def measured_document(options: argparse.Namespace) -> dict:
    """Prints the tables and returns their numbers as JSON values."""
    import torch

    from megachat.job.launch import describe_environment

    rules = importlib.import_module("tools.bench.partition_rules")
    planned, measured = rules.planned_table(options.ranks), {}
    for model, rows_by_rule in planned.items():
        header = [f"{model}: load, bytes", *(f"{count:,}" for count in options.ranks)]
        rows = [
            [rule, *("{load:.2f}, {bytes:.2f}".format(**values[count]) for count in options.ranks)]
            for rule, values in rows_by_rule.items()
        ]
        print("", *markdown_table([header, *rows]), sep="\n", flush=True)
    for world in options.measure:
        contenders = importlib.import_module("tools.bench.partition_contenders")  # loads DeepSpeed
        measured[world] = contenders.measure(world, options.rounds)
        keys = ("bytes", "load", "work", "state", "time", "seconds")
        rows = [[name, *(f"{values[key]:.3g}" for key in keys)] for name, values in measured[world].items()]
        print("", *markdown_table([[f"{world} gloo ranks", *keys], *rows]), sep="\n", flush=True)
    return {"environment": describe_environment(torch.device("cpu")), "planned": planned, "measured": measured}
