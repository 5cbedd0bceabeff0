"""Measures nanochat's own model and optimizer, imported from a clone. Nothing in megachat needs nanochat."""

import argparse
import contextlib
import importlib
import statistics
import sys
from pathlib import Path
from types import ModuleType

import torch

from megachat.config import load_config
from megachat.errors import UserError
from megachat.planning.plan import Plan
from tools.bench.turns import compare_rates, time_in_turn


def require_clone(folder: str | None) -> None:
    """Raises UserError if `folder` is not a clone of nanochat."""
    if not folder:
        raise UserError("this measurement requires a clone of nanochat, but --nanochat is not given: give its folder")
    if not (Path(folder) / "nanochat" / "gpt.py").is_file():
        raise UserError(
            f"--nanochat {folder} is not a clone of nanochat: it has no nanochat/gpt.py; give a clone's folder"
        )


def open_nanochat(clone: str | None) -> tuple[ModuleType, ModuleType]:
    """Returns nanochat's modules gpt and flash_attention. Raises UserError without a clone or a required package."""
    require_clone(clone)
    if clone not in sys.path:
        sys.path.insert(0, clone)
    try:
        return importlib.import_module("nanochat.gpt"), importlib.import_module("nanochat.flash_attention")
    except ImportError as error:
        raise UserError(
            f"nanochat in {clone} cannot be imported ({error}): install the packages in its pyproject.toml"
        ) from error


def build_nanochat(clone: str, plan: Plan, pattern: str, device: torch.device, *, fp8: bool = False):
    """Returns nanochat's GPT of the plan's shapes, its compiled form and optimizer, as scripts/base_train.py does."""
    gpt, _ = open_nanochat(clone)
    dims = plan.dims
    sizes = {"n_layer": dims.depth, "n_head": dims.heads, "n_kv_head": dims.kv_heads, "n_embd": dims.width}
    sizes |= {"sequence_len": dims.sequence_len, "vocab_size": dims.vocab_size}
    with torch.device("meta"), contextlib.redirect_stdout(sys.stderr):  # standard output is for the result
        model = gpt.GPT(gpt.GPTConfig(window_pattern=pattern, **sizes))
    model.to_empty(device=device)
    model.init_weights()
    if fp8:
        from nanochat.fp8 import Float8LinearConfig, convert_to_float8_training

        def fits(module, name) -> bool:
            sides = (getattr(module, "in_features", 0), getattr(module, "out_features", 0))
            return isinstance(module, torch.nn.Linear) and min(sides) >= 128 and not any(side % 16 for side in sides)

        convert_to_float8_training(
            model, config=Float8LinearConfig.from_recipe_name("tensorwise"), module_filter_fn=fits
        )
    with contextlib.redirect_stdout(sys.stderr):
        optimizer = model.setup_optimizer()
    return model, torch.compile(model, dynamic=False), optimizer


def accumulate(run, rows: torch.Tensor, micro_rows: int, device: torch.device) -> torch.Tensor:
    """Runs the passes of a step's rows, int64 [count, tokens + 1], `micro_rows` at a time. Returns the last loss."""
    parts = rows.split(micro_rows)
    for part in parts:
        part = part.to(device)
        loss = run(part[:, :-1].contiguous(), part[:, 1:].contiguous())
        (loss / len(parts)).backward()
    return loss.detach()


def row_counts(text: str, rows_per_step: int) -> list[int]:
    """Parses --nanochat-rows. Raises UserError for numbers that do not divide the rows of a step."""
    counts = [int(word) if word.isdigit() else 0 for word in text.split()]
    if not counts or any(count < 1 or rows_per_step % count for count in counts):
        raise UserError(f"--nanochat-rows {text!r} must be divisors of the {rows_per_step} rows of a step, as '1 2 4'")
    return counts


def nanochat_steps(arguments: argparse.Namespace, plan: Plan, pattern: str) -> dict:
    """Returns {"nanochat, N rows at a time": function that takes a step} for each N in --nanochat-rows."""
    from tools.bench.step import random_rows  # imports DeepSpeed, which tools/bench/gpu.py must not import here

    counts, device = row_counts(arguments.nanochat_rows, plan.rows_per_step), torch.device("cpu")
    model, run, optimizer = build_nanochat(arguments.nanochat, plan, pattern, device)
    rows = random_rows(plan)

    def step(count: int) -> float:
        loss = accumulate(run, rows, count, device)
        optimizer.step()
        model.zero_grad(set_to_none=True)
        return loss.item()

    return {f"nanochat, {count} rows at a time": lambda count=count: step(count) for count in counts}


def bench_nanochat(arguments: argparse.Namespace) -> dict:
    """Measures tokens per second of whole training steps on this CPU, of megachat and of nanochat at the same shapes.

    megachat computes in bfloat16, eager and compiled. nanochat computes in float32, compiled, with its fastest number
    of rows per pass.
    """
    from tools.bench.step import training_steps

    gpt, _ = open_nanochat(arguments.nanochat)
    compiled = {"bfloat16": "false", "bfloat16 compiled": "true"}
    settings = {name: ["precision.compute=bfloat16", f"precision.compile={on}"] for name, on in compiled.items()}
    actions, plan = training_steps(arguments, settings)
    actions |= nanochat_steps(arguments, plan, load_config(arguments.config, arguments.set).model.window_pattern)
    seconds = time_in_turn(actions, arguments.rounds)
    best = min(seconds.keys() - compiled.keys(), key=lambda name: statistics.median(seconds[name]))
    facts = {
        "threads": torch.get_num_threads(),
        "nanochat_computes_in": str(gpt.COMPUTE_DTYPE),
        "rows_at_a_time": plan.micro_rows,
        "baseline": best,
    }
    return {"what": "training step, tokens per second"} | facts | compare_rates(seconds, best, plan.tokens_per_step)
