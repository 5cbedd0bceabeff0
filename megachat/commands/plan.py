"""Show what a run would be, and start nothing: every setting, every derived number with its formula, optimizer and
owner ranks of each parameter, and the estimated memory per rank. The same as `megachat pretrain --dry-run`.
"""

import argparse

from megachat.commands import pretrain
from megachat.commands.options import Parser, add_config, add_layout, add_set


def add_arguments(parser: Parser) -> None:
    """Adds the options of `megachat plan`."""
    add_config(parser, required=True)
    add_set(parser)
    add_layout(parser)
    pretrain.add_plan_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Prints the plan; returns the exit status."""
    return pretrain.run(argparse.Namespace(**vars(options), dry_run=True, resume=None, elastic=False))
