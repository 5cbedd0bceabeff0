"""Whole training steps of one model with different settings, and attention alone, to be measured in turn by tools/bench.py."""

from datetime import timedelta

import torch

from megachat.config import load_config
from megachat.device import collective_backend, synchronize
from megachat.job.launch import bootstrap_environment, choose_device
from megachat.kernels.attention import attention, windowed_attention
from megachat.parallel.engine import start_collectives
from megachat.parallel.mesh import build_mesh
from megachat.planning.plan import Plan, resolve
from megachat.train.build import build_training
from megachat.train.step import set_schedules, update
from tools.bench.live_bytes import LiveBytes


def random_rows(plan: Plan) -> torch.Tensor:
    """A step's rows, int64 [rows, tokens + 1], the same each time."""
    return torch.randint(
        0,
        plan.dims.vocab_size,
        (plan.rows_per_step, plan.dims.sequence_len + 1),
        generator=torch.Generator().manual_seed(0),
    )


def training_steps(arguments, settings: dict[str, list[str]]) -> tuple[dict, Plan]:
    """({name: function that takes a step of the config with these settings}, plan): forward, backward, both optimizers, on random rows."""
    device = choose_device(bootstrap_environment())
    start_collectives(device, collective_backend(device), timedelta(seconds=600))
    mesh, actions = build_mesh(device), {}
    for name, changes in settings.items():
        config = load_config(arguments.config, [*arguments.set, *changes])
        plan = resolve(config, 1, config.model.vocab_size or arguments.vocab_size)
        training = build_training(config, plan, mesh, torch.ones(plan.dims.vocab_size, dtype=torch.int64))
        set_schedules(training, 0)
        rows = random_rows(plan)
        actions[name] = lambda training=training, rows=rows: update(training, rows)[0].item()
    return actions, plan


def step_bytes(step) -> int:
    """The most bytes at a time that a step makes beside what it finds: activations, gradients and workspace."""
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
    """{shape: {way: forward and backward pass}} of 2,048 tokens in rows of `tokens`, on this CPU; a mask computes all pairs of tokens."""
    made = {}
    for dtype in (torch.float32, torch.bfloat16):
        for window in windows:
            shape = (max(1, 2048 // tokens), tokens, heads, head_size)
            inputs = [torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(3)]
            gradient = torch.randn(shape, dtype=dtype)

            def passes(attend, reach, inputs=inputs, gradient=gradient):
                return lambda: torch.autograd.grad(attend(*inputs, reach), inputs, gradient)

            name = f"{str(dtype).removeprefix('torch.')}, {shape[0]} rows of {tokens}, window {window}"
            made[name] = {
                "mask": passes(attention, window),
                "windowed": passes(windowed_attention, window),
                "no window": passes(attention, tokens),
            }
    return made
