"""The speedrun to GPT-2's CORE in one command: data, tokenizer, training, CORE, report, record.

    megachat speedrun --recipe public-2026 --dry-run          stages, plan, time and price; nothing is started
    megachat speedrun --recipe public-2026 --runs 3
    megachat speedrun --depth 3 --data data/python            the same on a CPU, with a small model
    megachat speedrun --depth 3 --data data/python --bundle eval_bundle --max-per-task 20 --draft    and a part of CORE

The same command again continues where it was: a stage with a complete result is skipped. Files are written below the
current folder. docs/speedrun.md explains the recipes.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from megachat.commands.options import Parser, add_set, passed_on, require_minimum
from megachat.commands.pretrain import check_price
from megachat.errors import EXIT_STATUS, UserError

if TYPE_CHECKING:
    from megachat.programs.speedrun_recipe import Speedrun

PRICE, SHARDS = 3.0, 170
# Options that set a setting, and settings that only CORE during the training reads -> what the CORE after it has.
_OPTION_OF = {
    "model.depth": "depth",
    "data.folder": "data",
    "data.tokenizer": "tokenizer",
    "evaluate.core_bundle": "bundle",
}
_OF_TRAINING = {
    "evaluate.core_max_per_task": "--max-per-task N",
    "evaluate.core_tasks": "--bundle BUNDLE with these tasks",
}
RECIPE_NAMES = ("nanochat-run6", "public-2026", "megachat")  # of megachat.programs.speedrun_recipe


def add_arguments(parser: Parser) -> None:
    """Adds the options of `megachat speedrun`."""
    add = parser.add_argument
    add("--recipe", choices=RECIPE_NAMES, default="megachat", help="default megachat")
    add("--runs", type=int, default=1, help="runs with different seeds, for a record with a deviation (default 1)")
    add("--depth", type=int, help="another depth; below 8 also short rows, small batches and no FP8, for a CPU")
    add("--data", type=Path, metavar="FOLDER", help="a data folder that exists, in place of a download")
    add("--shards", type=int, help=f"train shards of climbmix to download (default {SHARDS}); without --data only")
    add(
        "--base-url",
        metavar="URL",
        help="download the shards from this mirror, which has shard_00000.parquet and so on",
    )
    tokenizer = "a tokenizer folder, trained if it does not exist (default: the recipe's; with --data beside it)"
    add("--tokenizer", type=Path, metavar="FOLDER", help=tokenizer)
    add("--bundle", type=Path, metavar="BUNDLE", help="the CORE bundle (default: nanochat's, downloaded once)")
    limit = "CORE's examples per task at most, for a draft; default -1: all, which a record needs"
    add("--max-per-task", type=int, default=-1, metavar="N", help=limit)
    draft = "where no record can come of it: train anyway, and write a draft that is marked as no record"
    add("--draft", action="store_true", help=draft)
    add("--ranks", type=int, help="on this machine, with --hostfile for CORE only; default: all GPUs, 2 without GPUs")
    add("--hostfile", type=Path, metavar="FILE", help="train on these hosts, over ssh; CORE runs on this one")
    add("--dry-run", action="store_true", help="print stages, plan, time and price; start nothing")
    machine = "with --dry-run: a machine, as 8xH100, 16xH100 or 2x8xH100 (nodes x GPUs x kind); default 8xH100, or by "
    add("--gpus", metavar="8xH100", help=machine + "--hostfile or --ranks; with a small --depth this one")
    add("--price", type=float, help=f"with --dry-run: of a GPU-hour, in any currency (default {PRICE:g})")
    add_set(parser)


def run(options: argparse.Namespace) -> int:
    """Runs the stages; returns the exit status."""
    require_minimum(options, runs=1, depth=1, shards=1, ranks=1)
    _refuse_without_effect(options)
    from megachat.commands.main import start
    from megachat.job.local_job import run_with_deepspeed
    from megachat.programs.speedrun import run_speedrun, start_on_hosts

    speedrun = _speedrun(options)
    _refuse_dropped_settings(options, speedrun)

    def start_here(arguments: list[str]) -> int:
        return start(arguments[0], [*arguments[1:], *passed_on(options)], f"megachat {arguments[0]}")

    def start_ranks(arguments: list[str]) -> int:
        training = arguments[0] == "pretrain"
        arguments = [*arguments, *(["--started-by", "speedrun"] if training else []), *passed_on(options)]
        if options.hostfile and training:
            return start_on_hosts(options.hostfile, arguments)
        return run_with_deepspeed(arguments, options.ranks)

    if options.dry_run:
        return _dry_run(options, speedrun)
    return run_speedrun(speedrun, start_here, start_ranks)


def _speedrun(options: argparse.Namespace) -> "Speedrun":
    from megachat.programs.speedrun_recipe import Speedrun, settings_of_depth

    settings = settings_of_depth(options.recipe, options.depth, options.set) if options.depth else []
    for key, value in {"data.folder": options.data, "data.tokenizer": options.tokenizer}.items():
        settings += [f"{key}={value}"] if value else []
    settings += [f"evaluate.core_bundle={options.bundle}"] if options.bundle else []
    shards = None if options.data else options.shards or SHARDS
    speedrun = Speedrun(
        options.recipe,
        (*settings, *options.set),
        options.runs,
        shards,
        _ranks_of_training(options),
        base_url=options.base_url,
        draft=options.draft,
        max_per_task=options.max_per_task,
    )
    if options.data and not options.tokenizer:
        place = f"{options.data}_tokenizer{speedrun.config.model.vocab_size}"
        speedrun = replace(speedrun, settings=(*settings, f"data.tokenizer={place}", *options.set))
    return speedrun


def _dry_run(options: argparse.Namespace, speedrun: "Speedrun") -> int:
    """Prints stages and plan. Returns the exit status: as of an error if nothing would be started."""
    from megachat.planning.hardware import parse_gpus
    from megachat.programs.dry_run import describe_job
    from megachat.programs.plan import describe_printed_plan
    from megachat.programs.speedrun import describe_speedrun
    from megachat.programs.speedrun_checks import made_by_stages, obstacles

    ranks, machine = _planned_machine(options)
    problems, fits = obstacles(speedrun), True
    price = (options.price or PRICE) if machine else None
    if machine is None:
        plan = describe_job(speedrun.config, ranks, made=made_by_stages(speedrun))
    else:
        path, settings = str(speedrun.config_file), list(speedrun.settings)
        plan, fits = describe_printed_plan(path, settings, parse_gpus(machine), price or PRICE)
    print(f"{describe_speedrun(speedrun, problems, price)}\n\n{plan}", flush=True)
    return EXIT_STATUS if problems and not speedrun.draft else int(not fits)


def _ranks_of_training(options: argparse.Namespace) -> int | None:
    """Returns the number of ranks that train, None for a plan, which has a machine."""
    from megachat.job.hosts import parse_hostfile

    if options.dry_run:
        return None
    if options.hostfile:
        return sum(host.slots for host in parse_hostfile(options.hostfile))
    import torch

    return options.ranks or torch.cuda.device_count() or 2  # as run_with_deepspeed


def _planned_machine(options: argparse.Namespace) -> tuple[int, str | None]:
    """Returns the ranks to plan for, and their machine, as 8xH100, None for this one. Raises UserError."""
    from megachat.job.hosts import parse_hostfile
    from megachat.programs.speedrun_recipe import SMALL_DEPTH

    small = (options.depth or SMALL_DEPTH) < SMALL_DEPTH
    hosts = parse_hostfile(options.hostfile) if options.hostfile else []
    slots = [host.slots for host in hosts] or [options.ranks or (2 if small else 8)]
    if small and not options.gpus:
        return sum(slots), None
    if len(set(slots)) > 1 and not options.gpus:
        raise UserError(f"the hosts of {options.hostfile} have different slots: name the machine of the plan by --gpus")
    nodes = f"{len(slots)}x" if len(slots) > 1 else ""
    return sum(slots), options.gpus or f"{nodes}{slots[0]}xH100"


def _refuse_without_effect(options: argparse.Namespace) -> None:
    """Raises UserError for settings that do not exist and options that would be ignored."""
    from megachat.config import config_from_values, known_keys

    keys = known_keys()
    config_from_values({}, "--set", [one for one in options.set if one.partition("=")[0].strip() not in keys])
    from megachat.job.hosts import parse_hostfile
    from megachat.programs.speedrun_recipe import SMALL_DEPTH

    check_price(options.price)
    if options.hostfile:
        parse_hostfile(options.hostfile)  # its mistakes are reported before a download, too
    if options.data and options.shards:
        raise UserError("--shards are downloaded, but --data gives a folder that exists: give one of the two")
    if options.data and options.base_url:
        raise UserError("--base-url is for a download, but --data gives a folder that exists: give one of the two")
    for name in ("gpus", "price"):
        if getattr(options, name) is not None and not options.dry_run:
            raise UserError(f"--{name} is for a plan only: add --dry-run, or leave it out")
    if options.price is not None and options.gpus is None and (options.depth or SMALL_DEPTH) < SMALL_DEPTH:
        raise UserError(
            f"--price is of a GPU-hour, but depth {options.depth} is planned for this CPU: give --gpus, too"
        )


def _refuse_dropped_settings(options: argparse.Namespace, speedrun: "Speedrun") -> None:
    """Raises UserError for a --set that an option or the speedrun itself would override, or that nothing would read."""
    given = {one.partition("=")[0].strip() for one in options.set}
    for key, option in _OPTION_OF.items():
        if key in given and getattr(options, option) is not None:
            raise UserError(f"--{option} and --set {key} say the same: give one of the two")
    if "run.name" in given:
        raise UserError(
            "run.name is the recipe's name and the run's number, by which the command finds its runs: use --set "
            "run.folder=FOLDER for other places"
        )
    for key, instead in _OF_TRAINING.items():
        if key in given and not speedrun.config.evaluate.core_every:
            raise UserError(
                f"{key} is of CORE during the training, of which there is none (evaluate.core_every is 0): for the "
                f"CORE after it give {instead}"
            )
