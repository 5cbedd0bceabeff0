"""nanochat's own model and optimizer, imported from a clone of it, for measurements only: nothing of megachat needs it."""

import argparse
import contextlib
import importlib
import sys
from pathlib import Path
from types import ModuleType

import torch

from megachat.errors import UserError
from megachat.planning.plan import Plan


def require_clone(folder: str | None) -> None:
    """Raises UserError when `folder` is not one with nanochat's model in it."""
    if not folder:
        raise UserError(
            "this measurement needs a clone of nanochat and --nanochat is not given: give the folder of one"
        )
    if not (Path(folder) / "nanochat" / "gpt.py").is_file():
        raise UserError(
            f"--nanochat {folder} is no clone of nanochat, because it lacks nanochat/gpt.py: give the folder of one"
        )


def open_nanochat(clone: str | None) -> tuple[ModuleType, ModuleType]:
    """nanochat's (gpt, flash_attention) modules. Raises UserError when `clone` is none, or something that nanochat needs is not installed."""
    require_clone(clone)
    if clone not in sys.path:
        sys.path.insert(0, clone)
    try:
        return importlib.import_module("nanochat.gpt"), importlib.import_module("nanochat.flash_attention")
    except ImportError as error:
        raise UserError(
            f"nanochat in {clone} cannot be imported ({error}): install what its pyproject.toml names"
        ) from error


def build_nanochat(clone: str, plan: Plan, pattern: str, device: torch.device, *, fp8: bool = False):
    """(its GPT, the same under torch.compile, its optimizer) of the plan's shapes, set up as its scripts/base_train.py does."""
    gpt, _ = open_nanochat(clone)
    dims = plan.dims
    sizes = {"n_layer": dims.depth, "n_head": dims.heads, "n_kv_head": dims.kv_heads, "n_embd": dims.width}
    with (
        torch.device("meta"),
        contextlib.redirect_stdout(sys.stderr),
    ):  # it prints, and standard output is the measurement's
        model = gpt.GPT(
            gpt.GPTConfig(sequence_len=dims.sequence_len, vocab_size=dims.vocab_size, window_pattern=pattern, **sizes)
        )
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
    """Forward and backward passes of a step's rows int64 [count, tokens + 1] on any device, `micro_rows` at a time; returns the last loss."""
    parts = rows.split(micro_rows)
    for part in parts:
        part = part.to(device)
        loss = run(part[:, :-1].contiguous(), part[:, 1:].contiguous())
        (loss / len(parts)).backward()
    return loss.detach()


def row_counts(asked: str, rows_per_step: int) -> list[int]:
    """Rows at a time, of which one after the other is tried. Raises UserError for what does not divide a step."""
    counts = [int(word) if word.isdigit() else 0 for word in asked.split()]
    if not counts or any(count < 1 or rows_per_step % count for count in counts):
        raise UserError(
            f"--nanochat-rows {asked!r} must be divisors of the {rows_per_step} rows of a step, with spaces between them"
        )
    return counts


def nanochat_steps(arguments: argparse.Namespace, plan: Plan, pattern: str) -> dict:
    """{"nanochat, N rows at a time": function that takes a step of one model with its optimizer}, for each N that is asked for."""
    from tools.bench.step import random_rows  # its engine is no business of the others here

    counts, device = row_counts(arguments.nanochat_rows, plan.rows_per_step), torch.device("cpu")
    model, run, optimizer = build_nanochat(arguments.nanochat, plan, pattern, device)
    rows = random_rows(plan)

    def step(count: int) -> float:
        loss = accumulate(run, rows, count, device)
        optimizer.step()
        model.zero_grad(set_to_none=True)
        return loss.item()

    return {f"nanochat, {count} rows at a time": lambda count=count: step(count) for count in counts}
