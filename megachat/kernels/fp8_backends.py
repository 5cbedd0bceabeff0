"""Who multiplies in FP8, Transformer Engine or torch, and why; and giving that to the layers."""

from dataclasses import dataclass

import torch
from torch import nn

from megachat.device import compute_capability, device_name
from megachat.errors import UserError
from megachat.kernels.cross_entropy import PlainProducts
from megachat.kernels.fp8 import HEADS, PRODUCTS
from megachat.kernels.linear import Linear
from megachat.kernels.te import TELinears, te_problem, te_version
from megachat.planning.dimensions import FP8_LEAST_SIDE, FP8_TILES, Dimensions, fits_fp8, head_fits_fp8, linear_shapes

LEAST_CAPABILITY = (8, 9)  # the first GPUs with FP8 tensor cores


@dataclass(frozen=True)
class Fp8Choice:
    """recipe: "tensorwise" or "blockwise". backend: "te" or "torch". reason: in words."""

    recipe: str
    backend: str
    reason: str


def choose_fp8(
    recipe: str, backend: str, device: torch.device, dtype: torch.dtype, dtype_reason: str
) -> Fp8Choice | None:
    """None for the recipe "off". Raises UserError when the run's dtype, its GPU or the backend asked for cannot do it."""
    if recipe == "off":
        return None
    if dtype != torch.bfloat16:
        name = str(dtype).removeprefix("torch.")
        raise UserError(
            f"precision.fp8 is {recipe}, which needs bfloat16, and this run computes in {name} ({dtype_reason}): "
            "set precision.compute=bfloat16 or precision.fp8=off"
        )
    capability = compute_capability(device)
    if device.type == "cuda" and capability < LEAST_CAPABILITY:
        least, own = ("{}.{}".format(*numbers) for numbers in (LEAST_CAPABILITY, capability))
        raise UserError(
            f"precision.fp8 is {recipe} but {device_name(device)} has compute capability {own}, and FP8 begins with {least}: set precision.fp8=off"
        )
    problem = te_problem(device, recipe) if backend != "torch" else None
    if backend == "te" and problem:
        raise UserError(
            f"precision.fp8_backend is te but {problem}: set precision.fp8_backend=torch, or precision.fp8=off"
        )
    if backend != "torch" and not problem:
        return Fp8Choice(recipe, "te", f"{'auto: ' if backend == 'auto' else ''}Transformer Engine {te_version()}")
    reason = "asked for" if backend == "torch" else f"auto: not te, because {problem}"
    slow = {"cpu": "slow: this CPU has no FP8 units", "cuda": ""}[device.type]
    if recipe == "blockwise":
        slow = "slow: the recipe's rounding with products in bfloat16, for comparing; te has kernels for it"
    return Fp8Choice(recipe, "torch", "; ".join(part for part in (reason, slow) if part))


def apply_fp8(layers: list[nn.Module], choice: Fp8Choice) -> int:
    """Have every linear of the layers whose weight fits, as it is cut here, multiply in FP8 while it trains; returns how many do. The head's
    table is multiplied in the loss: see `head_products`."""
    linears = [
        module
        for layer in layers
        for name, module in layer.named_modules()
        if isinstance(module, Linear) and name != "lm_head"
    ]
    fitting = [linear for linear in linears if fits_fp8(*linear.weight.shape, choice.recipe)]
    build = (
        TELinears(choice.recipe).build if choice.backend == "te" and fitting else lambda weight: PRODUCTS[choice.recipe]
    )
    for linear in fitting:
        linear.product = build(linear.weight)
    return len(fitting)


def head_products(choice: Fp8Choice | None, dims: Dimensions, tensor: int) -> type[PlainProducts]:
    """How the head multiplies in training. In FP8 always by torch: logits are made in chunks there, which Transformer Engine's layers cannot."""
    return HEADS[choice.recipe] if choice and head_fits_fp8(dims, tensor, choice.recipe) else PlainProducts


def describe_fp8(choice: Fp8Choice, dims: Dimensions, tensor: int, *, head: bool) -> str:
    """What is in FP8 and what is not, for the log. head: it was asked for the head."""
    shapes = linear_shapes(dims, tensor)
    fitting = [name for name, shape in shapes.items() if fits_fp8(*shape, choice.recipe)]
    plain = [name for name in shapes if name not in fitting]
    if head:
        (fitting if head_fits_fp8(dims, tensor, choice.recipe) else plain).append("lm_head")
    said = f"fp8 {choice.recipe} by {choice.backend} ({choice.reason}) for {', '.join(fitting)} in training"
    tile = FP8_TILES[choice.recipe]
    return said + (
        f"; not for {', '.join(plain)}, whose sides are not multiples of {tile} from {FP8_LEAST_SIDE} on"
        if plain
        else ""
    )
