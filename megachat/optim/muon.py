"""Muon's mathematics in four functions: elementwise ones for shards, whole-matrix ones for the matrix's owner.

Momentum and orthogonalization: Muon (kellerjordan.github.io/posts/muon). Row equilibration: MuonEq (arXiv 2603.28254).
Frobenius norm: Muon+ (arXiv 2602.21545). Variance reduction: NorMuon (arXiv 2510.05491). Cautious decay: arXiv
2411.16085 and 2510.12402. The order of operations and of dtype casts is nanochat's; the polar factor adds within its
matrix products, so both give the same up to rounding.
Hyperparameters are 0-d float32 tensors on the device of the data.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from megachat.kernels.polar import polar_express


def orthogonalization_dtype(compute_dtype: torch.dtype) -> torch.dtype:
    """Returns bfloat16 for bfloat16, else float32, because the exponent of float16 is too short for Gram matrices."""
    return torch.bfloat16 if compute_dtype == torch.bfloat16 else torch.float32


def second_moment_shape(shape: tuple[int, int]) -> tuple[int, int]:
    """Returns a shape with one value per row for tall or square matrices, else one per column."""
    return (shape[0], 1) if shape[0] >= shape[1] else (1, shape[1])


def momentum_update(momentum: torch.Tensor, gradient: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Applies Nesterov momentum, elementwise in float32. Changes `momentum` in place, overwrites `gradient` with the
    update and returns it."""
    momentum.lerp_(gradient, 1 - factor)
    return gradient.lerp_(momentum, factor)


def equilibrate_rows(x: torch.Tensor) -> torch.Tensor:
    """Scales each row of `x` [m, n] to the root-mean-square row norm. Norms are float32, the result has x's dtype."""
    wide = x.float()
    target = wide.norm(dim=(-2, -1), keepdim=True) / (x.size(-2) ** 0.5)
    rows = wide.norm(dim=-1, keepdim=True).clamp_min(1e-6)
    return x * (target / rows).to(x.dtype)


def update_direction(update: torch.Tensor) -> torch.Tensor:
    """Returns the polar factor of the row-equilibrated `update` [m, n], which has the orthogonalization dtype."""
    return polar_express(equilibrate_rows(update))


def update_scales(
    direction: torch.Tensor, second_moment: torch.Tensor, beta2: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the two factors of the direction [m, n], both float32, and updates `second_moment` (float32) in place.

    The first, [1, 1], sets the Frobenius norm to sqrt(min(m, n)). The second, of second_moment's shape, divides rows
    (tall or square matrices) or columns (wide matrices) by the root of their running mean square and keeps that norm.
    """
    g = direction.float()
    norm = min(g.shape[-2:]) ** 0.5 / g.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-6)
    g = g * norm
    dim = -1 if g.size(-2) >= g.size(-1) else -2
    count = g.size(dim)
    mean = g.square().mean(dim=dim, keepdim=True)
    before = (mean.sum(dim=(-2, -1), keepdim=True) * count).sqrt()
    second_moment.lerp_(mean, 1 - beta2)
    scale = second_moment.clamp_min(1e-10).rsqrt()
    after = ((mean * count) * scale.square()).sum(dim=(-2, -1), keepdim=True).sqrt()
    return norm, scale * (before / after.clamp_min(1e-10))


def apply_update(
    weight: torch.Tensor,
    direction: torch.Tensor,
    norm: torch.Tensor,
    scale: torch.Tensor,
    lr: torch.Tensor,
    weight_decay: torch.Tensor,
) -> None:
    """Updates `weight` (float32) in place, elementwise, on any rectangle of the matrix; `norm` and `scale` broadcast.

    The decay is cautious: it acts only where the update and the weight have the same sign and thus never against the
    update.
    """
    g = direction.float() * norm * scale
    mask = (g * weight) >= 0
    weight.sub_(lr * g + lr * weight_decay * weight * mask)


@dataclass(frozen=True)
class Functions:
    """The four functions of a step, plain or compiled. New values of the hyperparameters do not recompile them."""

    momentum_update: Callable = momentum_update
    update_direction: Callable = update_direction
    update_scales: Callable = update_scales
    apply_update: Callable = apply_update


def compiled_functions(mode: str | None = None) -> Functions:
    """Compiles the functions. Each matrix shape gets its own code, because there are few; rectangles share one.

    mode: of torch.compile.
    """
    return Functions(
        torch.compile(momentum_update, dynamic=False, mode=mode),
        torch.compile(update_direction, dynamic=False, mode=mode),
        torch.compile(update_scales, dynamic=False, mode=mode),
        torch.compile(apply_update, dynamic=True, mode=mode),
    )
