"""Which kernels a run trains with: chosen from the config and what is installed, the same on every rank, and told in the log."""

import importlib.util
import shutil
from dataclasses import dataclass

import torch

from megachat.config import Config
from megachat.device import choose_compute_dtype, variable
from megachat.errors import UserError
from megachat.kernels.attention_backends import AttentionChoice, choose_attention
from megachat.kernels.fp8_backends import Fp8Choice, choose_fp8, describe_fp8
from megachat.kernels.gradient_norm import GradientNorm, choose_gradient_norm
from megachat.planning.plan import Plan


@dataclass(frozen=True)
class Kernels:
    """fp8: None when it is off."""

    attention: AttentionChoice
    fp8: Fp8Choice | None
    norm: GradientNorm

    @property
    def names(self) -> tuple[str, str]:
        """What must be the same on every rank."""
        return self.attention.name, self.fp8.backend if self.fp8 else "off"


def choose_kernels(config: Config, plan: Plan, device: torch.device) -> Kernels:
    """From the config and what is installed here. Raises UserError when what was asked for cannot be had."""
    dtype, reason = choose_compute_dtype(config.precision.compute, device)
    asked = config.precision
    if asked.compile:
        check_compile(device)
    return Kernels(
        choose_attention(asked.attention, device, dtype, plan.dims),
        choose_fp8(asked.fp8, asked.fp8_backend, device, dtype, reason),
        choose_gradient_norm(device),
    )


def evaluation_attention(config: Config, plan: Plan, device: torch.device, dtype: torch.dtype) -> AttentionChoice:
    """The kernel of the run's training where it can be had here, another one elsewhere: a checkpoint is evaluated on any machine."""
    return choose_attention(config.precision.attention, device, dtype, plan.dims, must=False)


def describe_kernels(config: Config, kernels: Kernels, plan: Plan) -> list[str]:
    """Lines for the log."""
    attention = kernels.attention
    lines = [f"attention {attention.name} ({attention.reason})"]
    if attention.warning:
        lines.append(f"warning: {attention.warning}")
    if kernels.fp8:
        lines.append(describe_fp8(kernels.fp8, plan.dims, plan.layout.tensor, head=config.precision.fp8_head))
    return [*lines, f"gradient norm by {kernels.norm.name} ({kernels.norm.reason})"]


def compile_problem(device: torch.device) -> str | None:
    """Why torch.compile cannot work on the device, in words that follow "but"; None when it can. It looks where torch and Triton look."""
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    # Triton compiles what calls its kernels, torch the kernels themselves
    named, usual = ("CC", ("gcc", "clang")) if device.type == "cuda" else ("CXX", ("g++",))
    compilers = (variable(named),) if variable(named) else usual
    return None if any(map(shutil.which, compilers)) else f"this machine has no {' or '.join(compilers)}"


def check_compile(device: torch.device) -> None:
    """Raises UserError where torch.compile cannot work on the device."""
    problem = compile_problem(device)
    if problem:
        raise UserError(f"precision.compile is true but {problem}: install it, or set precision.compile=false")
