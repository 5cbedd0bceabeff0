"""NVIDIA Transformer Engine (github.com/NVIDIA/TransformerEngine), imported nowhere else: linears in FP8, cuDNN's attention, norms.

Its modules stay outside of the model: they are given our weights at each call, so names, starting values, random numbers and checkpoints are the
same as without them, and the tensor axis cuts and communicates as ever.
"""

import contextlib
from collections.abc import Callable
from importlib import metadata

import torch

from megachat.device import compute_capability
from megachat.errors import summary
from megachat.kernels.attention import attention
from megachat.kernels.fp8 import check_multiples
from megachat.planning.dimensions import FP8_TILES

OLDEST = (2, 9)  # the first with `autocast`; the design was checked against 2.20.2
_ONE_VERSION = ("transformer_engine", "transformer_engine_torch", "transformer_engine_cu12", "transformer_engine_cu13")


def te_version() -> str | None:
    """The installed version; None where there is none."""
    return _versions().get(_ONE_VERSION[0])


def te_problem(device: torch.device, recipe: str | None = None) -> str | None:
    """Why Transformer Engine cannot be used on the device, in words that follow "because"; None when it can. recipe: FP8 recipe that it must know."""
    if device.type != "cuda":
        return "this machine has no CUDA device"
    found = _versions()
    if _ONE_VERSION[0] not in found:
        return "the package transformer_engine is not installed"
    if len(set(found.values())) > 1:
        return f"its packages have several versions ({', '.join(f'{name} {version}' for name, version in found.items())}), which must be one"
    if _numbers(found[_ONE_VERSION[0]]) < OLDEST:
        return f"transformer_engine {found[_ONE_VERSION[0]]} is older than {OLDEST[0]}.{OLDEST[1]}"
    try:
        import transformer_engine.pytorch as te

        checks = {
            None: lambda return_reason: (True, ""),
            "tensorwise": te.is_fp8_available,
            "blockwise": te.is_fp8_block_scaling_available,
        }
        works, why = checks[recipe](return_reason=True)
    except (
        Exception
    ) as error:  # OSError and AssertionError too: it loads libraries and checks versions while it is imported
        return f"transformer_engine cannot be imported ({summary(error)})"
    return None if works else f"transformer_engine {found[_ONE_VERSION[0]]} says: {why}"


def _versions() -> dict[str, str]:
    found = {}
    for package in _ONE_VERSION:
        try:
            found[package] = metadata.version(package).partition("+")[0]
        except metadata.PackageNotFoundError:
            continue
    return found


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


def te_recipe(name: str):
    """Transformer Engine's recipe for ours. Never its default, which on Hopper would be delayed scaling."""
    from transformer_engine.common import recipe

    return {"tensorwise": recipe.Float8CurrentScaling, "blockwise": recipe.Float8BlockScaling}[name]()


class TELinears:
    """Builds te.Linear products, all of one recipe; recipe None: in the input's dtype, not in FP8."""

    def __init__(self, recipe: str | None):
        import transformer_engine.pytorch as te

        class Linear(te.Linear):
            """Takes weights of another dtype than its input, which te.Linear refuses outside of torch.autocast."""

            def set_activation_dtype(self, inp):
                self.fast_setattr("activation_dtype", inp.dtype)

        self._linear, self._autocast = Linear, te.autocast
        self._recipe, self._tile = (te_recipe(recipe), FP8_TILES[recipe]) if recipe else (None, 1)

    def build(self, weight: torch.Tensor) -> Callable[[torch.Tensor, torch.nn.Parameter], torch.Tensor]:
        """(x [..., in], weight [out, in]) -> [..., out] in x's dtype, for weights of the shape of this one; see megachat.kernels.linear.

        Raises ValueError where `megachat.kernels.fp8.tensorwise` does: te.Linear would fail in the backward pass alone.
        """
        rows, columns = weight.shape
        # on "meta" (the text: a torch.device is not recognised) it takes no memory and draws no random numbers
        linear = self._linear(
            columns, rows, bias=False, params_dtype=weight.dtype, init_method=lambda tensor: None, device="meta"
        )
        return _TEProduct(linear, self._tile, self._context)

    def _context(self):
        # entered for each product, so that a recomputed forward pass enters it as well; backward goes by what forward did
        return self._autocast(enabled=True, recipe=self._recipe) if self._recipe else contextlib.nullcontext()


class _TEProduct:
    """te.Linear given its weight at each call; torch.compile makes no graph of it and does not compile the layers around it anew for each."""

    def __init__(self, linear: torch.nn.Module, tile: int, context: Callable):
        self._linear, self._tile, self._context = linear, tile, context

    @torch.compiler.disable
    def __call__(self, x: torch.Tensor, weight: torch.nn.Parameter) -> torch.Tensor:
        check_multiples(x, weight, self._tile)
        self._linear._parameters["weight"] = weight
        with self._context():
            return self._linear(x)


class TEAttention:
    """Attention by te.DotProductAttention, which takes cuDNN's kernel on Hopper, for rows of `tokens`; signature of
    megachat.kernels.attention.attention, which other lengths take: cuDNN plans a kernel for each, and CORE's examples have many."""

    def __init__(self, tokens: int):
        self._tokens, self._modules = tokens, {}

    @torch.compiler.disable
    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
        if q.size(1) != self._tokens:
            return attention(q, k, v, window)
        heads, kv_heads, size = q.size(2), k.size(2), q.size(3)
        module = self._modules.get((heads, kv_heads, size))
        if module is None:
            from transformer_engine.pytorch import DotProductAttention

            groups = {
                "num_gqa_groups": kv_heads,
                "attention_dropout": 0.0,
                "qkv_format": "bshd",
                "attn_mask_type": "causal",
            }
            module = self._modules[heads, kv_heads, size] = DotProductAttention(heads, size, **groups)
        reach = (
            -1 if window >= q.size(1) - 1 else window
        )  # to Transformer Engine (tokens, 0) is a window, and only -1 is none
        return module(q.contiguous(), k.contiguous(), v.contiguous(), window_size=(reach, 0)).view(q.shape)


def te_l2norm() -> tuple[Callable, Callable]:
    """Its multi_tensor_applier and multi_tensor_l2norm."""
    from transformer_engine.pytorch.optimizers import multi_tensor_applier, multi_tensor_l2norm

    return multi_tensor_applier, multi_tensor_l2norm


def te_attention_problem(device: torch.device) -> str | None:
    """As `te_problem`, for attention."""
    problem = te_problem(device)
    if problem is None and compute_capability(device) < (8, 0):
        return "its attention needs compute capability 8.0"
    return problem
