"""Which attention kernel a run uses, and why: one function of q, k, v and window for all, exact on each (see megachat.kernels.attention)."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch

from megachat.device import compute_capability, device_name
from megachat.errors import UserError, summary
from megachat.kernels.attention import attention
from megachat.kernels.attention_windowed import windowed_attention
from megachat.kernels.te import TEAttention, te_attention_problem, te_version
from megachat.planning.dimensions import Dimensions

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int], torch.Tensor]
_HALF = (torch.bfloat16, torch.float16)
_WORTH_TILES = 512  # tokens a row, from which tiles are faster than a mask on a CPU: tools/bench.py attention
_LONG_SIZE = 256  # channels a head that the flash kernels go up to
_TRIAL_TOKENS, _TRIAL_WINDOW, _TRIAL_TOLERANCE = (
    256,
    32,
    0.05,
)  # one key too many or too few is further off, bfloat16's rounding is not


@dataclass(frozen=True)
class AttentionChoice:
    """attend: the function. reason: in words. warning: what is slow about it and what would be better, or None."""

    name: str
    attend: Attend
    reason: str
    warning: str | None = None


def choose_attention(
    asked: str, device: torch.device, dtype: torch.dtype, dims: Dimensions, *, must: bool = True
) -> AttentionChoice:
    """The kernel for "auto" or a name. Raises UserError when the one asked for cannot be had here: nothing else is taken in its place, unless
    `must` is off, as where another machine's checkpoint is evaluated."""
    windows = any(window < dims.sequence_len - 1 for window in dims.windows)
    passed_over = []
    if asked != "auto":
        problem = _problem(asked, device, dtype, dims)
        if problem is None:
            return _choice(asked, "asked for", device, dtype, dims, windows)
        if must:
            raise UserError(
                f"precision.attention is {asked} but {problem}: set precision.attention=auto, which takes what is here"
            )
        passed_over.append(f"{asked} ({problem})")
    for name in (name for name in _order(device, dims, windows) if name != asked):
        problem = _problem(name, device, dtype, dims)
        if problem is None:
            reason = "auto: " + _WHY[name] + (f"; not {', '.join(passed_over)}" if passed_over else "")
            return _choice(name, reason, device, dtype, dims, windows)
        passed_over.append(f"{name} ({problem})")
    raise AssertionError("sdpa runs everywhere")


_WHY = {
    "te": "cuDNN's kernel through Transformer Engine",
    "flash3": "flash-attention 3, made for Hopper",
    "flash4": "flash-attention 4",
    "flash2": "flash-attention 2",
    "flex": "flex_attention skips what windows hide",
    "windowed": "it computes no block that the windows hide",
    "sdpa": "torch's own",
}


def _order(device: torch.device, dims: Dimensions, windows: bool) -> tuple[str, ...]:
    """Names from the fastest. Without windows torch's own takes a flash or cuDNN kernel by itself."""
    if device.type != "cuda":
        worth = dims.sequence_len >= _WORTH_TILES and any(2 * window <= dims.sequence_len for window in dims.windows)
        return ("windowed", "sdpa") if worth else ("sdpa",)
    first = ("te", "flash4", "flash3") if compute_capability(device) >= (10, 0) else ("te", "flash3", "flash4")
    return (*first, "flash2", "flex", "sdpa") if windows else (*first, "sdpa")


def _problem(name: str, device: torch.device, dtype: torch.dtype, dims: Dimensions) -> str | None:
    """Why the kernel cannot be had, None when it can."""
    if name == "sdpa" or (name == "windowed" and device.type == "cpu"):
        return None
    if name == "windowed":
        return "that is made for CPUs"
    if device.type != "cuda":
        return "flex_attention has no backward pass on a CPU" if name == "flex" else "that needs a CUDA device"
    if dtype not in _HALF:
        return f"it computes in bfloat16 or float16, not in {str(dtype).removeprefix('torch.')}"
    if name == "te":
        return te_attention_problem(device) or _trial(TEAttention(_TRIAL_TOKENS), device, dtype, dims)
    capability = compute_capability(device)
    generations = {"flash3": [9], "flash4": [9, 10], "flash2": [8, 9, 12], "flex": range(8, 100)}[name]
    if capability[0] not in generations:
        return f"it has no kernel for compute capability {capability[0]}.{capability[1]} ({device_name(device)})"
    if name == "flex":
        return None
    if dims.head_size > _LONG_SIZE or dims.head_size % 8:
        return f"it takes heads of up to {_LONG_SIZE} channels in multiples of 8, not {dims.head_size}"
    try:
        _flash_function(name)
    except Exception as error:  # OSError too: they load libraries while they are imported
        return f"{_FLASH[name]} cannot be imported ({summary(error)})"
    return _trial(FlashAttention(name), device, dtype, dims)


