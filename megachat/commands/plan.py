"""Plan a run, and start nothing.

With --gpus: will it fit, how long, what does it cost, and which layout? All layouts of the machine are compared. With
--probe: the same for a machine that `megachat probe` measured.
Without: the plan of one layout on this machine, as `megachat pretrain --dry-run` shows it.

    megachat plan --config d24_fp8 --gpus 8xH100 --price 2.5
    megachat plan --config d24_fp8 --gpus 8xA100-40 --nodes 4 --json
    megachat plan --config d4_cpu --probe probe.json
"""

import argparse
from pathlib import Path

from megachat.commands import pretrain
from megachat.commands.options import (
    Parser,
    add_config,
    add_layout,
    add_set,
    layout_ranks,
    layout_settings,
    print_result,
    require_minimum,
)
from megachat.errors import UserError
from megachat.files import check_writable
from megachat.planning.hardware import Machine, parse_gpus

_WITH_GPUS = ("nodes", "network", "gpu_spec", "plot")
_WITH_EITHER = ("target", "write_config")


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
    targets = "with --gpus or --probe: how long it trains: the config's horizon (steps, the default), the published "
    targets += "horizon that reached GPT-2's CORE at this depth (core), or its FLOPs (flops)"
    add("--target", choices=("core", "steps", "flops"), help=targets)
    add("--write-config", metavar="FILE", help="with --gpus or --probe: write the config of the fastest layout")
    add("--plot", metavar="FILE", help="with --gpus: draw the predicted step time by part against nodes")
    pretrain.add_plan_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Prints the plan; returns the exit status: 1 if no layout fits."""
    searched = options.gpus or options.probe
    for name in (*_WITH_GPUS, *(() if searched else _WITH_EITHER)):
        if not options.gpus and getattr(options, name) is not None:
            otherwise = "" if name in _WITH_GPUS else ", or --probe FILE"
            name = name.replace("_", "-")
            raise UserError(f"--{name} belongs to --gpus: give the machine, as --gpus 8xH100{otherwise}")
    if not searched:
        absent = {"resume": None, "elastic": False, "self_test": False, "started_by": None}
        return pretrain.run(argparse.Namespace(**vars(options), dry_run=True, **absent))
    require_minimum(options, nodes=1, world=1)
    pretrain.check_price(options.price)
    ranks, probe = layout_ranks(options.layout) if "dp" in (options.layout or "") else None, None
    if options.probe:
        from megachat.planning.probe import read_probe

        world, probe = _probed_ranks(options, ranks), read_probe(options.probe)
        memory = int(options.memory_gb * 1e9) if options.memory_gb else None
        machine = probe.machine(world or probe.most_ranks, memory)
    else:
        machine = _named_machine(options, ranks)
    from megachat.programs.plan import describe_plan_values, draw_scaling, make_request, plan_values_of, write_best

    settings = options.set + layout_settings(options.layout)
    target = options.target or "steps"
    for option in ("write_config", "plot"):
        if path := getattr(options, option):
            check_writable(Path(path), f"--{option.replace('_', '-')}")
    request = make_request(options.config, settings, machine, price=options.price, target=target, probe=probe)
    values = plan_values_of(request)
    print_result(options, values, describe_plan_values(values, verbose=options.verbose))
    if options.write_config:
        write_best(request, options.write_config)
    if options.plot:
        draw_scaling(values, options.plot)
    return 0 if values["fits"] else 1


def _probed_ranks(options: argparse.Namespace, ranks: int | None) -> int | None:
    """Returns the number of ranks to plan for with --probe, if one is given. ranks: of a layout that names dp.

    Raises UserError for options that contradict the probe.
    """
    for name in ("gpus", "gpu"):
        if getattr(options, name):
            raise UserError(f"--{name} and --probe name two machines: give one of the two")
    if options.world and ranks and ranks != options.world:
        raise UserError(f"--layout {options.layout} has {ranks} ranks, but --world is {options.world}")
    if options.memory_gb is not None and not options.memory_gb > 0:
        raise UserError(f"--memory-gb is {options.memory_gb}: give the memory of a rank, above 0")
    return options.world or ranks


def _named_machine(options: argparse.Namespace, ranks: int | None) -> Machine:
    """Returns the machine of --gpus. ranks: of a layout that names dp. Raises UserError for options that contradict
    it."""
    for name in ("world", "memory_gb", "gpu"):
        if getattr(options, name) is not None:
            raise UserError(f"--{name.replace('_', '-')} plans one layout: leave it out with --gpus, which names them")
    network = {"network": options.network} if options.network else {}
    spec = Path(options.gpu_spec) if options.gpu_spec else None
    machine = parse_gpus(options.gpus, nodes=options.nodes, spec=spec, **network)
    if ranks not in (None, machine.world):
        raise UserError(f"--layout {options.layout} has {ranks} ranks, but {machine.name} has {machine.world} GPUs")
    return machine
