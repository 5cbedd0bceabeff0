"""Explain a setting or a number of the plan: its value, where it comes from, its formula with the numbers put in, its
source, what depends on it, and what a change would do. Without a name it lists all names.

    megachat explain tokens_per_step --config d24_fp8
    megachat explain horizon.ratio --config d24_fp8 --set horizon.ratio=12
    megachat explain memory.total --config d24_fp8 --change batch.micro_rows=8
"""

import argparse
from pathlib import Path

from megachat.commands.options import (
    Parser,
    add_config,
    add_layout,
    add_set,
    layout_ranks,
    layout_settings,
    print_result,
)
from megachat.commands.pretrain import check_price
from megachat.errors import UserError


def add_arguments(parser: Parser) -> None:
    """Adds the options of `megachat explain`."""
    add = parser.add_argument
    add("name", nargs="?", metavar="KEY", help="a setting, such as horizon.ratio, or a number of the plan")
    add_config(parser, "explain it in this config; default: default settings")
    add_set(parser, "override a setting; of KEY itself: compare with the plan before")
    change = "show every number that moves with this setting; repeatable"
    add("--change", action="append", default=[], metavar="SECTION.KEY=VALUE", help=change)
    add_layout(parser)
    add("--world", type=int, help="the number of ranks; default: the largest of 8, 4, 2, 1 per model copy that fits")
    gpus = "a machine, as 8xH100 or 4x8xH100, for predicted times: time.step, time.wall_hours"
    add("--gpus", metavar="8xH100", help=gpus)
    add("--probe", type=Path, metavar="FILE", help="in place of --gpus: the machine that `megachat probe` measured")
    add("--price", type=float, help="of a GPU-hour, for the predicted price")
    add("--json", action="store_true", help="print one JSON document")


def run(options: argparse.Namespace) -> None:
    """Prints the explanation."""
    if options.world is not None and options.world < 1:
        raise UserError(f"--world is {options.world}: give 1 or more")
    from megachat.planning.names import describe_names, explained_as

    if options.name is None:
        print(describe_names())
        return
    explained_as(options.name)
    from megachat.programs.explain import describe_explanation, explain, machine_timing

    check_price(options.price)
    world = options.world or layout_ranks(options.layout)
    world, timing = machine_timing(options.gpus, options.probe, options.price, world)
    settings = [*options.set, *layout_settings(options.layout)]
    shown = explain(options.name, options.config, settings, options.change, world, timing)
    print_result(options, shown, describe_explanation(shown))
