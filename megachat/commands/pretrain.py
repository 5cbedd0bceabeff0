"""Pretrain a model. This is what every rank runs: `deepspeed --module megachat pretrain --config FILE`, or the same
with `torchrun -m megachat pretrain`, `mpirun python -m megachat pretrain`, or alone for one rank.
"""

import argparse
import math
from pathlib import Path

from megachat.commands.options import (
    Parser,
    add_config,
    add_layout,
    add_local_rank,
    add_set,
    check_layout_ranks,
    importing,
    layout_ranks,
    layout_settings,
)
from megachat.errors import UserError, start_by
from megachat.job.hosts import check_launcher_hostfile
from megachat.job.launchers import launcher_world
from megachat.planning.hardware import parse_gpus

_WITH_DRY_RUN = {  # options of a plan -> what they are for
    "world": "is the number of ranks, 1 or more, to plan for with --dry-run; a launcher sets how many run",
    "memory_gb": "is the memory of a GPU, above 0, to plan for with --dry-run; a job reads its GPU's",
    "json": "prints the plan of --dry-run; a job's numbers are in metrics.jsonl of the run folder",
    "verbose": "shows all of a plan with --dry-run; a job logs what it does",
    "gpu": "names the GPU to plan for with --dry-run, in place of --memory-gb: give one of the two",
    "probe": "predicts time and price with --dry-run; a job's prediction is by log.probe",
    "price": "predicts time and price with --dry-run; a job's prediction is by log.probe",
}


def add_plan_arguments(parser: Parser, where: str = "") -> None:
    """Adds the options of a plan. where: "with --dry-run: " where they need it."""
    parser.add_argument("--world", type=int, help=f"{where}the number of ranks to plan for")
    memory = f"{where}the memory of a GPU, to show what fits; default: of this machine's"
    parser.add_argument("--memory-gb", type=float, help=memory)
    gpu = f"{where}a kind of GPU, such as H100, to count memory and time for in place of this machine's"
    parser.add_argument("--gpu", metavar="KIND", help=gpu)
    probe = f"{where}file of `megachat probe`, to predict the time on the machine that it measured"
    parser.add_argument("--probe", type=Path, metavar="FILE", help=probe)
    price = f"{where}of a GPU-hour, in any currency, to predict the price where the time is known"
    parser.add_argument("--price", type=float, help=price)
    parser.add_argument("--verbose", action="store_true", help=f"{where}every setting, derived number and owner, too")
    parser.add_argument("--json", action="store_true", help=f"{where}print one JSON document")


def check_price(price: float | None) -> None:
    """Raises UserError for a price that is not above 0."""
    if price is not None and not (math.isfinite(price) and price > 0):
        raise UserError(f"--price is {price}: give the price of a GPU-hour, a number above 0")


def add_arguments(parser: Parser) -> None:
    """Adds the options of `megachat pretrain`."""
    add = parser.add_argument
    add_config(parser, required=True)
    add_set(parser)
    add_layout(parser)
    resume = "continue from the run's newest complete checkpoint, or from the given one"
    add("--resume", metavar="auto|PATH", help=resume)
    add("--dry-run", action="store_true", help="print config, plan, parameters and owners, and stop")
    add_plan_arguments(parser, "with --dry-run: ")
    elastic = "train on as many of the started ranks as fit the batch; set by supervise"
    add("--elastic", action="store_true", help=elastic)
    self_test = "before training: take some steps, and the same with two resumes; train only if all is equal to the bit"
    add("--self-test", action="store_true", help=self_test)
    add("--started-by", help=argparse.SUPPRESS)  # the command that continues the job, set by speedrun
    add_local_rank(parser)


def run(options: argparse.Namespace) -> int:
    """Pretrains, or shows the plan; returns the exit status."""
    _check_plan_options(options)
    if options.started_by:
        start_by(options.started_by)
    world, memory_gb = options.world, options.memory_gb
    if options.gpu:
        memory_gb = parse_gpus(options.gpu).gpu.memory_bytes / 1e9
    settings = options.set + layout_settings(options.layout)
    if options.dry_run:
        world = world or layout_ranks(options.layout)
    elif not options.elastic:
        check_layout_ranks(options.layout)
    check_launcher_hostfile()
    if not options.elastic:
        _check_early(options, settings, world)
    with importing(logged=not options.dry_run):
        from megachat.programs.dry_run import Hardware
        from megachat.programs.pretrain import run_pretrain

    return run_pretrain(
        options.config,
        settings,
        resume=options.resume,
        dry_run=options.dry_run,
        world=world,
        elastic=options.elastic,
        self_test=options.self_test,
        hardware=Hardware(memory_gb, options.gpu, options.probe, options.price),
        as_json=options.json,
        verbose=options.verbose,
    )


def _check_plan_options(options: argparse.Namespace) -> None:
    """Raises UserError for options of a plan without --dry-run, or that contradict each other."""
    for name, meaning in _WITH_DRY_RUN.items():
        value = getattr(options, name)
        impossible = name in ("world", "memory_gb") and value is not None and not value > 0
        if impossible or (value not in (None, False) and not options.dry_run):
            raise UserError(f"--{name.replace('_', '-')} {meaning}")
    if options.gpu and options.memory_gb is not None:
        raise UserError(f"--gpu {_WITH_DRY_RUN['gpu']}")
    if options.self_test and options.dry_run:
        raise UserError(
            "--self-test takes steps before a training, --dry-run shows the plan of one: give one of the two"
        )
    if options.probe and options.gpu:
        raise UserError("--gpu and --probe name two machines: give one of the two")
    check_price(options.price)


def _check_early(options: argparse.Namespace, settings: list[str], world: int | None) -> None:
    """Raises UserError for a tokenizer or checkpoint that is missing and a plan that is impossible, seconds before
    torch is there. world: ranks to plan for with --dry-run."""
    from megachat.checkpoint.resume import find_checkpoint
    from megachat.checkpoint.run_folder import config_in_place
    from megachat.config import load_config
    from megachat.data.tokenizer import load_tokenizer
    from megachat.planning.plan import resolve_plan

    path = Path(options.config)
    config, _ = config_in_place(load_config(path, settings), path, settings)
    vocab_size = config.model.vocab_size
    if not (options.dry_run and vocab_size):
        tokenizer = load_tokenizer(config.data.tokenizer)
        vocab_size = vocab_size or tokenizer.vocab_size
    resolve_plan(config, world or launcher_world(), vocab_size)
    if not options.dry_run:
        find_checkpoint(Path(config.run.folder) / (config.run.name or path.stem), options.resume)
