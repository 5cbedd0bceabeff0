"""How Transformer Engine is called.

It needs a GPU, so a stand-in with its interface takes the calls; tests/gpu uses the real one.
"""

import sys
import types
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from megachat.kernels import te
from megachat.kernels.attention import attention
from megachat.kernels.fp8 import Fp8Choice, apply_fp8
from megachat.kernels.linear import Linear
from megachat.model.gpt import MLP
from megachat.planning.dimensions import Dimensions

GPU = torch.device("cuda")


class StandIn:
    """transformer_engine.pytorch and transformer_engine.common; records how they are called."""

    def __init__(self, fp8=(True, ""), blocks=(False, "needs CUDA 12.9")):
        self.built, self.contexts, self.inside = [], [], None
        stand_in = self

        class TheirLinear(nn.Module):
            def __init__(self, in_features, out_features, **settings):
                super().__init__()
                stand_in.built.append((in_features, out_features, settings))
                settings["init_method"](None)
                self.weight = nn.Parameter(torch.empty(out_features, in_features, device=settings["device"]))

            def fast_setattr(self, name, value):
                self.__dict__[name] = value

            def forward(self, x):
                self.set_activation_dtype(x)
                stand_in.contexts.append(stand_in.inside)
                return nn.functional.linear(x, self.weight.to(self.activation_dtype))

        class TheirAttention(nn.Module):
            def __init__(self, heads, size, **settings):
                super().__init__()
                stand_in.built.append((heads, size, settings))

            def forward(self, q, k, v, window_size):
                stand_in.contexts.append(window_size)
                return q.flatten(2)

        @contextmanager
        def autocast(enabled, recipe):
            self.inside = (enabled, recipe)
            yield
            self.inside = None

        answers = {
            "is_fp8_available": lambda return_reason: fp8,
            "is_fp8_block_scaling_available": lambda return_reason: blocks,
        }
        self.pytorch = types.SimpleNamespace(
            Linear=TheirLinear, DotProductAttention=TheirAttention, autocast=autocast, **answers
        )
        recipe = types.SimpleNamespace(Float8CurrentScaling=lambda: "current", Float8BlockScaling=lambda: "block")
        self.modules = {
            "transformer_engine": types.SimpleNamespace(pytorch=self.pytorch),
            "transformer_engine.pytorch": self.pytorch,
        }
        self.modules["transformer_engine.common"] = types.SimpleNamespace(recipe=recipe)


@pytest.fixture
def installed(monkeypatch):
    """Replaces the package by a stand-in, or by nothing."""

    def put(stand_in=None, **versions):
        monkeypatch.setattr(te, "_package_versions", lambda: versions)
        monkeypatch.setattr(te, "compute_capability", lambda device: (9, 0))
        for name in ("transformer_engine", "transformer_engine.pytorch", "transformer_engine.common"):
            monkeypatch.setitem(
                sys.modules, name, stand_in.modules[name] if stand_in else None
            )  # None: importing it fails

    return put


def test_the_reason_why_it_cannot_be_used(installed):
    assert te.te_problem(torch.device("cpu")) == "this machine has no CUDA device"
    installed()
    assert te.te_problem(GPU) == "the package transformer_engine is not installed"
    installed(transformer_engine="2.20.2", transformer_engine_torch="2.19.0")
    assert te.te_problem(GPU).startswith(
        "its packages must have one version, but these are installed: transformer_engine 2.20.2, "
    )
    installed(transformer_engine="2.8.0")
    assert te.te_problem(GPU) == "transformer_engine 2.8.0 is older than 2.9"
    installed(transformer_engine="2.20.2", transformer_engine_torch="2.20.2")
    assert te.te_problem(GPU).startswith("transformer_engine cannot be imported (ModuleNotFoundError: ")
    installed(StandIn(fp8=(False, "no FP8")), transformer_engine="2.20.2")
    assert te.te_problem(GPU) is None and te.te_attention_problem(GPU) is None
    assert te.te_problem(GPU, "tensorwise") == "transformer_engine 2.20.2 reports: no FP8"
    assert te.te_problem(GPU, "blockwise") == "transformer_engine 2.20.2 reports: needs CUDA 12.9"


