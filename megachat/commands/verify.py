"""Does a layout compute what one process computes?

    megachat verify --config configs/d4_cpu.json --depth 2 --layout tp=2,pp=2,dp=2

Compares layouts with one process on this machine's CPU, in two steps in float32: losses, every gradient, and every
weight after updates from equal gradients. With --resume, compares a run that is saved, ended, loaded and continued with
one that never stopped: losses, documents, weights, optimizers' state and counters. With --dry, walks a step of each
kind of rank without the others and compares the collectives. Exit status: 0 equal, 1 different, 2 could not be
compared.
"""

import argparse
import json
from pathlib import Path

from megachat.commands.options import Parser, add_config, add_set, text_moved
from megachat.errors import UserError


def add_arguments(parser: Parser) -> None:
    """Adds the options of `megachat verify`."""
    add = parser.add_argument
    add_config(parser, required=True)
    add(
        "--layout",
        action="append",
        default=[],
        help="axes and sizes, for example tp=2,pp=2,dp=2; repeatable; with --resume one process by default",
    )
    add(
        "--dry",
        action="store_true",
        help="walk a step of every kind of rank on this machine, of any number of ranks and any size, without their "
        "processes and memory: do all collectives meet, and are bytes, FLOPs and memory as planned",
    )
    add("--every-rank", action="store_true", help="with --dry: walk all ranks, not one of each kind")
    add("--resume", action="store_true", help="compare stopping, saving, loading and continuing with not stopping")
    add(
        "--onto",
        metavar="LAYOUT",
        action="append",
        default=[],
        help="with --resume: continue on this layout instead, in float32; repeatable",
    )
    add("--times", type=int, help="with --resume: how many resumes in a row (default 1)")
    profile = (
        "with --resume: strict requires every bit on the same layout, standard allows rounding on it, too; without it "
        "strict on the same layout, standard on another"
    )
    add("--profile", choices=("strict", "standard"), help=profile)
    add("--keep", type=Path, metavar="FOLDER", help="with --resume: new folder in which the runs are kept")
    add("--depth", type=int, help="scale the model down to this depth")
    add("--rows", type=int, default=4, help="rows per data-parallel rank and step (default 4)")
    add_set(parser)
    add("--out", type=Path, default=Path("verify.json"), help="the certificate (default verify.json)")
    add("--json", action="store_true", help="print the certificate, and everything else on standard error")


def run(options: argparse.Namespace) -> int:
    """Verifies; returns the exit status."""
    if options.rows < 1 or (options.depth is not None and options.depth < 1):
        raise UserError("--rows and --depth must be 1 or more")
    if not options.resume and (options.onto or options.keep or options.profile or options.times is not None):
        raise UserError("--onto, --times, --profile and --keep require --resume")
    if options.times is not None and not 1 <= options.times <= 9:
        raise UserError(f"--times is {options.times}: from 1 to 9 resumes in a row are compared")
    if options.profile == "strict" and options.onto:
        raise UserError(
            "--profile strict requires every bit, which another layout rounds differently: leave out --onto, or use "
            "--profile standard"
        )
    if options.dry and (options.resume or options.depth):
        raise UserError("--dry takes neither --resume nor --depth: it walks the config's own size")
    if options.every_rank and not options.dry:
        raise UserError("--every-rank requires --dry")
    if not options.resume and not options.layout:
        raise UserError("give a --layout")
    if options.keep and options.keep.exists():
        raise UserError(f"--keep {options.keep} exists: name a folder that does not")
    from megachat.programs.verify import verify

    with text_moved(options):
        document = verify(options)
    if options.json:
        print(json.dumps(document, indent=1))
    return 0 if document["passed"] else 1
