"""Lookup layers in the model: without effect at the start, the formula, counts, FLOPs and dtypes."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megachat.kernels.fp8 import Fp8Choice, apply_fp8
from megachat.model.gpt import ModelOptions, build_layers, run_layers
from megachat.model.lookup import Lookup, LookupMix
from megachat.model.parameters import placed_parameters
from megachat.place import place_of
from megachat.planning.dimensions import (
    LookupDimensions,
    flops_per_token,
    layer_costs,
    lookup_flops,
    parameter_counts,
    scaling_parameters,
)
from tests.unit.model.test_gpt import small

ROWS = [1 + token % 7 for token in range(97)]
LOOKUP = LookupDimensions((0, 2), sum(ROWS), 80, True, "none", 4.5, " ".join(map(str, ROWS)))
UNTIED = replace(LOOKUP, tied=False, score_scale="sqrt", blocks=(4,))
WITHOUT = small()


def random_ids(batch=2, tokens=200) -> torch.Tensor:
    return torch.randint(0, 97, (batch, tokens), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lookup", [LOOKUP, UNTIED], ids=["tied", "untied"])
def test_the_model_starts_as_the_one_without(lookup, dtype):
    options, ids = ModelOptions(compute_dtype=dtype), random_ids()
    hidden, _ = run_layers(build_layers(replace(WITHOUT, lookup=lookup), options, seed=3), ids)
    expected, _ = run_layers(build_layers(WITHOUT, options, seed=3), ids)
    assert hidden.dtype == dtype and torch.equal(hidden, expected)


@pytest.mark.parametrize("lookup", [LOOKUP, UNTIED], ids=["tied", "untied"])
def test_a_layer_is_its_formula(lookup):
    """Compares with one token at a time, in float64."""
    dims = replace(WITHOUT, lookup=lookup)
    layer = Lookup(dims, lookup, torch.float32, lookup.blocks[0])
    weights = {}
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
        weights[place_of(parameter).name.split(".", 2)[2]] = parameter.detach().double()
    x, ids = torch.randn(1, 50, dims.width), random_ids(1, 50)
    keys = weights["keys.weight"]
    values = keys if lookup.tied else weights["values.weight"]
    first = lookup.first_rows()

    def norm(vector):
        return vector / (vector.square().mean() + dims.norm_epsilon).sqrt()

    for at, token in enumerate(ids[0].tolist()):
        rows, state = slice(first[token], first[token + 1]), x[0, at].double()
        scores = keys[rows] @ norm(state) * (dims.width**-0.5 if lookup.score_scale == "sqrt" else 1.0)
        up = norm(weights["w_up.weight"] @ (scores.softmax(0) @ values[rows]))
        mix = torch.cat((weights["w_mix_up.weight"], weights["w_mix_x.weight"]), dim=1)
        expected = state + mix @ torch.cat((up, state))
        assert (layer(x, ids)[0, at].double() - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("lookup", [LOOKUP, UNTIED], ids=["tied", "untied"])
def test_counts_are_those_of_the_model(lookup):
    dims = replace(WITHOUT, lookup=lookup)
    with torch.device("meta"):
        layers = build_layers(dims, ModelOptions())
    sizes = [sum(parameter.numel() for parameter in layer.parameters()) for layer in layers]
    assert sizes == [parameters for parameters, _ in layer_costs(dims)]
    assert sum(sizes) == parameter_counts(dims)["total"]
    tables = sum(p.numel() for p in placed_parameters(layers) if place_of(p).cut == "tokens")
    assert tables == parameter_counts(dims)["lookup_tables"]
    matrices = sum(p.numel() for p in placed_parameters(layers) if ".w_" in place_of(p).name)
    assert scaling_parameters(dims) - scaling_parameters(WITHOUT) == matrices  # tables are not counted
    reads = sum(lookup_flops(dims, block) for block in range(dims.depth))
    assert reads == len(lookup.blocks) * 12 * 4.5 * dims.width
    assert flops_per_token(dims) - flops_per_token(WITHOUT) == 6 * matrices + reads


def test_matrices_cost_what_is_counted():
    """What reading costs is counted apart: megachat.kernels.lookup computes the scores again in the backward pass."""
    dims = replace(WITHOUT, lookup=LOOKUP)
    mix, tokens = LookupMix(dims, LOOKUP, 0), 64
    inputs = torch.randn(1, tokens, 2 * dims.width, requires_grad=True)
    with FlopCounterMode(display=False) as flops:
        mix(inputs).sum().backward()
    assert flops.get_total_flops() == 6 * tokens * sum(parameter.numel() for parameter in mix.parameters())


def test_tables_have_the_dtype_of_value_embeddings():
    """float32 under fp16, whose gradients need unscaling."""
    for dtype, wanted in ((torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)):
        layers = build_layers(replace(WITHOUT, lookup=LOOKUP), ModelOptions(compute_dtype=dtype), seed=1)
        tables = [p for p in placed_parameters(layers) if place_of(p).cut == "tokens"]
        assert len(tables) == 2 and all(table.dtype == wanted for table in tables)


def test_a_table_without_an_allocation_cannot_be_read():
    layers = build_layers(replace(WITHOUT, lookup=replace(LOOKUP, rows_per_token="")), ModelOptions(), seed=1)
    with pytest.raises(IndexError):
        run_layers(layers, random_ids())


def test_fp8_covers_the_matrices():
    dims = replace(small(depth=1, heads=8, kv_heads=8), lookup=replace(LOOKUP, blocks=(0,), up_width=512))
    layers = build_layers(dims, ModelOptions(compute_dtype=torch.bfloat16), seed=1)
    assert apply_fp8(list(layers), Fp8Choice("tensorwise", "torch", "")) == 6 + 3
    mix = next(module for module in layers.modules() if isinstance(module, LookupMix))
    assert all(linear.product is not None for linear in (mix.w_up, mix.w_mix_up, mix.w_mix_x))
