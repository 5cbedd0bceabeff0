"""Which kernels a run trains with: chosen from the config and what is installed, the same on every rank, and told in the log."""

import socket
from dataclasses import dataclass

import torch

from megachat.config import Config
from megachat.device import choose_compute_dtype
from megachat.errors import UserError
from megachat.kernels.attention_backends import AttentionChoice, choose_attention
from megachat.kernels.fp8_backends import Fp8Choice, choose_fp8, describe_fp8
from megachat.kernels.gradient_norm import GradientNorm, choose_gradient_norm
from megachat.parallel.collectives import all_gather_objects
from megachat.parallel.mesh import Mesh
from megachat.plan import Plan
from megachat.train.compiled import check_compile


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


def check_alike(kernels: Kernels, mesh: Mesh) -> None:
    """Raises UserError, on all ranks, when one would train with other kernels than the first; all ranks call it."""
    told = all_gather_objects((kernels.names, socket.gethostname()), mesh.world)
    for rank, (names, host) in enumerate(told):
        if names != told[0][0]:
            attention, fp8 = told[0][0]
            raise UserError(
                f"rank {rank} on {host} would train with attention {names[0]} and fp8 {names[1]}, but rank 0 on {told[0][1]} with {attention} and "
                f"{fp8}: install the same packages on every host, or name them in precision.attention and precision.fp8_backend"
            )


def describe_kernels(config: Config, kernels: Kernels, plan: Plan) -> list[str]:
    """Lines for the log."""
    attention = kernels.attention
    lines = [f"attention {attention.name} ({attention.reason})"]
    if attention.warning:
        lines.append(f"warning: {attention.warning}")
    if kernels.fp8:
        lines.append(describe_fp8(kernels.fp8, plan.dims, plan.layout.tensor, head=config.precision.fp8_head))
    return [*lines, f"gradient norm by {kernels.norm.name} ({kernels.norm.reason})"]
