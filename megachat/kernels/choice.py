"""Chooses the kernels of a run, each with its reason for the log: attention, FP8 and the gradient norm."""

import importlib.util
import shutil
from dataclasses import dataclass

import torch

from megachat.config import Config
from megachat.device import (
    choose_compute_dtype,
    compute_capability,
    device_name,
    dtype_name,
    onednn_multiplies_faster,
    variable,
)
from megachat.errors import UserError, summary
from megachat.kernels.attention import Attend, attention, windowed_attention
from megachat.kernels.fp8 import Fp8Choice
from megachat.kernels.gpu_attention import FLASH_MODULES, FlashAttention, FlexAttention, flash_function
from megachat.kernels.gradient_norm import SumOfSquares, torch_sum_of_squares
from megachat.kernels.multi_tensor import KernelUnavailable, check_sums, load_apex, load_te
from megachat.kernels.te import TEAttention, te_attention_problem, te_problem, te_version
from megachat.planning.dimensions import Dimensions
from megachat.planning.execution import describe_fp8_matrices
from megachat.planning.plan import Plan

_HALF = (torch.bfloat16, torch.float16)
_TILES_FROM_TOKENS = 512  # tokens per row from which tiles are faster than a mask on a CPU: tools/bench.py attention
_FLASH_HEAD_SIZE = 256  # the largest that the flash-attention kernels support
_TRIAL_TOKENS, _TRIAL_WINDOW = 256, 32
_TRIAL_TOLERANCE = 0.05  # a window that is off by one key differs by more; bfloat16's rounding differs by less
_FP8_CAPABILITY = (8, 9)  # the first GPUs with FP8 tensor cores


@dataclass(frozen=True)
class AttentionChoice:
    """attend: the function. reason: why this kernel. warning: what is slow about it, and the fix, or None."""

    name: str
    attend: Attend
    reason: str
    warning: str | None = None


@dataclass(frozen=True)
class GradientNormChoice:
    """name: "te", "apex" or "torch". reason: why this kernel."""

    name: str
    sum_of_squares: SumOfSquares
    reason: str


@dataclass(frozen=True)
class Kernels:
    """The kernels of a run. fp8 is None if it is off. onednn: whether this process (in a TrainingModel: every rank) can
    train its linears with oneDNN's products, and is faster with them."""

    attention: AttentionChoice
    fp8: Fp8Choice | None
    norm: GradientNormChoice
    onednn: bool = False

    @property
    def names(self) -> tuple[str, str]:
        """The choices that must be the same on every rank."""
        return self.attention.name, self.fp8.backend if self.fp8 else "off"


def choose_kernels(config: Config, plan: Plan, device: torch.device) -> Kernels:
    """Chooses all kernels. Raises UserError if a requested one is not available."""
    precision = config.precision
    dtype, reason = choose_compute_dtype(precision.compute, device)
    if precision.compile and (problem := compile_problem(device)):
        raise UserError(f"precision.compile is true, but {problem}: install it, or set precision.compile=false")
    if precision.optimizer_graph and device.type != "cuda":
        raise UserError(
            "precision.optimizer_graph is true, but a CPU has no CUDA graphs: set precision.optimizer_graph=false"
        )
    return Kernels(
        choose_attention(precision.attention, device, dtype, plan.dims),
        choose_fp8(precision.fp8, precision.fp8_backend, device, dtype, reason),
        choose_gradient_norm(device),
        onednn_multiplies_faster(device, dtype),
    )


def describe_kernels(config: Config, kernels: Kernels, plan: Plan) -> list[str]:
    """Returns lines for the log."""
    attention = kernels.attention
    lines = [f"attention {attention.name} ({attention.reason})"]
    if attention.warning:
        lines.append(f"warning: {attention.warning}")
    if kernels.fp8:
        lines.append(describe_fp8(kernels.fp8, plan.dims, plan.layout.tensor, head=config.precision.fp8_head))
    if kernels.onednn:
        lines.append("linears by oneDNN (float32 on an AMD CPU with AVX512)")
    return [*lines, f"gradient norm by {kernels.norm.name} ({kernels.norm.reason})"]


ATTENTION_REASONS = {  # every kernel -> why it is chosen where it is the first available
    "te": "cuDNN's kernel through Transformer Engine",
    "flash3": "flash-attention 3, made for Hopper",
    "flash4": "flash-attention 4",
    "flash2": "flash-attention 2",
    "flex": "flex_attention skips what the windows hide",
    "windowed": "skips the blocks that the windows hide",
    "sdpa": "torch's own",
}


