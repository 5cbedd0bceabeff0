"""Shared by the GPU tests: FP8's recipes written out in float32, distances, a small model without zero gradients."""

import pytest
import torch

from megachat.kernels.fp8 import PRODUCTS, Fp8Choice, apply_fp8, block_rounded, head_products
from megachat.kernels.linear import Linear
from megachat.kernels.te import TELinears, te_problem
from megachat.model.gpt import Loss, ModelOptions, build_layers, run_layers
from megachat.model.parameters import load_whole, placed_parameters, starting_value
from megachat.place import place_of
from megachat.planning.dimensions import Dimensions, window_sizes

DEVICE = torch.device("cuda")
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def need_te(recipe=None) -> None:
    problem = te_problem(DEVICE, recipe)
    if problem:
        pytest.skip(f"Transformer Engine is not available: {problem}")


def need_fp8() -> None:
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no FP8")


def need(backend: str, recipe: str) -> None:
    need_fp8()
    if backend == "te":
        need_te(recipe)


def rel(result: torch.Tensor, expected: torch.Tensor) -> float:
    return ((result.float() - expected.float()).norm() / expected.float().norm()).item()


def cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    return torch.nn.functional.cosine_similarity(one.double().flatten(), other.double().flatten(), dim=0).item()


def rounded(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """nanochat's rounding: one scale from the largest magnitude, in float64; as float32 values."""
    largest = torch.finfo(dtype).max
    scale = largest / x.double().abs().max()
    return ((x.double() * scale).clamp(-largest, largest).to(dtype).double() / scale).float()


def emulated(recipe: str, x: torch.Tensor, w: torch.Tensor, g: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """(y, dx, dw) float32 of rows x [n, in], weight w [out, in] and the output's gradient g."""
    if recipe == "tensorwise":
        x8, w8, g8 = rounded(x, E4M3), rounded(w, E4M3), rounded(g, E5M2)
        return x8 @ w8.T, g8 @ w8, g8.T @ x8
    x, w, g = x.float(), block_rounded(w.float(), 128, 128), g.float()
    return (
        block_rounded(x, 1, 128) @ w.T,
        block_rounded(g, 1, 128) @ w,
        block_rounded(g, 128, 1).T @ block_rounded(x, 128, 1),
    )


def product(backend: str, recipe: str | None, weight: torch.Tensor):
    if backend == "te":
        return TELinears(recipe).build(weight)
    return PRODUCTS[recipe] if recipe else lambda x, w: torch.nn.functional.linear(x, w.to(x.dtype))


def linear_case(tokens: int, columns: int, rows: int, weight_dtype=torch.float32):
    generator = torch.Generator(DEVICE).manual_seed(tokens + columns + rows)
    x = torch.randn(tokens, columns, generator=generator, device=DEVICE).bfloat16().requires_grad_()
    weight = (0.05 * torch.randn(rows, columns, generator=generator, device=DEVICE)).to(weight_dtype)
    return x, torch.nn.Parameter(weight), torch.randn(tokens, rows, generator=generator, device=DEVICE).bfloat16()


def results(multiply, x, weight, g) -> tuple[torch.Tensor, ...]:
    y = multiply(x, weight)
    return y.detach(), *torch.autograd.grad(y, (x, weight), g)


def dims_of(depth: int, sequence_len: int = 512, vocab_size: int = 4096, pattern: str = "SSSL") -> Dimensions:
    width = 64 * depth
    heads = -(-width // 128)
    return Dimensions(
        depth, heads * 128, heads, heads, 128, sequence_len, vocab_size, window_sizes(pattern, depth, sequence_len)
    )


def model(
    dims: Dimensions, *, backend: str | None = None, recipe: str | None = None, compiled: bool = False, **options
):
    """(layers, loss) of bfloat16 on the GPU; backend "te" without a recipe: Transformer Engine's linears in bfloat16.

    options: of the model, as attend and recompute.
    """
    layers = build_layers(dims, ModelOptions(torch.bfloat16, **options))
    for parameter in placed_parameters(layers):
        place = place_of(parameter)
        start = ("normal", 0.02) if place.start == ("constant", 0.0) and len(place.whole) == 2 else place.start
        start = ("constant", 0.5) if place.name == "smear_lambda" else start
        load_whole(
            parameter,
            starting_value(place.__class__(place.name, place.whole, place.block, start, offset=place.offset), seed=3),
        )
    layers = layers.to(DEVICE)
    choice = Fp8Choice(recipe, backend, "") if recipe else None
    if recipe:
        assert apply_fp8(list(layers), choice)
    elif backend == "te":
        for linear in (
            module for module in layers.modules() if isinstance(module, Linear) and min(module.weight.shape) >= 128
        ):
            linear.product = TELinears(None).build(linear.weight)
    if compiled:
        for layer in layers:
            layer.compile(dynamic=False)
    return layers, Loss(dims, torch.ones(dims.vocab_size), products=head_products(choice, dims, 1)).to(DEVICE)


def loss_and_gradients(layers, loss, dims: Dimensions, rows: int = 4):
    ids = torch.randint(
        0, dims.vocab_size, (rows, dims.sequence_len + 1), generator=torch.Generator().manual_seed(4)
    ).to(DEVICE)
    layers.zero_grad()
    value = loss(run_layers(layers, ids[:, :-1]), ids[:, 1:])
    value.backward()
    return value.item(), {
        (place_of(p).name, place_of(p).block): p.grad.detach().clone() for p in placed_parameters(layers)
    }


def most_apart(result: dict, expected: dict) -> tuple[float, float]:
    """(largest relative distance of a matrix's gradient; that of a scalar's over the largest scalar's gradient, because
    such a sum over all tokens nearly cancels in one layer or another, and then is rounding alone).
    """
    scale = max(gradient.abs().max().item() for gradient in expected.values() if gradient.numel() == 1)
    matrices = [rel(gradient, expected[name]) for name, gradient in result.items() if gradient.numel() > 1]
    return max(matrices), max(
        (gradient - expected[name]).abs().item() for name, gradient in result.items() if gradient.numel() == 1
    ) / scale