def _trial(attend: Attend, device: torch.device, dtype: torch.dtype, dims: Dimensions) -> str | None:
    """What goes wrong when the kernel is called once forward and backward on one row, with a window and without; a package may be there and hold
    no kernel for this GPU, for these heads, or for windows."""
    generator = torch.Generator(device).manual_seed(0)
    shapes = [(1, _TRIAL_TOKENS, heads, dims.head_size) for heads in (dims.heads, dims.kv_heads, dims.kv_heads)]
    g, *inputs = (
        torch.randn(shape, generator=generator, device=device).to(dtype).requires_grad_()
        for shape in (shapes[0], *shapes)
    )
    for window in sorted(
        {_TRIAL_WINDOW if window < dims.sequence_len - 1 else _TRIAL_TOKENS for window in dims.windows}
    ):
        try:
            with torch.enable_grad():
                found, wanted = (
                    [y := way(*inputs, window), *torch.autograd.grad(y, inputs, g)] for way in (attend, attention)
                )
            off = max(
                ((one - other).float().norm() / other.float().norm()).item()
                for one, other in zip(found, wanted, strict=True)
            )
        except Exception as error:
            return f"a trial of it failed ({summary(error)})"
        if not off < _TRIAL_TOLERANCE:
            return f"a trial of it with a window of {window} of {_TRIAL_TOKENS} tokens gave other results than torch, {off:.1%} off"
    return None


def _choice(
    name: str, reason: str, device: torch.device, dtype: torch.dtype, dims: Dimensions, windows: bool
) -> AttentionChoice:
    warning = None
    if name == "te":
        attend, reason = TEAttention(dims.sequence_len), f"{reason} ({te_version()})"
    elif name in _FLASH:
        attend = FlashAttention(name)
    elif name == "flex":
        attend = FlexAttention(dims.sequence_len, compiled=device.type == "cuda")
    elif name == "windowed":
        attend = windowed_attention
    else:
        attend = attention
        if windows and device.type == "cuda":
            better = (
                "precision.attention to te, flash3, flash2 or flex where they can be had"
                if dtype in _HALF
                else "precision.compute=bfloat16"
            )
            warning = f"attention sdpa computes windows with a mask over the whole row, without its fast kernels: set model.window_pattern=L, or {better}"
    return AttentionChoice(name, attend, reason, warning)


_FLASH = {
    "flash2": "flash_attn",
    "flash3": "flash_attn_interface",
    "flash4": "flash_attn.cute",
}  # the modules of its three generations


def _flash_function(name: str):
    return importlib.import_module(_FLASH[name]).flash_attn_func


class FlashAttention:
    """flash-attention 2 (arXiv 2307.08691), 3 (arXiv 2407.08608) or 4 by the function of their packages, which count windows as we do."""

    def __init__(self, name: str):
        self._function, self._none = _flash_function(name), None if name == "flash4" else -1

    @torch.compiler.disable
    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
        full = window >= q.size(1) - 1
        reach = (self._none, self._none) if full else (window, 0)
        found = self._function(q, k, v, causal=True, window_size=reach)
        return found[0] if isinstance(found, tuple) else found  # some versions give the sums of exponentials, too


class FlexAttention:
    """torch's flex_attention with the windows as block masks, for rows of `tokens`; other lengths, as samples have, take the plain form."""

    def __init__(self, tokens: int, *, compiled: bool):
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        self._attend = torch.compile(flex_attention, dynamic=False) if compiled else flex_attention
        self._create_mask, self._tokens, self._masks = create_block_mask, tokens, {}

    @torch.compiler.disable
    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
        if q.size(1) != self._tokens:
            return attention(q, k, v, window)
        mask = self._mask(min(window, self._tokens - 1), q.device)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        return self._attend(q, k, v, block_mask=mask, enable_gqa=q.size(1) != k.size(1)).transpose(1, 2)

    def _mask(self, window: int, device: torch.device):
        if window not in self._masks:

            def visible(batch, head, query, key):
                return (query >= key) & (query - key <= window)

            self._masks[window] = self._create_mask(visible, None, None, self._tokens, self._tokens, device=device)
        return self._masks[window]
