"""Plan a run, and start nothing.

With --gpus: will it fit, how long, what does it cost, and which layout? All layouts of the machine are compared.
Without: the plan of one layout on this machine, as `megachat pretrain --dry-run` shows it.

    megachat plan --config d24_fp8 --gpus 8xH100 --price 2.5
    megachat plan --config d24_fp8 --gpus 8xA100-40 --nodes 4 --json
"""

import argparse
import json
import math
from pathlib import Path

from megachat.commands import pretrain
from megachat.commands.options import Parser, add_config, add_layout, add_set, layout_settings, require_minimum
from megachat.errors import UserError
from megachat.planning.hardware import parse_gpus

_WITH_GPUS = ("nodes", "network", "gpu_spec", "price", "target", "write_config", "plot")


def add_arguments(parser: Parser) -> None:
    """Adds the options of `megachat plan`."""
    add = parser.add_argument
    add_config(parser, required=True)
    add_set(parser)
    add_layout(parser)
    add("--gpus", metavar="8xH100", help="compare all layouts of this machine: GPUs per node x kind")
    add("--nodes", type=int, help="with --gpus: the number of nodes (default 1)")
    add("--network", help="with --gpus: what connects the nodes, such as 'InfiniBand NDR', the default")
    add("--gpu-spec", metavar="FILE", help="with --gpus: JSON with the numbers of other GPUs and networks")
    add("--price", type=float, help="with --gpus: of a GPU-hour, in any currency")
    targets = "with --gpus: how long it trains: the config's horizon (steps, the default), the published horizon that "
    targets += "reached GPT-2's CORE at this depth (core), or its FLOPs (flops)"
    add("--target", choices=("core", "steps", "flops"), help=targets)
    add("--write-config", metavar="FILE", help="with --gpus: write the config of the fastest layout")
    add("--plot", metavar="FILE", help="with --gpus: draw the predicted step time by part against nodes")
    pretrain.add_plan_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Prints the plan; returns the exit status: 1 if no layout fits."""
    if not options.gpus:
        for name in _WITH_GPUS:
            if getattr(options, name) is not None:
                raise UserError(f"--{name.replace('_', '-')} belongs to --gpus: give the machine, as --gpus 8xH100")
        return pretrain.run(argparse.Namespace(**vars(options), dry_run=True, resume=None, elastic=False))
    require_minimum(options, nodes=1)
    if options.price is not None and not (math.isfinite(options.price) and options.price > 0):
        raise UserError(f"--price is {options.price}: give the price of a GPU-hour, a number above 0")
    for name in ("world", "memory_gb", "gpu"):
        if getattr(options, name) is not None:
            raise UserError(f"--{name.replace('_', '-')} plans one layout: leave it out with --gpus, which names them")
    network = {"network": options.network} if options.network else {}
    spec = Path(options.gpu_spec) if options.gpu_spec else None
    machine = parse_gpus(options.gpus, nodes=options.nodes, spec=spec, **network)
    from megachat.programs.plan import describe_plan_values, draw_scaling, make_request, plan_values_of, write_best

    settings = options.set + layout_settings(options.layout)
    request = make_request(options.config, settings, machine, price=options.price, target=options.target or "steps")
    values = plan_values_of(request)
    print(json.dumps(values, indent=1) if options.json else describe_plan_values(values, verbose=options.verbose))
    if options.write_config:
        write_best(request, options.write_config)
    if options.plot:
        draw_scaling(values, options.plot)
    return 0 if values["fits"] else 1
