"""Show what a checkpoint of any format contains: a run folder (its newest complete checkpoint), a step's folder, or a
folder of nanochat, transformers or safetensors.
"""

import argparse
from pathlib import Path

from megachat.commands.options import Parser, importing


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options beside the checkpoint."""
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.add_argument("--verbose", action="store_true", help="also every fact, file and tensor")
    parser.add_argument("--step", type=int, help="of a folder that has several (default: the newest)")


def add_arguments(parser: Parser) -> None:
    """Adds the options of `megachat inspect`."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path)
    add_options(parser)


def run(options: argparse.Namespace) -> None:
    """Prints what the checkpoint contains."""
    with importing():
        from megachat.programs.convert import inspect_command

    inspect_command(options.checkpoint, options.step, options.json, options.verbose)
