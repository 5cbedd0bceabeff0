"""AdamW without torch's decorators is torch's AdamW; DeepSpeed's Muon still works, uncompiled."""

import copy

import torch
from deepspeed.runtime import compiler
from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS

from megachat.parallel.without_compiler import AdamW, import_deepspeed_muon


def test_steps_are_those_of_torch_to_the_bit():
    torch.manual_seed(0)
    theirs = [torch.nn.Parameter(torch.randn(5, 3)), torch.nn.Parameter(torch.randn(7))]
    ours = copy.deepcopy(theirs)
    optimizers = []
    for made, parameters in ((torch.optim.AdamW, theirs), (AdamW, ours)):
        groups = [{"params": [parameter], "lr": 0.1 / (1 + number)} for number, parameter in enumerate(parameters)]
        optimizers.append(made(groups, betas=(0.8, 0.9), weight_decay=0.3, fused=True))
    for _ in range(3):
        for parameter, same in zip(theirs, ours, strict=True):
            parameter.grad = torch.randn_like(parameter)
            same.grad = parameter.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert all(torch.equal(parameter, same) for parameter, same in zip(theirs, ours, strict=True))
    assert torch.is_grad_enabled() and AdamW in ZERO_SUPPORTED_OPTIMIZERS


def test_deepspeed_compiles_what_comes_after_its_muon():
    before = compiler.compile
    import_deepspeed_muon()
    assert compiler.compile is before
