"""Matrix products in FP8 with torch alone: the reference for Transformer Engine's, and the version for CPUs and GPUs
without it.

tensorwise: nanochat's recipe and Transformer Engine's Float8CurrentScaling. Inputs and weights are e4m3, output
gradients e5m2 (FP8 formats, arXiv 2209.05433), with one scale per tensor from its largest magnitude at each use.
blockwise: Float8BlockScaling, as in DeepSeek-V3 (arXiv 2412.19437). Everything is e4m3, with a power of two per 128
numbers along the summed dim, and per 128 x 128 of a weight.

A tensor with an infinity or NaN gives NaN.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from megachat.kernels.cross_entropy import PlainProducts
from megachat.kernels.linear import Linear
from megachat.kernels.te import TELinears
from megachat.planning.dimensions import FP8_TILES, Dimensions, check_fp8_multiples, fits_fp8, head_fits_fp8

INPUT, GRADIENT = torch.float8_e4m3fn, torch.float8_e5m2
FP8_TILE = FP8_TILES["blockwise"]


def quantized(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (x in the FP8 `dtype` scaled to its full range, row-major; the float32 0-dim factor that restores x)."""
    largest = torch.finfo(dtype).max
    peak = torch.linalg.vector_norm(x, torch.inf).float()
    scale = torch.where(peak == 0, 1.0, _scale_to(largest, peak))
    return (x.float() * scale).clamp(-largest, largest).to(dtype).contiguous(), scale.reciprocal()


def _scale_to(largest: float, peak: torch.Tensor) -> torch.Tensor:
    """Returns largest / peak in float32, clamped to float32's range.

    The division is float64: torch multiplies by the reciprocal, which in float32 misses powers of two by one bit.
    bfloat16 values in the middle between two FP8 numbers would then be rounded the other way.
    """
    return (largest / peak.double()).clamp(max=torch.finfo(torch.float32).max).float()


def column_major(x: torch.Tensor) -> torch.Tensor:
    """Returns the matrix stored column by column, as the second factor of an FP8 product must be."""
    return x.t().contiguous().t()


def scaled_product(
    a: torch.Tensor,
    b: torch.Tensor,
    restore_a: torch.Tensor,
    restore_b: torch.Tensor,
    out: torch.dtype,
    *,
    fast: bool = False,
):
    """Multiplies a [m, k] by b [k, n] (column-major), both FP8, and restores their scales: [m, n] of dtype `out`.

    fast: sum in fewer bits where the GPU can.
    """
    return torch._scaled_mm(a, b, scale_a=restore_a, scale_b=restore_b, out_dtype=out, use_fast_accum=fast)


class _Tensorwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        (x8, x_factor), (w8, w_factor) = quantized(x, INPUT), quantized(weight, INPUT)
        ctx.save_for_backward(x8, x_factor, w8, w_factor)
        ctx.weight_dtype = weight.dtype
        return scaled_product(x8, w8.t(), x_factor, w_factor, x.dtype, fast=True)

    @staticmethod
    def backward(ctx, gradient):
        x8, x_factor, w8, w_factor = ctx.saved_tensors
        g8, g_factor = quantized(gradient, GRADIENT)
        x_gradient = weight_gradient = None
        if ctx.needs_input_grad[0]:
            x_gradient = scaled_product(g8, column_major(w8), g_factor, w_factor, gradient.dtype)
        if ctx.needs_input_grad[1]:
            product = scaled_product(g8.t().contiguous(), column_major(x8), g_factor, x_factor, gradient.dtype)
            weight_gradient = product.to(ctx.weight_dtype)
        return x_gradient, weight_gradient


