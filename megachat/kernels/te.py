"""NVIDIA Transformer Engine (github.com/NVIDIA/TransformerEngine), imported in this file only: linears in FP8, cuDNN's
attention, norms.

Its modules stay outside of the model. They are given our weights at each call, so names, initial values, random numbers
and checkpoints are the same as without them, and the tensor axis cuts and communicates as usual.
"""

import contextlib
from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch
from torch import nn

from megachat.device import compute_capability
from megachat.errors import summary
from megachat.installation import TE_PACKAGES
from megachat.kernels.attention import attention
from megachat.kernels.linear import Product
from megachat.kernels.uncompiled import uncompiled
from megachat.planning.dimensions import FP8_TILES, check_fp8_multiples

OLDEST = (2, 9)  # the first version with `autocast`; the code was written against 2.20.2


def te_version() -> str | None:
    """Returns the installed version, or None."""
    return _package_versions().get(TE_PACKAGES[0])


def te_problem(device: torch.device, recipe: str | None = None) -> str | None:
    """Returns why Transformer Engine cannot be used on the device, or None if it can. recipe: an FP8 recipe that it
    must support.
    """
    if device.type != "cuda":
        return "this machine has no CUDA device"
    versions = _package_versions()
    if TE_PACKAGES[0] not in versions:
        return "the package transformer_engine is not installed"
    if len(set(versions.values())) > 1:
        listed = ", ".join(f"{name} {version}" for name, version in versions.items())
        return f"its packages must have one version, but these are installed: {listed}"
    version = versions[TE_PACKAGES[0]]
    if tuple(int(number) for number in version.split(".")[:2]) < OLDEST:
        return f"transformer_engine {version} is older than {OLDEST[0]}.{OLDEST[1]}"
    try:
        import transformer_engine.pytorch as te

        checks = {"tensorwise": te.is_fp8_available, "blockwise": te.is_fp8_block_scaling_available}
        works, why = checks[recipe](return_reason=True) if recipe else (True, "")
    except Exception as error:  # OSError and AssertionError too: the import loads libraries and checks versions
        return f"transformer_engine cannot be imported ({summary(error)})"
    return None if works else f"transformer_engine {version} reports: {why}"


def te_attention_problem(device: torch.device) -> str | None:
    """Returns why Transformer Engine's attention cannot be used on the device, or None if it can."""
    problem = te_problem(device)
    if problem is None and compute_capability(device) < (8, 0):
        return "its attention needs compute capability 8.0"
    return problem


def _package_versions() -> dict[str, str]:
    versions = {}
    for package in TE_PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package).partition("+")[0]
    return versions


class TELinears:
    """Builds products by te.Linear, all with one FP8 recipe. recipe None: in the input's dtype instead of FP8."""

    def __init__(self, recipe: str | None):
        import transformer_engine.pytorch as te
        from transformer_engine.common import recipe as recipes

        class Linear(te.Linear):
            """Accepts weights of another dtype than its input, which te.Linear refuses outside of torch.autocast."""

            def set_activation_dtype(self, inp):
                self.fast_setattr("activation_dtype", inp.dtype)

        # each recipe is named: Transformer Engine's default is delayed scaling on Hopper
        theirs = {"tensorwise": recipes.Float8CurrentScaling, "blockwise": recipes.Float8BlockScaling}
        self._linear, self._autocast = Linear, te.autocast
        self._recipe = theirs[recipe]() if recipe else None
        self._tile = FP8_TILES[recipe] if recipe else 1

    def build(self, weight: torch.Tensor) -> Product:
        """Returns (x [..., in], weight [out, in]) -> [..., out] in x's dtype, for weights of this shape; see
        megachat.kernels.linear.

        The product raises ValueError where `megachat.kernels.fp8.tensorwise` does; te.Linear would fail in the backward
        pass only.
        """
        rows, columns = weight.shape
        # on "meta" (as text: Transformer Engine does not recognize a torch.device) it takes no memory and draws no
        # random numbers
        linear = self._linear(
            columns, rows, bias=False, params_dtype=weight.dtype, init_method=lambda tensor: None, device="meta"
        )
        return _TEProduct(linear, self._tile, self._context)

    def _context(self):
        # entered for each product, so that a recomputed forward pass enters it too; the backward pass follows its
        # forward pass
        return self._autocast(enabled=True, recipe=self._recipe) if self._recipe else contextlib.nullcontext()


class _TEProduct:
    """Calls te.Linear with the weight of each call. torch.compile skips it, and so does not compile the code around it
    per layer.
    """

    def __init__(self, linear: nn.Module, tile: int, context: Callable):
        self._linear, self._tile, self._context = linear, tile, context

    @uncompiled
    def __call__(self, x: torch.Tensor, weight: nn.Parameter) -> torch.Tensor:
        check_fp8_multiples(x.numel() // x.size(-1), weight.shape, self._tile)
        self._linear._parameters["weight"] = weight
        with self._context():
            return self._linear(x)


class TEAttention:
    """Computes `megachat.kernels.attention.attention` by te.DotProductAttention, which uses cuDNN's kernel on Hopper,
    for rows of `tokens`.

    Other lengths use the reference: cuDNN plans a kernel for each length, and CORE's examples have many.
    """

    def __init__(self, tokens: int):
        self._tokens = tokens
        self._modules: dict[tuple[int, int, int], Any] = {}

    @uncompiled
    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
        if q.size(1) != self._tokens:
            return attention(q, k, v, window)
        heads, kv_heads, size = q.size(2), k.size(2), q.size(3)
        module = self._modules.get((heads, kv_heads, size))
        if module is None:
            from transformer_engine.pytorch import DotProductAttention

            settings: dict[str, object] = {"num_gqa_groups": kv_heads, "attention_dropout": 0.0}
            settings |= {"qkv_format": "bshd", "attn_mask_type": "causal"}
            module = self._modules[heads, kv_heads, size] = DotProductAttention(heads, size, **settings)
        # to Transformer Engine (tokens, 0) is a window; only -1 means none
        reach = -1 if window >= q.size(1) - 1 else window
        return module(q.contiguous(), k.contiguous(), v.contiguous(), window_size=(reach, 0)).view(q.shape)


def te_l2norm() -> tuple[Callable, Callable]:
    """Returns Transformer Engine's multi_tensor_applier and multi_tensor_l2norm."""
    from transformer_engine.pytorch.optimizers import multi_tensor_applier, multi_tensor_l2norm

    return multi_tensor_applier, multi_tensor_l2norm
