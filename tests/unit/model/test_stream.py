"""What the pipeline requires of the layers: any cut between them must train.

Single process; numbers name the traps this guards against.
"""

import pytest
import torch

from megachat.model.gpt import Loss, ModelOptions, build_layers
from megachat.model.parameters import placed_parameters
from megachat.optim.groups import GROUPS, assign_groups
from megachat.place import place_of
from megachat.planning.plan import resolve_plan
from tests.training import SMALL_VOCAB, random_rows, small_config


def small(depth: int):
    dims = resolve_plan(small_config(model={"depth": depth, "aspect_ratio": 32, "kv_heads": None}), 1, SMALL_VOCAB).dims
    return dims, build_layers(dims, ModelOptions(), seed=1)


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_every_cut_gives_the_gradients_of_the_uncut_model(depth):
    """Trap 8: a floating tensor that crosses a cut must require a gradient and get one."""
    dims, layers = small(depth)
    rows = random_rows(0, 2, 65, SMALL_VOCAB)
    loss = Loss(dims, torch.ones(SMALL_VOCAB))

    def gradients(cut: int | None):
        stream = rows[:, :-1]
        sent = received = ()
        for number, layer in enumerate(layers):
            if number == cut:
                sent = stream
                received = tuple(
                    part.detach().clone().requires_grad_() if part.is_floating_point() else part for part in stream
                )
                assert all(part.requires_grad for part in sent if part.is_floating_point())
                stream = received
            stream = layer(stream)
        loss(stream, rows[:, 1:]).backward()
        if cut is not None:
            floating = [(mine, theirs) for mine, theirs in zip(sent, received, strict=True) if mine.is_floating_point()]
            assert all(theirs.grad is not None for _, theirs in floating), (
                f"cut before layer {cut}: a tensor is sent and not used"
            )
            torch.autograd.backward([mine for mine, _ in floating], [theirs.grad for _, theirs in floating])
        result = [parameter.grad.clone() for parameter in layers.parameters()]
        layers.zero_grad()
        return result

    whole = gradients(None)
    for cut in range(1, len(layers)):
        for result, expected in zip(gradients(cut), whole, strict=True):
            assert torch.allclose(result, expected, rtol=1e-6, atol=1e-8)


def test_every_layer_alone_has_a_float32_adamw_group_and_no_0_dim_parameter():
    """Traps 6 and 7: ZeRO takes no stage without AdamW parameters, and DeepSpeed's broadcast no 0-dim ones."""
    for layer in small(3)[1]:
        parameters = placed_parameters([layer])
        groups = assign_groups([place_of(parameter) for parameter in parameters])
        first = [
            p
            for group in GROUPS
            for p in parameters
            if groups[place_of(p).name] is group and group.optimizer == "adamw"
        ][0]
        assert first.dtype == torch.float32
        assert all(parameter.ndim >= 1 for parameter in parameters)