def block_rounded(x: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Rounds x [n, m] to what e4m3 can hold with one power of two per [rows, columns] tile. bfloat16 holds the result
    exactly.
    """
    largest = torch.finfo(INPUT).max
    tiles = x.float().view(x.size(0) // rows, rows, x.size(1) // columns, columns)
    peak = tiles.abs().amax(dim=(1, 3), keepdim=True)
    scale = torch.ldexp(torch.ones_like(peak), torch.frexp(_scale_to(largest, peak)).exponent - 1)
    scale = torch.where(peak == 0, 1.0, torch.where(peak.isfinite(), scale, torch.nan))
    return ((tiles * scale).clamp(-largest, largest).to(INPUT).float() / scale).view(x.shape).to(x.dtype)


class _Blockwise(torch.autograd.Function):
    """Multiplies the rounded values in bfloat16, which holds them exactly and is summed in float32: the recipe's
    results, not its speed.
    """

    @staticmethod
    def forward(ctx, x, weight):
        w = block_rounded(weight, FP8_TILE, FP8_TILE).to(x.dtype)
        ctx.save_for_backward(x, w)
        ctx.weight_dtype = weight.dtype
        return F.linear(block_rounded(x, 1, FP8_TILE), w)

    @staticmethod
    def backward(ctx, gradient):
        x, w = ctx.saved_tensors
        x_gradient = block_rounded(gradient, 1, FP8_TILE) @ w if ctx.needs_input_grad[0] else None
        weight_gradient = None
        if ctx.needs_input_grad[1]:  # summed over tokens, so the tiles run along tokens
            product = block_rounded(gradient, FP8_TILE, 1).t() @ block_rounded(x, FP8_TILE, 1)
            weight_gradient = product.to(ctx.weight_dtype)
        return x_gradient, weight_gradient


def tensorwise(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Computes x [..., in] weight^T [in, out] with one scale per tensor. Raises ValueError unless tokens and sides are
    multiples of the tile.
    """
    return _multiply(_Tensorwise, x, weight, FP8_TILES["tensorwise"])


def blockwise(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Computes x [..., in] weight^T [in, out] with one scale per tile, in x's dtype (bfloat16). Raises ValueError as
    `tensorwise`.
    """
    return _multiply(_Blockwise, x, weight, FP8_TILE)


def _multiply(function, x: torch.Tensor, weight: torch.Tensor, tile: int) -> torch.Tensor:
    check_fp8_multiples(x.numel() // x.size(-1), weight.shape, tile)
    return function.apply(x.reshape(-1, x.size(-1)), weight).view(*x.shape[:-1], weight.size(0))


class TensorwiseHead(PlainProducts):
    """Rounds hidden states and table once, with a scale each, and the logits' gradient with a scale per chunk."""

    row_multiple = FP8_TILES["tensorwise"]

    def __init__(self, hidden: torch.Tensor, table: torch.Tensor):
        self.dtype = hidden.dtype
        self.hidden, self.hidden_factor = quantized(hidden, INPUT)
        self.table, self.table_factor = quantized(table, INPUT)
        self.table_columns = column_major(self.table)

    def logits(self, chunk: slice) -> torch.Tensor:
        factors = self.hidden_factor, self.table_factor
        return scaled_product(self.hidden[chunk], self.table.t(), *factors, self.dtype, fast=True)

    def write_gradients(
        self, gradient: torch.Tensor, chunk: slice, hidden_gradient: torch.Tensor, table_gradient: torch.Tensor
    ) -> None:
        g8, factor = quantized(gradient, GRADIENT)
        hidden_gradient.copy_(scaled_product(g8, self.table_columns, factor, self.table_factor, self.dtype))
        hidden = column_major(self.hidden[chunk])
        table_gradient += scaled_product(g8.t().contiguous(), hidden, factor, self.hidden_factor, self.dtype)


class BlockwiseHead(PlainProducts):
    """Multiplies as `blockwise`, chunk by chunk."""

    row_multiple = FP8_TILE

    def __init__(self, hidden: torch.Tensor, table: torch.Tensor):
        self.hidden, self.table = hidden, block_rounded(table, FP8_TILE, FP8_TILE)

    def logits(self, chunk: slice) -> torch.Tensor:
        return F.linear(block_rounded(self.hidden[chunk], 1, FP8_TILE), self.table)

    def write_gradients(
        self, gradient: torch.Tensor, chunk: slice, hidden_gradient: torch.Tensor, table_gradient: torch.Tensor
    ) -> None:
        torch.mm(block_rounded(gradient, 1, FP8_TILE), self.table, out=hidden_gradient)
        table_gradient += block_rounded(gradient, FP8_TILE, 1).T @ block_rounded(self.hidden[chunk], FP8_TILE, 1)


PRODUCTS = {"tensorwise": tensorwise, "blockwise": blockwise}
HEADS: dict[str, type[PlainProducts]] = {"tensorwise": TensorwiseHead, "blockwise": BlockwiseHead}


@dataclass(frozen=True)
class Fp8Choice:
    """recipe: "tensorwise" or "blockwise". backend: "te" or "torch". reason: why this backend."""

    recipe: str
    backend: str
    reason: str


def apply_fp8(layers: list[nn.Module], choice: Fp8Choice) -> int:
    """Makes every linear of the layers train in FP8 if its weight, as this rank holds it, fits; returns how many do.

    lm_head is multiplied in the loss: see `head_products`.
    """
    modules = (named for layer in layers for named in layer.named_modules())
    linears = [module for name, module in modules if isinstance(module, Linear) and name != "lm_head"]
    fitting = [linear for linear in linears if fits_fp8(linear.weight.size(0), linear.weight.size(1), choice.recipe)]
    te_linears = TELinears(choice.recipe) if choice.backend == "te" and fitting else None
    for linear in fitting:
        linear.product = te_linears.build(linear.weight) if te_linears else PRODUCTS[choice.recipe]
    return len(fitting)


def head_products(
    choice: Fp8Choice | None, dims: Dimensions, tensor: int, plain: type[PlainProducts] = PlainProducts
) -> type[PlainProducts]:
    """Returns how the head multiplies in training. FP8 is always torch's here: Transformer Engine's layers cannot make
    logits in chunks. plain: without FP8.
    """
    return HEADS[choice.recipe] if choice and head_fits_fp8(dims, tensor, choice.recipe) else plain
