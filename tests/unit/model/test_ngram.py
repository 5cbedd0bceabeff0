"""N-gram values in the model: against the formulas, without effect at the start, counts, FLOPs, and recomputation."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megachat.kernels.ngram import ngram_rows, signs
from megachat.model.gpt import Block, Loss, ModelOptions, Rotary, build_layers, logits, run_layers
from megachat.model.ngram import NgramHashes, NgramTable
from megachat.model.parameters import load_whole, placed_parameters
from megachat.place import place_of
from megachat.planning.dimensions import (
    NgramDimensions,
    flops_per_token,
    layer_costs,
    parameter_counts,
    resolve_stages,
    scaling_parameters,
)
from tests.unit.model.test_gpt import small, transcription

BOS = 96
WIDE = NgramDimensions((1, 2), (2, 3), 300, 32, True, 5, BOS)  # block 1 has no value embedding, block 2 has one
NARROW = replace(WIDE, width=8, orders=(2, 5), blocks=(0, 4))


def with_ngrams(ngram=WIDE, **sizes):
    return replace(small(**sizes), ngram=ngram)


def random_ids(batch=2, tokens=200):
    ids = torch.randint(0, 97, (batch, tokens), generator=torch.Generator().manual_seed(1))
    ids[:, 0] = BOS
    return ids


def random_weights(layers, scale=0.3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    weights: dict[str, torch.Tensor] = {}
    for parameter in placed_parameters(layers):
        place = place_of(parameter)
        if place.name not in weights:
            weights[place.name] = torch.randn(place.whole, generator=generator, dtype=torch.float64) * scale
        load_whole(parameter, weights[place.name])
    return weights


@pytest.mark.parametrize("ngram", [WIDE, NARROW, replace(WIDE, sign_trick=False)], ids=["wide", "narrow", "no signs"])
def test_values_follow_the_formulas(ngram):
    """Compares with the formulas of the model, whose values get the gated rows of every token, one at a time."""
    dims = with_ngrams(ngram)
    layers = build_layers(dims, ModelOptions(compute_dtype=torch.float64)).double()
    weights, ids = random_weights(layers), random_ids()

    def extra_values(block, h, row):  # [tokens, kv_width]
        result = torch.zeros(len(row), dims.kv_width, dtype=torch.float64)
        for order in ngram.orders if block in ngram.blocks else ():
            gate = 3 * torch.sigmoid(
                h[:, :12] @ weights[f"transformer.h.{block}.attn.ngram_gate_{order}.weight"].T
            ).repeat_interleave(dims.head_size, 1)
            index = ngram_rows(row[None], order, ngram.rows, ngram.seed, ngram.bos)[0]
            pattern = signs(row[None], order, ngram.seed, ngram.width)[0]
            for at in range(len(row)):
                if index[at] >= 0:
                    value = weights[f"ngram.{block}.{order}.weight"][index[at]]
                    value = value * pattern[at] if ngram.sign_trick else value
                    if ngram.width < dims.kv_width:
                        value = weights[f"ngram.{block}.{order}.up.weight"] @ value
                    result[at] += gate[at] * value
        return result

    result = logits(run_layers(layers, ids), dims).double()
    torch.testing.assert_close(result, transcription(dims, weights, ids, extra_values), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ngram", [WIDE, NARROW], ids=["wide", "narrow"])
def test_the_model_starts_as_the_one_without(ngram, dtype):
    ids, options = random_ids(), ModelOptions(compute_dtype=dtype)
    without, layers = (build_layers(dims, options, seed=3) for dims in (small(), with_ngrams(ngram)))
    for layers_ in (without, layers):  # attention would have no effect either
        for layer in layers_[1:-1]:
            torch.nn.init.normal_(layer.attn.c_proj.weight, std=0.05, generator=torch.Generator().manual_seed(2))
    hidden, expected = run_layers(layers, ids)[0], run_layers(without, ids)[0]
    assert torch.equal(hidden, expected)
    Loss(small(), torch.ones(97))(run_layers(layers, ids), ids).backward()
    tables = {place_of(p).name: p for p in placed_parameters(layers) if place_of(p).cut == "rows"}
    assert len(tables) == 4 and all(not table.any() and table.grad.any() for table in tables.values())
    with torch.no_grad():
        for table in tables.values():
            table += 1
    assert not torch.equal(run_layers(layers, ids)[0], expected)


@pytest.mark.parametrize("recompute", ["selective", "block"])
@pytest.mark.parametrize("ngram", [WIDE, NARROW], ids=["wide", "narrow"])
def test_recomputation_gives_the_same_gradients(ngram, recompute):
    gradients = []
    for options in (ModelOptions(), ModelOptions(recompute=recompute)):
        layers = build_layers(with_ngrams(ngram), options)
        random_weights(layers, 0.05)
        Loss(small(), torch.ones(97))(run_layers(layers, random_ids()), random_ids()).backward()
        gradients.append([parameter.grad for parameter in placed_parameters(layers)])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_blocks_share_hashes_until_the_ids_change():
    hashes, ids = NgramHashes(WIDE), random_ids()
    ids[:, 0] = 1
    rows, pattern = hashes(ids, 2)
    assert hashes(ids, 2)[0] is rows and hashes(ids, 2)[1] is pattern and hashes(ids, 3)[0] is not rows
    before = torch.full((2, 2), 7)
    continued = hashes(ids, 2, before)[0]  # ranks share requests, whether they continue a text or not
    assert hashes(ids, 2, before)[0] is continued and not torch.equal(continued, rows)
    assert torch.equal(hashes(ids, 2, before + 1)[0][:, 1:], rows[:, 1:]) and torch.equal(hashes(ids, 2)[0], rows)
    ids[:, 5] += 1
    assert torch.equal(hashes(ids, 2)[0], ngram_rows(ids, 2, 300, 5, BOS)) and not torch.equal(hashes(ids, 2)[0], rows)
    layers = build_layers(with_ngrams(), ModelOptions())
    assert layers[2].ngram.hashes is layers[3].ngram.hashes


def test_rows_that_are_elsewhere_are_read_by_columns():
    """Two halves of the key/value heads read half of the columns each, and the columns are the whole table's."""
    dims, ids = with_ngrams(), random_ids()
    whole = NgramTable(dims, WIDE, 1, 2, torch.float32)
    torch.nn.init.normal_(whole.weight)
    rows, pattern = NgramHashes(WIDE)(ids, 2)
    expected, seen = whole(rows, pattern, torch.float32), []
    for rank in (0, 1):
        table = NgramTable(dims, WIDE, 1, 2, None)
        assert not list(table.parameters()) and table.place == whole.place
        with pytest.raises(RuntimeError, match="neither a weight nor a function"):
            table(rows, pattern, torch.float32)
        columns = whole.weight[:, rank * 16 : (rank + 1) * 16].detach()
        padded = torch.cat((columns, torch.zeros(1, 16)))  # row -1
        table.attach(lambda index, padded=padded: padded[index], 2, rank)
        seen.append(table(rows, pattern, torch.float32))
    assert torch.equal(torch.cat(seen, dim=-1), expected)