@pytest.mark.parametrize(("recipe", "theirs"), [("tensorwise", "current"), ("blockwise", "block")])
def test_linears_keep_our_weights_and_names_and_enter_fp8_in_training_alone(recipe, theirs, installed):
    stand_in = StandIn()
    installed(stand_in, transformer_engine="2.20.2")
    layer = nn.ModuleDict({"c_fc": Linear(128, 256), "gate": Linear(12, 256)})
    nn.init.normal_(layer["c_fc"].weight)
    before, random = dict(layer.named_parameters()), torch.get_rng_state()
    assert apply_fp8([layer], Fp8Choice(recipe, "te", "")) == 1
    ((columns, rows, settings),) = stand_in.built
    assert (columns, rows, settings["bias"], settings["device"]) == (128, 256, False, "meta")
    assert settings.keys() == {"bias", "params_dtype", "init_method", "device"}, (
        "the tensor axis communicates around it, as around the plain linear"
    )
    assert list(layer.state_dict()) == ["c_fc.weight", "gate.weight"], "no _extra_state"
    assert dict(layer.named_parameters()).keys() == before.keys() and torch.equal(torch.get_rng_state(), random)
    x = torch.randn(2, 64, 128).bfloat16()  # the weights are float32
    layer["c_fc"](x).float().sum().backward()
    assert layer["c_fc"].weight is before["c_fc.weight"] and layer["c_fc"].weight.grad is not None
    layer.eval()
    assert torch.equal(layer["c_fc"](x), nn.functional.linear(x, layer["c_fc"].weight.bfloat16()))
    layer.train()
    layer["c_fc"].weight = nn.Parameter(torch.zeros(256, 128))  # as a cut would do
    assert not layer["c_fc"](x).any()
    assert stand_in.contexts == [(True, theirs)] * 2 and stand_in.inside is None
    with pytest.raises(ValueError, match="FP8 needs multiples of"):
        layer["c_fc"](x[:, :3])


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputed_forward_pass_enters_fp8_again(reentrant, installed):
    stand_in = StandIn()
    installed(stand_in, transformer_engine="2.20.2")
    layer = nn.ModuleDict({"c_fc": Linear(128, 256)})
    nn.init.normal_(layer["c_fc"].weight)
    apply_fp8([layer], Fp8Choice("tensorwise", "te", ""))
    x = torch.randn(16, 128).bfloat16().requires_grad_()
    checkpoint(layer["c_fc"], x, use_reentrant=reentrant).float().sum().backward()
    assert stand_in.contexts == [(True, "current")] * 2 and x.grad is not None


def test_without_a_recipe_no_context_is_entered(installed):
    stand_in = StandIn()
    installed(stand_in, transformer_engine="2.20.2")
    weight = nn.Parameter(torch.randn(5, 3))
    assert te.TELinears(None).build(weight)(torch.ones(7, 3), weight).shape == (7, 5) and stand_in.contexts == [None]


def test_compiled_layers_share_their_graphs(installed):
    """If the code around each linear were compiled per layer, torch would stop compiling after eight."""
    stand_in = StandIn()
    installed(stand_in, transformer_engine="2.20.2")
    layers = [MLP(Dimensions(1, 128, 1, 1, 128, 16, 64, (16,)), 0) for _ in range(3)]
    assert apply_fp8(layers, Fp8Choice("tensorwise", "te", "")) == 6
    compiled = []

    def count(graph, inputs):
        compiled.append(graph)
        return graph

    torch._dynamo.reset()
    x = torch.randn(1, 16, 128).bfloat16()
    for layer in layers:
        torch.nn.init.normal_(layer.c_fc.weight), torch.nn.init.normal_(layer.c_proj.weight)
        layer.compile(dynamic=False, backend=count)
        layer(x)
        if layer is layers[0]:
            first = len(compiled)
    assert first > 0 and len(compiled) == first and stand_in.contexts == [(True, "current")] * 6


def test_attention_gets_windows_in_its_convention(installed):
    stand_in = StandIn()
    installed(stand_in, transformer_engine="2.20.2")
    attend, q, k = te.TEAttention(20), torch.randn(2, 20, 4, 16), torch.randn(2, 20, 2, 16)
    for window in (7, 18, 19, 20):
        assert torch.equal(attend(q, k, k, window), q)
    assert stand_in.contexts == [(7, 0), (18, 0), (-1, 0), (-1, 0)]
    ((heads, size, settings),) = stand_in.built
    assert (heads, size, settings["num_gqa_groups"], settings["qkv_format"], settings["attention_dropout"]) == (
        4,
        16,
        2,
        "bshd",
        0.0,
    )
    assert (
        torch.equal(attend(q[:, :9], k[:, :9], k[:, :9], 7), attention(q[:, :9], k[:, :9], k[:, :9], 7))
        and len(stand_in.contexts) == 4
    )
