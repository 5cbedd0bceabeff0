"""Keeps torch.compile out of a training that does not use it: its imports would take 1.5 s before the first step.

torch's optimizers import torch._dynamo. DeepSpeed imports its own Muon when it makes an engine, to recognize it, and
that is compiled when it is imported, which loads torch._inductor. If another version has other names, both are
imported as before, and nothing else changes.
"""

import contextlib
import importlib
import inspect

import torch
from deepspeed.runtime import compiler
from deepspeed.runtime.zero import utils

_MUON = "deepspeed.runtime.zero.muon.original_muon"
# without the decorators that import torch._dynamo, for optimizers inside of a compiled function
_add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
_step = inspect.unwrap(torch.optim.AdamW.step)


class AdamW(torch.optim.AdamW):
    """torch's AdamW, as `torch.optim.AdamW` computes it, for steps outside of compiled functions."""

    def add_param_group(self, param_group: dict) -> None:
        """Adds a group, as the constructor does."""
        _add_param_group(self, param_group)

    @torch.no_grad()
    def step(self, closure=None):
        """Updates the parameters."""
        return _step(self, closure)


utils.ZERO_SUPPORTED_OPTIMIZERS.append(AdamW)


def import_deepspeed_muon() -> None:
    """Imports DeepSpeed's Muon without compiling it. megachat has another one (optim/muon.py)."""
    original, compiler.compile = compiler.compile, lambda: lambda function: function
    try:
        with contextlib.suppress(ImportError):
            importlib.import_module(_MUON)
    finally:
        compiler.compile = original


import_deepspeed_muon()
