"""Runs one measurement and prints it as JSON, with the hardware and the commit.

The alternatives take turns in one run, and ratios are medians over rounds: they are less noisy than times.

    python tools/bench.py dtype --config configs/d4_cpu.json --rounds 6

kinds:
    dtype        tokens per second of training steps in bfloat16 and in float32
    checks       what a replay and a comparison of hashes take, in steps (docs/reliability.md)
    recompute    tokens per second and peak bytes of a training step for each batch.recompute
    attention    passes per second of attention with windows on a CPU: with a mask, in tiles, without windows
    nanochat     tokens per second and parts of training steps beside nanochat's own model and optimizer on a CPU
    profile      where the time of a training step goes, as a table, JSON and a picture; also as --profile
    gpu          the performance matrix of one GPU (bash tests/run_gpu.sh calls it)
    start        seconds from the start of pretrain.py to the end of its first step
    layouts      loss curves of several layouts against one process
    lookup       bits per byte with and without lookup and n-gram tables, against steps, seconds and FLOPs
    recipe       bits per byte of the parts of the speedrun's recipe, and the time of their steps, in one process
    loader       tokens per second of packing and of the whole loader, beside plain implementations
    checkpoint   seconds of saving and loading beside torch.save and torch.load
    generation   tokens per second with the KV cache and without
    lookup_read  milliseconds of lookup attention on the text of --data, beside gathering and a block's matrices
    lookup_step  seconds of training steps with lookup layers and without, at equal active FLOPs
    tables       steps per second and bytes of an n-gram table, whole on each rank and divided by rows
    plan         the planner's predicted step against the measured one, calibrated by a probe of --config
    core         CORE's examples per second in batches and one at a time
"""

import argparse
import importlib
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # works from a clone that was not installed

from megachat.commands.main import door  # noqa: E402
from megachat.commands.options import Parser, add_config, add_set  # noqa: E402
from megachat.errors import UserError  # noqa: E402

# kind -> the module of tools/bench with a function bench_KIND(arguments)
KINDS = {
    "dtype": "step",
    "recompute": "step",
    "checks": "step",
    "attention": "step",
    "nanochat": "nanochat",
    "profile": "step_profile",
    "gpu": "gpu",
    "start": "whole_runs",
    "layouts": "whole_runs",
    "lookup": "lookup_ablation",
    "recipe": "recipe_ablation",
    "loader": "packing",
    "checkpoint": "checkpoint",
    "generation": "generation",
    "lookup_read": "lookup",
    "lookup_step": "lookup",
    "tables": "row_tables",
    "plan": "plan",
    "core": "core",
}
LARGEST_VOCABULARY = 1 << 20
LAYOUTS = "dp=2 tp=2 pp=2 dp=2,tp=2 dp=2,pp=2 tp=2,pp=2 dp=2,tp=2,pp=2"


def add_arguments(parser: Parser) -> None:
    option = parser.add_argument
    option("kind", nargs="?", choices=KINDS, metavar="KIND", help="one of the kinds above")
    option("--profile", action="store_true", help="the same as the kind profile")
    add_config(parser, "default configs/d4_cpu.json", default=str(ROOT / "configs" / "d4_cpu.json"))
    add_set(parser)
    option("--vocab-size", type=int, default=4096, help="if the config has none (default 4096)")
    option(
        "--rounds",
        type=int,
        default=5,
        help="rounds in turn; for profile: profiled steps; lookup, recipe: 0 times nothing (default 5)",
    )
    option("--data", default="data/python", help="loader, layouts, lookup*: data folder (default data/python)")
    option("--tokenizer", default="data/tokenizer", help="loader, layouts, lookup*: default data/tokenizer")
    option("--layouts", default=LAYOUTS, help=f"layouts: default '{LAYOUTS}'")
    option("--steps", type=int, default=30, help="layouts: default 30")
    option("--layout", default="dp=1", help="profile, nanochat: one layout, as dp=2,tp=2 (default dp=1)")
    option("--row-tokens", type=int, default=513, help="loader: tokens per row (default 513)")
    option("--rows", type=int, default=2000, help="loader: default 2000")
    option("--tokens", type=int, default=16, help="generation: new tokens per row (default 16)")
    option("--checkpoint", help="core: the checkpoint")
    option("--bundle", help="core: the CORE bundle, a folder or zip")
    option("--max-per-task", type=int, default=-1, help="core: examples per task at most (default all)")
    option("--ranks", type=int, default=2, help="checkpoint, tables: default 2")
    option(
        "--folder",
        help="checkpoint: on the storage to measure (default: a temporary folder); lookup, recipe: of the runs",
    )
    option("--variants", help="lookup, recipe: names of variants (default: the usual ones)")
    seeds = "lookup, recipe: seeds of the initial weights (default '1 2 3'); recipe: '' trains nothing and times only"
    option("--seeds", default="1 2 3", help=seeds)
    option(
        "--minutes",
        type=float,
        help="gpu: cases that do not fit are left out (default 12); nanochat: fewer tokens and rounds (default 10)",
    )
    option("--nanochat", help="gpu, nanochat: a clone of nanochat; its own model is measured, too")
    option(
        "--nanochat-rows",
        help="nanochat: its rows per pass; of several numbers the best one counts (default batch.micro_rows)",
    )
    option(
        "--out", help="gpu: Markdown file with the two marker comments around the table; profile, lookup: an SVG file"
    )
    option("--checks", help="gpu: the report of tests/gpu, kept beside the numbers")
    option("--checks-log", help="gpu: pytest's output of tests/gpu")


def run(arguments: argparse.Namespace) -> None:
    if arguments.profile:
        arguments.kind = "profile"
    if arguments.kind is None:
        raise UserError("no KIND was given: name one of " + ", ".join(KINDS))
    least = 0 if arguments.kind in ("lookup", "recipe") else 1  # these train without rounds
    if arguments.rounds < least:
        raise UserError(f"--rounds {arguments.rounds}: {arguments.kind} takes {least} or more")
    if not 1 < arguments.vocab_size <= LARGEST_VOCABULARY:
        raise UserError(f"--vocab-size {arguments.vocab_size}: give 2 to {LARGEST_VOCABULARY:,} tokens")
    if arguments.minutes is not None and not arguments.minutes > 0:
        raise UserError(f"--minutes {arguments.minutes:g}: give more than 0")
    import torch

    from megachat.device import this_device
    from megachat.job.launch import describe_environment

    module = importlib.import_module(f"tools.bench.{KINDS[arguments.kind]}")
    result = getattr(module, f"bench_{arguments.kind}")(arguments)
    environment = describe_environment(this_device())
    where = {key: environment[key] for key in ("commit", "uncommitted_changes", "device", "cpu_cores")}
    print(json.dumps({"bench": arguments.kind} | result | {"where": where | {"torch": torch.__version__}}, indent=1))


main = door("bench")

if __name__ == "__main__":
    main()