@pytest.mark.parametrize("ngram", [WIDE, NARROW], ids=["wide", "narrow"])
def test_counts_are_the_built_models_and_torchs(ngram):
    dims, without = with_ngrams(ngram), small()
    parameters = {place_of(p).name: p for p in placed_parameters(build_layers(dims, ModelOptions()))}
    counts = parameter_counts(dims)
    assert counts["total"] == sum(p.numel() for p in placed_parameters(build_layers(dims, ModelOptions())))
    assert counts["ngram"] == sum(p.numel() for name, p in parameters.items() if place_of(p).cut == "rows")
    extra = counts["matrices"] - parameter_counts(without)["matrices"]
    assert extra == sum(p.numel() for name, p in parameters.items() if "gate_" in name or name.endswith("up.weight"))
    assert scaling_parameters(dims) == scaling_parameters(without) + extra  # no tables
    assert flops_per_token(dims) == flops_per_token(without) + 6 * extra
    assert sum(cost for cost, _ in layer_costs(dims)) == counts["total"]
    assert sum(cost for cost, _ in layer_costs(dims, 4)) == counts["total"] - counts["ngram"] * 3 // 4

    def counted(dims):
        block, options = ngram.blocks[0], ModelOptions()
        made = Block(dims, options, Rotary(dims, options), block, NgramHashes(dims.ngram) if dims.ngram else None)
        x = torch.randn(2, 64, dims.width, requires_grad=True)
        with FlopCounterMode(display=False) as flops:
            made((x, x, random_ids(tokens=64)))[0].sum().backward()
        return flops.get_total_flops() / 128

    first = sum(
        p.numel()
        for name, p in parameters.items()
        if ("gate_" in name or name.endswith("up.weight")) and place_of(p).block == ngram.blocks[0]
    )
    assert counted(dims) - counted(without) == 6 * first


def test_stages_count_the_share_of_a_rank():
    ngram = replace(WIDE, blocks=(0,), rows=100_000)
    dims = with_ngrams(ngram, depth=6)
    alone, shared = resolve_stages(dims, 2), resolve_stages(dims, 2, 64)
    assert alone[0][1] < shared[0][1]
