"""Measures training steps of one model with different settings, and attention alone."""

import statistics
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import torch

from megachat.config import Config, load_config
from megachat.device import dtype_name, synchronize
from megachat.job.join import start_mesh
from megachat.job.launch import bootstrap_environment, choose_device
from megachat.kernels.attention import attention, windowed_attention
from megachat.planning.plan import Plan, resolve_plan
from megachat.programs.probe_step import random_rows
from megachat.programs.walk_memory import LiveBytes
from megachat.train.build import build_training_model
from megachat.train.micro_batch_replay import replay_micro_batch
from megachat.train.replicas import compare_replicas
from megachat.train.step import set_schedules, update
from tools.bench.turns import compare_rates, round_ratios, time_in_turn


def build_steps(
    sides: dict[str, tuple[Config, Plan]], rows: torch.Tensor | None = None, note: Callable | None = None
) -> dict[str, Callable]:
    """Builds a model per side on this process. Returns {name: function that takes a step}.

    rows: of each step, int64 [rows, tokens + 1]; random if None. note: replaces the note of the progress recorder,
    which names each part of a step at its begin.
    """
    first_config, _ = next(iter(sides.values()))
    mesh, actions = start_mesh(first_config, choose_device(bootstrap_environment())), {}
    if note:
        mesh.world.progress.note = note
    for name, (config, plan) in sides.items():
        training = build_training_model(config, plan, mesh, torch.ones(plan.dims.vocab_size, dtype=torch.int64))
        set_schedules(training, 0)
        given = random_rows(plan) if rows is None else rows
        actions[name] = lambda training=training, given=given: update(training, given)[0].item()
    return actions


def training_steps(arguments: Namespace, settings: dict[str, list[str]]) -> tuple[dict[str, Callable], Plan]:
    """Builds a model per entry of `settings`. Returns {name: function that takes a step on random rows} and a plan."""
    configs = {name: load_config(arguments.config, [*arguments.set, *changes]) for name, changes in settings.items()}
    sides = {
        name: (config, resolve_plan(config, 1, config.model.vocab_size or arguments.vocab_size))
        for name, config in configs.items()
    }
    return build_steps(sides), next(reversed(sides.values()))[1]


def step_bytes(step) -> int:
    """Returns the peak of the bytes that a step allocates: activations, gradients and workspace."""
    if torch.cuda.is_available():
        synchronize(torch.device("cuda"))
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with LiveBytes() as live:
        step()
    return live.most


def attention_actions(tokens: int, windows: tuple[int, ...], heads: int, head_size: int) -> dict[str, dict]:
    """Returns {shape: {method: forward and backward pass}} for 2,048 tokens in rows of `tokens`, on this CPU."""
    actions: dict[str, dict] = {}
    for dtype in (torch.float32, torch.bfloat16):
        for window in windows:
            shape = (max(1, 2048 // tokens), tokens, heads, head_size)
            inputs = [torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(3)]
            gradient = torch.randn(shape, dtype=dtype)

            def passes(attend, reach, inputs=inputs, gradient=gradient):
                return lambda: torch.autograd.grad(attend(*inputs, reach), inputs, gradient)

            name = f"{dtype_name(dtype)}, {shape[0]} rows of {tokens}, window {window}"
            actions[name] = {
                "mask": passes(attention, window),
                "windowed": passes(windowed_attention, window),
                "no window": passes(attention, tokens),
            }
    return actions


def bench_dtype(arguments: Namespace) -> dict:
    """Measures tokens per second of whole training steps in bfloat16 and in float32, eager."""
    settings = {dtype: [f"precision.compute={dtype}"] for dtype in ("float32", "bfloat16")}
    actions, plan = training_steps(arguments, settings)
    rates = compare_rates(time_in_turn(actions, arguments.rounds), "float32", plan.tokens_per_step)
    return {"what": "training step, tokens per second"} | rates


def bench_recompute(arguments: Namespace) -> dict:
    """Measures tokens per second and peak bytes of whole training steps for each batch.recompute."""
    settings = {kind: [f"batch.recompute={kind}"] for kind in ("none", "selective", "block")}
    actions, plan = training_steps(arguments, settings)
    rates = compare_rates(time_in_turn(actions, arguments.rounds), "none", plan.tokens_per_step)
    for kind, action in actions.items():
        rates[kind]["bytes_in_a_step"] = step_bytes(action)
    return {"what": "training step, tokens per second and bytes", "rows_at_a_time": plan.micro_rows} | rates


def bench_checks(arguments: Namespace) -> dict:
    """Measures what a replay and a comparison of hashes take, in steps, on this process."""
    config = load_config(arguments.config, arguments.set)
    plan = resolve_plan(config, 1, config.model.vocab_size or arguments.vocab_size)
    mesh, rows = start_mesh(config, choose_device(bootstrap_environment())), random_rows(plan)
    training = build_training_model(config, plan, mesh, torch.ones(plan.dims.vocab_size, dtype=torch.int64))
    set_schedules(training, 0)
    actions = {
        "step": lambda: update(training, rows)[0].item(),
        "replay": lambda: replay_micro_batch(training, rows, 0, Path("no evidence")),
        "hashes": lambda: compare_replicas(training, 0, Path("no evidence")),
    }
    seconds = time_in_turn(actions, arguments.rounds)
    steps = {name: round_ratios(seconds[name], seconds["step"]) for name in ("replay", "hashes")}
    return {
        "what": "a replay and a comparison of hashes, in steps of the same round",
        "micro_batches_per_step": plan.accumulation,
        "parameters": plan.parameters["total"],
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "steps": {
            name: {"median": statistics.median(values), "from": min(values), "to": max(values)}
            for name, values in steps.items()
        },
    }


def bench_attention(arguments: Namespace) -> dict:
    """Measures passes per second of attention with windows on this CPU: with a mask, in tiles, and without windows."""
    shapes = {}
    for tokens, windows in ((2048, (768, 512, 128)), (512, (128,))):
        shapes |= attention_actions(tokens, windows, heads=4, head_size=64)
    rates = {name: compare_rates(time_in_turn(ways, arguments.rounds), "mask") for name, ways in shapes.items()}
    return {"what": "attention, passes per second", "found": rates}