def choose_attention(
    requested: str, device: torch.device, dtype: torch.dtype, dims: Dimensions, *, must: bool = True
) -> AttentionChoice:
    """Returns the kernel for "auto" or a name.

    Raises UserError if the requested kernel is not available. With must=False, another one replaces it: a checkpoint
    can be evaluated on another machine than the one that trained it.
    """
    windows = any(window < dims.sequence_len - 1 for window in dims.windows)
    rejected: list[str] = []
    for name in dict.fromkeys((requested, *_attention_order(device, dims, windows))):
        if name == "auto":
            continue
        problem = _attention_problem(name, device, dtype, dims)
        if problem is None:
            not_available = f"; not available: {', '.join(rejected)}" if rejected else ""
            reason = "requested" if name == requested else f"auto: {ATTENTION_REASONS[name]}{not_available}"
            return _build_attention(name, reason, device, dtype, dims, windows)
        if name == requested and must:
            raise UserError(
                f"precision.attention is {requested}, but {problem}: set precision.attention=auto, "
                "which uses the fastest kernel that is available"
            )
        rejected.append(f"{name} ({problem})")
    raise AssertionError("sdpa runs everywhere")


def _attention_order(device: torch.device, dims: Dimensions, windows: bool) -> tuple[str, ...]:
    """Returns the names, fastest first. Without windows torch's own selects a flash or cuDNN kernel by itself."""
    if device.type != "cuda":
        tiles = dims.sequence_len >= _TILES_FROM_TOKENS and any(
            2 * window <= dims.sequence_len for window in dims.windows
        )
        return ("windowed", "sdpa") if tiles else ("sdpa",)
    first = ("te", "flash4", "flash3") if compute_capability(device) >= (10, 0) else ("te", "flash3", "flash4")
    return (*first, "flash2", "flex", "sdpa") if windows else (*first, "sdpa")


def _attention_problem(name: str, device: torch.device, dtype: torch.dtype, dims: Dimensions) -> str | None:
    """Returns why the kernel is not available, or None if it is."""
    if name == "sdpa" or (name == "windowed" and device.type == "cpu"):
        return None
    if name == "windowed":
        return "it is made for CPUs"
    if device.type != "cuda":
        return "flex_attention has no backward pass on a CPU" if name == "flex" else "it needs a CUDA device"
    if dtype not in _HALF:
        return f"it computes in bfloat16 or float16, not in {dtype_name(dtype)}"
    if name == "te":
        return te_attention_problem(device) or _trial(TEAttention(_TRIAL_TOKENS), device, dtype, dims)
    capability = compute_capability(device)
    generations = {"flash3": [9], "flash4": [9, 10], "flash2": [8, 9, 12], "flex": range(8, 100)}[name]
    if capability[0] not in generations:
        return f"it has no kernel for compute capability {capability[0]}.{capability[1]} ({device_name(device)})"
    if name == "flex":
        return None
    if dims.head_size > _FLASH_HEAD_SIZE or dims.head_size % 8:
        return f"it supports heads of up to {_FLASH_HEAD_SIZE} channels in multiples of 8, not {dims.head_size}"
    try:
        flash_function(name)
    except Exception as error:  # OSError too: they load libraries while they are imported
        return f"{FLASH_MODULES[name]} cannot be imported ({summary(error)})"
    return _trial(FlashAttention(name), device, dtype, dims)


def _trial(attend: Attend, device: torch.device, dtype: torch.dtype, dims: Dimensions) -> str | None:
    """Runs the kernel forward and backward on one row, with a window and without, and returns what goes wrong, or None.

    An installed package may have no kernel for this GPU, for these heads, or for windows.
    """
    generator = torch.Generator(device).manual_seed(0)
    shapes = [(1, _TRIAL_TOKENS, heads, dims.head_size) for heads in (dims.heads, dims.kv_heads, dims.kv_heads)]
    g, q, k, v = (
        torch.randn(shape, generator=generator, device=device).to(dtype).requires_grad_()
        for shape in (shapes[0], *shapes)
    )
    windows = {_TRIAL_WINDOW if window < dims.sequence_len - 1 else _TRIAL_TOKENS for window in dims.windows}
    for window in sorted(windows):
        try:
            results = []
            for function in (attend, attention):
                with torch.enable_grad():
                    y = function(q, k, v, window)
                results.append([y, *torch.autograd.grad(y, (q, k, v), g)])
            difference = max(
                ((one - other).float().norm() / other.float().norm()).item()
                for one, other in zip(*results, strict=True)
            )
        except Exception as error:
            return f"its trial run failed ({summary(error)})"
        if not difference < _TRIAL_TOLERANCE:
            compared = f"with a window of {window} of {_TRIAL_TOKENS} tokens"
            return f"its trial run {compared} differs from torch by {difference:.1%}"
    return None


