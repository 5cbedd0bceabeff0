"""Checks 1 to 5: packages, Transformer Engine's linears against torch's, FP8 against its recipe, refused sizes."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from megachat.kernels.fp8 import Fp8Choice, apply_fp8
from megachat.kernels.linear import Linear
from tests.gpu.fp8 import DEVICE, emulated, linear_case, need, need_te, product, rel, results

SHAPES = [(768, 768), (768, 3072), (3072, 768), (1536, 6144), (768, 32768)]  # columns, rows
BACKENDS = [("te", "tensorwise"), ("te", "blockwise"), ("torch", "tensorwise"), ("torch", "blockwise")]


def test_1_installed_packages(report):
    from importlib import metadata

    for package in ("torch", "transformer_engine", "flash_attn", "flash_attn_3", "deepspeed", "triton"):
        try:
            report(package, metadata.version(package))
        except metadata.PackageNotFoundError:
            report(package, "absent")
    report("device", torch.cuda.get_device_name())
    report("cudnn", torch.backends.cudnn.version())
    need_te("tensorwise")


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("columns", "rows"), SHAPES)
def test_2_linears_of_transformer_engine_are_torchs_in_bfloat16(columns, rows, weight_dtype):
    need_te()
    x, weight, g = linear_case(4096, columns, rows, weight_dtype)
    result, expected = (
        results(product("te", None, weight), x, weight, g),
        results(product("torch", None, weight), x, weight, g),
    )
    assert result[2].dtype == weight_dtype
    for name, one, other in zip(("y", "dx", "dw"), result, expected, strict=True):
        assert rel(one, other) < 5e-3, name


@pytest.mark.parametrize(("backend", "recipe"), BACKENDS)
@pytest.mark.parametrize(("columns", "rows"), SHAPES)
def test_3_fp8_follows_its_recipe_and_is_not_bfloat16(columns, rows, backend, recipe, report):
    need(backend, recipe)
    x, weight, g = linear_case(4096, columns, rows)
    result = results(product(backend, recipe, weight), x, weight, g)
    expected, plain = (
        emulated(recipe, x.detach(), weight.detach(), g),
        results(product("torch", None, weight), x, weight, g),
    )
    off = [rel(one, other) for one, other in zip(result, expected, strict=True)]
    from_bf16 = [rel(one, other) for one, other in zip(result, plain, strict=True)]
    report(f"{backend} {recipe} {columns}x{rows}: y, dx, dw against the recipe, against bfloat16", [off, from_bf16])
    assert off[0] < 1e-2 and max(off[1:]) < 6e-3  # forward sums with fewer bits
    if recipe == "tensorwise":
        assert 1e-2 < from_bf16[0] < 6e-2 and all(2e-2 < value < 9e-2 for value in from_bf16[1:])
    else:
        assert all(1e-2 < value < 6e-2 for value in from_bf16)


@pytest.mark.parametrize(("backend", "recipe"), BACKENDS)
def test_4_evaluation_and_recomputation(backend, recipe):
    need(backend, recipe)
    x, weight, g = linear_case(4096, 768, 3072)
    linear = Linear(768, 3072).to(DEVICE)
    linear.weight = weight
    expected = linear(x)
    assert apply_fp8([torch.nn.ModuleDict({"c_fc": linear})], Fp8Choice(recipe, backend, "")) == 1
    first = results(lambda x, w: linear(x), x, weight, g)
    assert rel(first[0], expected) > 1e-3
    with torch.no_grad():
        assert torch.equal(linear.eval()(x), expected)
    again = results(lambda x, w: linear.train()(x), x, weight, g)
    recomputed = results(lambda x, w: checkpoint(linear, x, use_reentrant=False), x, weight, g)
    for one, other, third in zip(first, again, recomputed, strict=True):
        assert torch.equal(one, other) and rel(third, one) < 1e-6


@pytest.mark.parametrize(("backend", "recipe"), BACKENDS)
def test_5_unaligned_tokens_are_refused_in_fp8_alone(backend, recipe):
    need(backend, recipe)
    x, weight, _ = linear_case(1000, 768, 768)
    with pytest.raises(ValueError, match="FP8 needs multiples of"):
        product(backend, recipe, weight)(x, weight)
    if backend == "te":
        assert product("te", None, weight)(x, weight).shape == (1000, 768)


def test_te_and_torch_agree_in_fp8():
    need("te", "tensorwise")
    x, weight, g = linear_case(4096, 1536, 6144)
    pair = [results(product(backend, "tensorwise", weight), x, weight, g) for backend in ("te", "torch")]
    for one, other in zip(*pair, strict=True):
        assert rel(one, other) < 1e-2
