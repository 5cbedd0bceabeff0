"""Muon's mathematics, cut where the layout cuts it: elementwise parts run on shards, whole-matrix parts on the matrix's owner.

Momentum and orthogonalization: Muon (kellerjordan.github.io/posts/muon). Row equilibration: MuonEq (arXiv 2603.28254). Frobenius norm:
Muon+ (arXiv 2602.21545). Variance reduction: NorMuon (arXiv 2510.05491). Cautious decay: arXiv 2411.16085 and 2510.12402.
The order of operations and of dtype casts is nanochat's, so that both give the same bits.
Hyperparameters are 0-d float32 tensors on the device of the data.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from megachat.kernels.polar import polar_express


@dataclass(frozen=True)
class Hyper:
    """0-d float32 tensors: lr (of one matrix, its multiplier included), weight_decay, momentum, beta2."""

    lr: torch.Tensor
    weight_decay: torch.Tensor
    momentum: torch.Tensor
    beta2: torch.Tensor


def orthogonalization_dtype(compute_dtype: torch.dtype) -> torch.dtype:
    """bfloat16 when computing in bfloat16; float32 otherwise, because float16's exponent is too short for the Gram matrices."""
    return torch.bfloat16 if compute_dtype == torch.bfloat16 else torch.float32


def second_moment_shape(shape: tuple[int, int]) -> tuple[int, int]:
    """One value a row when the matrix is tall or square, else one a column."""
    return (shape[0], 1) if shape[0] >= shape[1] else (1, shape[1])


def momentum_update(momentum: torch.Tensor, gradient: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Nesterov momentum, elementwise, float32: moves `momentum` in place, overwrites `gradient` with the update and returns it."""
    momentum.lerp_(gradient, 1 - factor)
    return gradient.lerp_(momentum, factor)


def equilibrate_rows(x: torch.Tensor) -> torch.Tensor:
    """Scale each row of `x` [m, n] to the root-mean-square row norm; norms in float32, result in x's dtype."""
    wide = x.float()
    target = wide.norm(dim=(-2, -1), keepdim=True) / (x.size(-2) ** 0.5)
    rows = wide.norm(dim=-1, keepdim=True).clamp_min(1e-6)
    return x * (target / rows).to(x.dtype)


def update_direction(update: torch.Tensor) -> torch.Tensor:
    """The whole-matrix half of the step: `update` [m, n] in the orthogonalization dtype to its equilibrated polar factor, same dtype."""
    return polar_express(equilibrate_rows(update))


def update_scales(
    direction: torch.Tensor, second_moment: torch.Tensor, beta2: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the direction [m, n] is to be multiplied with: a float32 [1, 1] norm and a float32 vector of second_moment's shape.

    The first sets the Frobenius norm to sqrt(min(m, n)). The second divides rows (tall or square) or columns (wide) by the root of their
    running mean square, and keeps that norm. Moves `second_moment` (float32) in place.
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
    """Elementwise on any rectangle of the matrix: `weight` (float32) in place; `norm` and `scale` broadcast against it.

    Decay is cautious: only where the update and the weight have the same sign, so that it never pulls against the update.
    """
    g = direction.float() * norm * scale
    mask = (g * weight) >= 0
    weight.sub_(lr * g + lr * weight_decay * weight * mask)


@dataclass(frozen=True)
class Functions:
    """The four functions of a step, as they are or compiled. Hyperparameters are tensors, so that their values compile nothing anew."""

    momentum_update: Callable = momentum_update
    update_direction: Callable = update_direction
    update_scales: Callable = update_scales
    apply_update: Callable = apply_update


def compiled_functions() -> Functions:
    """By torch.compile: whole matrices have few shapes, each with its own code; rectangles have many, which share it."""
    whole = {
        name: torch.compile(getattr(Functions, name), dynamic=False)
        for name in ("momentum_update", "update_direction", "update_scales")
    }
    return Functions(**whole, apply_update=torch.compile(apply_update, dynamic=True))


def reference_step(
    weight: torch.Tensor,
    gradient: torch.Tensor,
    momentum: torch.Tensor,
    second_moment: torch.Tensor,
    hyper: Hyper,
    compute_dtype: torch.dtype,
) -> None:
    """One step of one whole matrix [m, n] on one process, all float32 tensors, in place (`gradient` is left alone): the partition's oracle."""
    update = momentum_update(momentum, gradient.clone(), hyper.momentum)
    direction = update_direction(update.to(orthogonalization_dtype(compute_dtype)))
    norm, scale = update_scales(direction, second_moment, hyper.beta2)
    apply_update(weight, direction, norm, scale, hyper.lr, hyper.weight_decay)