def _build_attention(
    name: str, reason: str, device: torch.device, dtype: torch.dtype, dims: Dimensions, windows: bool
) -> AttentionChoice:
    if name == "te":
        return AttentionChoice(name, TEAttention(dims.sequence_len), f"{reason} ({te_version()})")
    if name in FLASH_MODULES:
        return AttentionChoice(name, FlashAttention(name), reason)
    if name == "flex":
        return AttentionChoice(name, FlexAttention(dims.sequence_len), reason)
    if name == "windowed":
        return AttentionChoice(name, windowed_attention, reason)
    warning = None
    if windows and device.type == "cuda":
        faster = "precision.compute=bfloat16"
        if dtype in _HALF:
            faster = "precision.attention to te, flash3, flash2 or flex where one is available"
        warning = (
            "attention sdpa computes windows with a mask over the whole row, without torch's fast kernels: "
            f"set model.window_pattern=L, or {faster}"
        )
    return AttentionChoice(name, attention, reason, warning)


def choose_fp8(
    recipe: str, backend: str, device: torch.device, dtype: torch.dtype, dtype_reason: str
) -> Fp8Choice | None:
    """Returns the FP8 backend, None for recipe "off". Raises UserError if dtype, GPU or requested backend cannot."""
    if recipe == "off":
        return None
    if dtype != torch.bfloat16:
        name = dtype_name(dtype)
        raise UserError(
            f"precision.fp8 is {recipe}, which needs bfloat16, but this run computes in {name} ({dtype_reason}): "
            "set precision.compute=bfloat16 or precision.fp8=off"
        )
    capability = compute_capability(device)
    if device.type == "cuda" and capability < _FP8_CAPABILITY:
        needed, actual = ("{}.{}".format(*numbers) for numbers in (_FP8_CAPABILITY, capability))
        raise UserError(
            f"precision.fp8 is {recipe}, but {device_name(device)} has compute capability {actual} "
            f"and FP8 needs {needed}: set precision.fp8=off"
        )
    problem = te_problem(device, recipe) if backend != "torch" else None
    if backend == "te" and problem:
        raise UserError(
            f"precision.fp8_backend is te, but {problem}: set precision.fp8_backend=torch, or precision.fp8=off"
        )
    if backend != "torch" and not problem:
        return Fp8Choice(recipe, "te", f"{'auto: ' if backend == 'auto' else ''}Transformer Engine {te_version()}")
    reason = "requested" if backend == "torch" else f"auto: not te, because {problem}"
    if recipe == "blockwise":
        reason += "; slow: rounds by the recipe but multiplies in bfloat16, for comparison; te has kernels for it"
    elif device.type == "cpu":
        reason += "; slow: this CPU has no FP8 units"
    return Fp8Choice(recipe, "torch", reason)


def describe_fp8(choice: Fp8Choice, dims: Dimensions, tensor: int, *, head: bool) -> str:
    """Returns which matrices are in FP8 and which are not, for the log. head: whether FP8 is configured for lm_head."""
    matrices = describe_fp8_matrices(dims, tensor, choice.recipe, head=head)
    return f"fp8 {choice.recipe} by {choice.backend} ({choice.reason}) for {matrices}"


def choose_gradient_norm(device: torch.device) -> GradientNormChoice:
    """Returns the first of Transformer Engine, apex and torch that computes on the device what torch computes."""
    if device.type != "cuda":
        return GradientNormChoice("torch", torch_sum_of_squares, "the only one for this device")
    rejected: list[str] = []
    for name, load in (("te", load_te), ("apex", load_apex)):
        try:
            function, description = load(device)
            check_sums(function, device)
            return GradientNormChoice(name, function, "; ".join([description, *rejected]))
        except KernelUnavailable as problem:
            rejected.append(f"not {name}, because {problem}")
    return GradientNormChoice("torch", torch_sum_of_squares, "; ".join(rejected))


def compile_problem(device: torch.device) -> str | None:
    """Returns why torch.compile cannot work on the device, or None. Looks for compilers where torch and Triton look."""
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    # Triton compiles what calls its kernels, torch the kernels themselves
    named, usual = ("CC", ("gcc", "clang")) if device.type == "cuda" else ("CXX", ("g++",))
    configured = variable(named)
    compilers = (configured,) if configured else usual
    return None if any(map(shutil.which, compilers)) else f"this machine has no {' or '.join(compilers)}"
