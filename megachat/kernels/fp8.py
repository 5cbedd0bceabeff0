"""Matrix products in eight bits with torch alone: on GPUs without Transformer Engine, on CPUs, and as the oracle of its results.

tensorwise: nanochat's recipe and Transformer Engine's Float8CurrentScaling. Inputs and weights in e4m3, gradients of outputs in e5m2 (FP8 formats,
arXiv 2209.05433), one scale a tensor from its own largest magnitude at each use. blockwise: Float8BlockScaling, as in DeepSeek-V3 (arXiv
2412.19437): e4m3 everywhere, a power of two for each 128 numbers along the sum, for each 128 x 128 of a weight.

What is not finite stays so: a tensor with an infinity or NaN gives NaN.
"""

import torch
import torch.nn.functional as F

from megachat.kernels.cross_entropy import PlainProducts
from megachat.planning.dimensions import FP8_TILES

INPUT, GRADIENT = torch.float8_e4m3fn, torch.float8_e5m2
TILE = FP8_TILES["blockwise"]


def quantized(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """(x in the FP8 `dtype` filling its range, row-major; the float32 0-dim factor that restores it)."""
    largest = torch.finfo(dtype).max
    peak = torch.linalg.vector_norm(x, torch.inf).float()
    scale = torch.where(peak == 0, 1.0, _quotient(largest, peak))
    return (x.float() * scale).clamp(-largest, largest).to(dtype).contiguous(), scale.reciprocal()


def _quotient(largest: float, peak: torch.Tensor) -> torch.Tensor:
    """largest / peak, float32, not beyond its range. torch multiplies by the reciprocal: in float32 it would miss powers of two by a bit, with
    which bfloat16 values lie on the other side of the middle between two FP8 numbers."""
    return (largest / peak.double()).clamp(max=torch.finfo(torch.float32).max).float()


def column_major(x: torch.Tensor) -> torch.Tensor:
    """The same matrix with its columns in a row in memory, as the second factor of an FP8 product must lie."""
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
    """a [m, k] times b [k, n], column-major, both FP8, with their factors -> [m, n] of dtype `out`. fast: sum in fewer bits, where the GPU can."""
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
        into_x = (
            scaled_product(g8, column_major(w8), g_factor, w_factor, gradient.dtype)
            if ctx.needs_input_grad[0]
            else None
        )
        into_weight = None
        if ctx.needs_input_grad[1]:
            into_weight = scaled_product(g8.t().contiguous(), column_major(x8), g_factor, x_factor, gradient.dtype).to(
                ctx.weight_dtype
            )
        return into_x, into_weight


def block_rounded(x: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """x [n, m] rounded to what e4m3 with one power of two for each [rows, columns] tile can hold. bfloat16 holds that exactly."""
    largest = torch.finfo(INPUT).max
    tiles = x.float().view(x.size(0) // rows, rows, x.size(1) // columns, columns)
    peak = tiles.abs().amax(dim=(1, 3), keepdim=True)
    scale = torch.ldexp(torch.ones_like(peak), torch.frexp(_quotient(largest, peak)).exponent - 1)
    scale = torch.where(peak == 0, 1.0, torch.where(peak.isfinite(), scale, torch.nan))
    return ((tiles * scale).clamp(-largest, largest).to(INPUT).float() / scale).view(x.shape).to(x.dtype)


class _Blockwise(torch.autograd.Function):
    """The tiles' values are exact in bfloat16, whose products the hardware sums in float32: the recipe's results, but not its speed."""

    @staticmethod
    def forward(ctx, x, weight):
        w = block_rounded(weight, TILE, TILE).to(x.dtype)
        ctx.save_for_backward(x, w)
        ctx.weight_dtype = weight.dtype
        return F.linear(block_rounded(x, 1, TILE), w)

    @staticmethod
    def backward(ctx, gradient):
        x, w = ctx.saved_tensors
        into_x = block_rounded(gradient, 1, TILE) @ w if ctx.needs_input_grad[0] else None
        into_weight = None
        if ctx.needs_input_grad[1]:  # the sum goes over tokens here, and the tiles with it
            into_weight = (block_rounded(gradient, TILE, 1).t() @ block_rounded(x, TILE, 1)).to(ctx.weight_dtype)
        return into_x, into_weight


def tensorwise(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [..., in] weight^T [in, out] with one scale a tensor. Raises ValueError for sides or tokens that are not multiples of the tile."""
    return _multiplied(_Tensorwise, x, weight, FP8_TILES["tensorwise"])


def blockwise(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [..., in] weight^T [in, out] with a scale a tile, computed in x's dtype (bfloat16). Raises ValueError as `tensorwise` does."""
    return _multiplied(_Blockwise, x, weight, TILE)


def _multiplied(function, x: torch.Tensor, weight: torch.Tensor, tile: int) -> torch.Tensor:
    check_multiples(x, weight, tile)
    return function.apply(x.reshape(-1, x.size(-1)), weight).view(*x.shape[:-1], weight.size(0))


def check_multiples(x: torch.Tensor, weight: torch.Tensor, tile: int) -> None:
    """Raises ValueError unless the rows of x and both sides of the weight are multiples of the tile."""
    tokens = x.numel() // x.size(-1)
    if tokens % tile or weight.size(0) % tile or weight.size(1) % tile:
        raise ValueError(f"FP8 needs multiples of {tile}: {tokens} tokens, weight {tuple(weight.shape)}")


class TensorwiseHead(PlainProducts):
    """Hidden states and table rounded once, with a scale each; the gradient of the logits with a scale a chunk."""

    row_multiple = FP8_TILES["tensorwise"]

    def __init__(self, hidden: torch.Tensor, table: torch.Tensor):
        self.dtype = hidden.dtype
        (self.hidden, self.hidden_factor), (self.table, self.table_factor) = (
            quantized(hidden, INPUT),
            quantized(table, INPUT),
        )
        self.table_columns = column_major(self.table)

    def logits(self, chunk: slice) -> torch.Tensor:
        return scaled_product(
            self.hidden[chunk], self.table.t(), self.hidden_factor, self.table_factor, self.dtype, fast=True
        )

    def gradients(
        self, gradient: torch.Tensor, chunk: slice, into_hidden: torch.Tensor, into_table: torch.Tensor
    ) -> None:
        g8, factor = quantized(gradient, GRADIENT)
        into_hidden.copy_(scaled_product(g8, self.table_columns, factor, self.table_factor, self.dtype))
        into_table += scaled_product(
            g8.t().contiguous(), column_major(self.hidden[chunk]), factor, self.hidden_factor, self.dtype
        )


class BlockwiseHead(PlainProducts):
    """As `blockwise`, chunk by chunk."""

    row_multiple = TILE

    def __init__(self, hidden: torch.Tensor, table: torch.Tensor):
        self.hidden, self.table = hidden, block_rounded(table, TILE, TILE)

    def logits(self, chunk: slice) -> torch.Tensor:
        return F.linear(block_rounded(self.hidden[chunk], 1, TILE), self.table)

    def gradients(
        self, gradient: torch.Tensor, chunk: slice, into_hidden: torch.Tensor, into_table: torch.Tensor
    ) -> None:
        torch.mm(block_rounded(gradient, 1, TILE), self.table, out=into_hidden)
        into_table += block_rounded(gradient, TILE, 1).T @ block_rounded(self.hidden[chunk], TILE, 1)


PRODUCTS = {"tensorwise": tensorwise, "blockwise": blockwise}
HEADS = {"tensorwise": TensorwiseHead, "blockwise": BlockwiseHead}
