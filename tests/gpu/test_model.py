"""Checks 7 and 8: whole models on Transformer Engine, in FP8 and compiled, against plain bfloat16; training."""

from datetime import timedelta

import pytest
import torch

from megachat.kernels.choice import choose_attention
from tests.gpu.fp8 import DEVICE, cosine, dims_of, loss_and_gradients, model, most_apart, need, need_te
from tests.training import small_config, take_step


@pytest.fixture(scope="module")
def plain():
    dims = dims_of(4)
    return loss_and_gradients(*model(dims), dims)


def check_near(value, gradients, plain):
    matrices, scalars = most_apart(gradients, plain[1])
    assert abs(value - plain[0]) < 2e-3 and matrices < 3e-2 and scalars < 0.1


def test_7_transformer_engine_in_bfloat16_is_torch(plain, report):
    need_te()
    dims = dims_of(4)
    value, gradients = loss_and_gradients(
        *model(dims, backend="te", attend=choose_attention("te", DEVICE, torch.bfloat16, dims).attend), dims
    )
    report("loss, plain", [value, plain[0]])
    check_near(value, gradients, plain)


@pytest.mark.parametrize("recompute", ["selective", "block"])
@pytest.mark.parametrize("backend", ["te", "torch"])
def test_4_a_recomputed_model_is_in_fp8_again(backend, recompute):
    need(backend, "tensorwise")
    dims = dims_of(4)
    kept, again = (
        loss_and_gradients(*model(dims, backend=backend, recipe="tensorwise", recompute=kind), dims)
        for kind in ("none", recompute)
    )
    matrices, _ = most_apart(again[1], kept[1])  # not to the bit: attention and the tables add up in any order
    assert abs(again[0] - kept[0]) < 1e-4 and matrices < 5e-3


@pytest.mark.parametrize("name", ["auto", "flex"])
def test_7_a_compiled_model_with_other_attention_is_the_plain_one(name, plain, report):
    dims = dims_of(4)
    choice = choose_attention(name, DEVICE, torch.bfloat16, dims)
    value, gradients = loss_and_gradients(*model(dims, attend=choice.attend, compiled=True), dims)
    report(f"{choice.name}: loss, plain", [value, plain[0]])
    check_near(value, gradients, plain)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    ("backend", "recipe"), [("te", "tensorwise"), ("te", "blockwise"), ("torch", "tensorwise"), ("torch", "blockwise")]
)
def test_7_fp8_is_near_bfloat16_and_is_not_it(backend, recipe, compiled, plain, report):
    need(backend, recipe)
    dims = dims_of(4)
    value, gradients = loss_and_gradients(*model(dims, backend=backend, recipe=recipe, compiled=compiled), dims)
    matrices = {
        name: cosine(gradient, plain[1][name])
        for name, gradient in gradients.items()
        if ".attn.c_" in name[0] or ".mlp." in name[0]
    }
    report(f"{backend} {recipe}: loss, plain, least cosine", [value, plain[0], min(matrices.values())])
    assert 0 < abs(value - plain[0]) < 2e-2 and min(matrices.values()) > 0.98
    assert max(matrices.values()) < 1 - 1e-5, "FP8 changed nothing"


def test_7_checkpoints_are_the_same_for_every_backend(plain):
    need_te("tensorwise")
    dims = dims_of(4)
    layers, loss = model(dims)
    with_te, _ = model(dims, backend="te", recipe="tensorwise")
    torch.nn.init.normal_(with_te[1].mlp.c_fc.weight, std=0.03)
    layers.load_state_dict(with_te.state_dict(), strict=True)
    value, _ = loss_and_gradients(layers, loss, dims)
    again, loss = model(dims, backend="te")
    again.load_state_dict(layers.state_dict(), strict=True)
    assert value != plain[0] and abs(loss_and_gradients(again, loss, dims)[0] - value) < 2e-3


def trained(fp8: str, backend: str, mesh, steps: int = 50) -> list[float]:
    from megachat.planning.plan import resolve_plan
    from megachat.programs.verify_layout import related_rows
    from megachat.train.build import build_training_model
    from megachat.train.step import set_schedules

    sizes = {
        "depth": 6,
        "aspect_ratio": 64,
        "head_size": 128,
        "kv_heads": None,
        "sequence_len": 512,
        "window_pattern": "SSSL",
    }
    precision = {"compute": "bfloat16", "fp8": fp8, "fp8_backend": backend}
    config = small_config(
        model=sizes, batch={"tokens": 16 * 512, "micro_rows": 8}, horizon={"steps": steps}, precision=precision
    )
    plan = resolve_plan(config, 1, 4096)
    training = build_training_model(config, plan, mesh, torch.ones(4096, dtype=torch.int64))
    losses = []
    for step in range(steps):
        set_schedules(training, step)
        losses.append(take_step(training, related_rows(step, 16, 513, 4096))[0])
    return losses


@pytest.fixture(scope="module")
def mesh():
    from megachat.job.launch import bootstrap_environment, choose_device
    from megachat.parallel.build import start_collectives
    from megachat.parallel.mesh import build_mesh

    device = choose_device(bootstrap_environment())
    start_collectives(device, "nccl", timedelta(seconds=120))
    return build_mesh(device)


@pytest.fixture(scope="module")
def bf16_losses(mesh):
    return trained("off", "auto", mesh)


@pytest.mark.parametrize(("recipe", "backend"), [("tensorwise", "te"), ("blockwise", "te"), ("tensorwise", "torch")])
def test_8_fifty_steps_in_fp8_end_where_bfloat16_does(recipe, backend, mesh, bf16_losses, report):
    need(backend, recipe)
    losses = trained(recipe, backend, mesh)
    ends = [sum(curve[-5:]) / 5 for curve in (losses, bf16_losses)]
    report(f"{backend} {recipe}: mean of the last five losses, bfloat16's", ends)
    assert bf16_losses[-1] < bf16_losses[0] - 0.5, "bfloat16 learned nothing, so this shows nothing"
    assert losses != bf16_losses and abs(ends[0] - ends[1]) < 0.03
