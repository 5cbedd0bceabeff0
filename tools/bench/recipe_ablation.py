"""The parts of the speedrun's recipe, one at a time and all together, against the default recipe: bits per byte at
equal tokens, and the time of a step.

All variants train in one process, one after the other, on the same rows in the same order, and are validated on the
rows that follow them: nothing but the settings and the seed of the weights differs, and no start-up is paid.

    OMP_NUM_THREADS=1 python tools/bench.py recipe --seeds "" --rounds 41      # trains nothing, times steps in turn
"""

import functools
import gc
from argparse import Namespace
from pathlib import Path

import torch

from megachat.config import load_config
from megachat.data.tokenizer import Tokenizer, load_tokenizer
from megachat.errors import UserError
from megachat.evals.bpb import ValidationRows, bits_per_byte
from megachat.job.join import start_mesh
from megachat.job.launch import bootstrap_environment, choose_device
from megachat.parallel.mesh import Mesh
from megachat.planning.plan import resolve_plan
from megachat.train.build import build_training_model
from megachat.train.step import set_schedules, update
from tools.bench.lookup_ablation import (
    BASELINE,
    RECIPE,
    RECIPE_SIZE,
    VARIANTS,
    ablation_result,
    first_rows,
    time_variants,
    train_once,
)

_POINTS = 4  # of each curve


def bench_recipe(arguments: Namespace) -> dict:
    """Trains what is not in --folder yet, times steps, prints the table, and draws the curves into --out."""
    seeds = [int(seed) for seed in arguments.seeds.split()]
    if not seeds and not arguments.rounds:
        raise UserError("--seeds names no seed and --rounds is 0: there is nothing to do")
    if not arguments.folder and seeds:
        raise UserError("--folder is missing: name a folder for the results; what is there is not trained again")
    names = [BASELINE, *RECIPE, "bigram-trigram", "together"]
    if arguments.variants:
        names = [BASELINE, *(name for name in arguments.variants.split() if name != BASELINE)]
    if unknown := [name for name in names if name not in VARIANTS]:
        raise UserError(f"--variants has {unknown[0]}, which is not one of {', '.join(VARIANTS)}")
    arguments = Namespace(**vars(arguments) | {"set": [*RECIPE_SIZE, *arguments.set]})
    device, tokenizer = choose_device(bootstrap_environment()), load_tokenizer(arguments.tokenizer)
    mesh = start_mesh(load_config(arguments.config, arguments.set), device)
    folder, train = Path(arguments.folder or ""), functools.partial(train_in_process, arguments, tokenizer, mesh)
    runs = [train_once(arguments, folder, name, seed, train) for seed in seeds for name in names]
    ratios = time_variants(arguments, names) if arguments.rounds else {}
    return ablation_result(arguments, runs, ratios)


def train_in_process(arguments: Namespace, tokenizer: Tokenizer, mesh: Mesh, settings: list[str]) -> dict:
    """Trains one model to its horizon; returns its validation curve and parameters."""
    config = load_config(arguments.config, settings)
    plan = resolve_plan(config, 1, tokenizer.vocab_size)
    training = build_training_model(config, plan, mesh, torch.from_numpy(tokenizer.token_bytes()))
    trained, held = plan.steps * plan.rows_per_step, plan.evaluation_rows
    micro = plan.micro_rows  # the last micro-batch of the validation may be in part beyond the rows that count
    rows = first_rows(arguments.data, tokenizer, (trained + held + micro, plan.dims.sequence_len + 1))
    validation = ValidationRows(rows[trained:].split(micro), held, micro, mesh)
    curve = []
    for step in range(plan.steps):
        set_schedules(training, step)
        update(training, rows[step * plan.rows_per_step : (step + 1) * plan.rows_per_step])
        if (step + 1) * _POINTS // plan.steps > step * _POINTS // plan.steps:
            bpb = bits_per_byte(training.engine, validation, mesh)
            curve.append({"step": step + 1, "flops": (step + 1) * plan.flops_per_step, "bpb": bpb})
    del training
    gc.collect()
    return {"curve": curve, "parameters": dict(plan.parameters), "peak_bytes": 0}
