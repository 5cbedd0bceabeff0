import dataclasses
import itertools
import json
import math

import pytest

from megachat.config import Config
from megachat.errors import UserError
from megachat.place import place_of
from megachat.planning.dimensions import (
    NgramDimensions,
    bubble_share,
    flops_per_token,
    layer_costs,
    linear_shapes,
    parameter_counts,
    resolve_stages,
    saved_dimensions,
)
from megachat.planning.explain import describe_plan
from megachat.planning.plan import resolve_plan
from megachat.planning.sizes import resolve_dimensions


def config(**sections) -> Config:
    return Config.model_validate(sections)


def test_the_speedrun_is_nanochats():
    plan = resolve_plan(config(model={"depth": 24}, horizon={"ratio": 8.0}, batch={"micro_rows": 16}), 8, 32768)
    assert (plan.dims.width, plan.dims.heads, plan.steps, plan.tokens_per_step, plan.accumulation) == (
        1536,
        12,
        5568,
        2**20,
        4,
    )
    assert plan.weight_decay == pytest.approx(0.0597, abs=1e-4)
    assert plan.flops_per_token == pytest.approx(4.775e9, rel=1e-4)
    assert plan.total_flops == pytest.approx(2.79e19, rel=1e-3)
    assert plan.rates["matrix"] == pytest.approx(0.02 * 2**0.5)
    assert plan.rates["smear"] == 0.2
    assert plan.rates["embedding"] == pytest.approx(0.3 * 2**0.5 * (1536 / 768) ** -0.5)
    assert plan.dims.windows == (512, 512, 512, 2048) * 6


def test_batches_are_nanochats_at_every_depth():
    """nanochat/scripts/base_train.py: B = B_ref * (D / D_ref)^0.383 up to the nearest power of two, D the target
    tokens.
    """
    batches = {depth: resolve_plan(config(model={"depth": depth}), 1, 32768).tokens_per_step for depth in range(4, 35)}
    # block matrices (12 w^2 per block, and 12 channels per head for the gates of every other block) and lm_head
    sizes = {
        depth: 12 * depth * (64 * depth) ** 2 + 12 * -(-depth // 2) * -(-depth // 2) + 32768 * 64 * depth
        for depth in batches
        if depth % 2 == 0  # whole heads of 128 channels
    }
    for depth, size in sizes.items():
        tokens = 2**19 * (size / sizes[12]) ** 0.383
        assert batches[depth] == 2 ** round(math.log2(tokens)), depth
    assert [math.log2(batches[depth]) for depth in (4, 8, 12, 20, 30, 34)] == [18, 18, 19, 20, 20, 21]


def test_a_batch_that_is_no_power_of_two():
    """786,432 tokens = 384 rows: rates and decay follow the root of the batch, as nanochat's for --total-batch-size."""
    sections = {"model": {"depth": 22}, "horizon": {"ratio": 9.4}}

    def planned(world=8, tokens=786_432, parallel=None, **batch):
        more = {"batch": {"tokens": tokens, **batch}, "parallel": parallel or {}}
        return resolve_plan(config(**sections, **more), world, 49152)

    plan, power = planned(micro_rows=16), planned(tokens=2**19)
    assert (plan.rows_per_step, plan.micro_rows, plan.accumulation) == (384, 16, 3)
    assert plan.steps == int(9.4 * (plan.parameters["matrices"] + plan.parameters["lm_head"])) // 786_432
    root = math.sqrt(1.5)
    for name, rate in plan.rates.items():
        assert rate == pytest.approx(power.rates[name] * (1.0 if name == "smear" else root)), name
    assert plan.rates["matrix"] == pytest.approx(0.02 * root)
    assert plan.weight_decay == pytest.approx(power.weight_decay * root)
    assert planned().micro_rows == 16 and planned(micro_rows=24).accumulation == 2
    layouts = [
        planned(micro_rows=32, world=12),
        planned(micro_rows=32, parallel={"tensor": 11}, world=44),
        planned(micro_rows=32, parallel={"pipeline": 2}),
        planned(micro_rows=16, world=24),
        planned(world=6),
    ]
    assert [(p.micro_rows, p.accumulation) for p in layouts] == [(32, 1), (32, 3), (32, 3), (16, 1), (16, 4)]
    assert all(p.rows_per_step == 384 for p in layouts)
    with pytest.raises(
        UserError, match=r"to 524288 \(256 rows\) or 1048576 \(512 rows\), or batch.micro_rows to 24 or 48"
    ):
        planned(micro_rows=32)
    automatic = resolve_plan(config(**sections), 8, 49152).tokens_per_step
    assert automatic & (automatic - 1) == 0


def test_every_derived_number_has_its_formula():
    plan = resolve_plan(config(), 1, 32768)
    expected = {
        "width",
        "heads",
        "windows",
        "target_tokens",
        "tokens_per_step",
        "rows_per_step",
        "micro_rows",
        "accumulation",
        "steps",
    }
    expected |= {"total_tokens", "flops_per_token", "total_flops", "weight_decay", "evaluation_rows"} | {
        f"rates.{name}" for name in plan.rates
    }
    assert expected <= set(plan.why)


def test_steps_win_over_flops_which_win_over_the_ratio():
    batch = {"tokens": 2048 * 8}
    by_ratio = resolve_plan(config(model={"depth": 2}, batch=batch), 1, 1024)
    by_flops = resolve_plan(
        config(model={"depth": 2}, batch=batch, horizon={"flops": by_ratio.flops_per_token * 2048 * 8 * 7.4}), 1, 1024
    )
    by_steps = resolve_plan(config(model={"depth": 2}, batch=batch, horizon={"flops": 1e9, "steps": 5}), 1, 1024)
    assert by_ratio.steps == int(12 * (by_ratio.parameters["matrices"] + by_ratio.parameters["lm_head"])) // (2048 * 8)
    assert (by_flops.steps, by_steps.steps) == (7, 5)
    assert (
        resolve_plan(config(model={"depth": 2}, batch=batch, horizon={"steps": 5, "stop_step": 3}), 1, 1024).stop_step
        == 3
    )


@pytest.mark.parametrize(
    ("batch", "world", "solved"),
    [
        ({"tokens": 64 * 12, "micro_rows": 2}, 3, (12, 2, 2)),
        ({"tokens": 64 * 12, "accumulation": 2}, 2, (12, 3, 2)),
        ({"micro_rows": 2, "accumulation": 5}, 3, (30, 2, 5)),
        ({"tokens": 64 * 12}, 1, (12, 12, 1)),
        ({"tokens": 64 * 34}, 1, (34, 2, 17)),
        ({"tokens": 64 * 30, "micro_rows": 2, "accumulation": 5}, 3, (30, 2, 5)),
    ],
)
def test_any_two_of_batch_micro_and_accumulation_settle_the_third(batch, world, solved):
    plan = resolve_plan(config(model={"depth": 2, "sequence_len": 64}, batch=batch, horizon={"steps": 1}), world, 100)
    assert (plan.rows_per_step, plan.micro_rows, plan.accumulation) == solved


@pytest.mark.parametrize(
    ("batch", "world", "parts"),
    [
        ({"tokens": 64 * 8}, 3, ("8 rows of 64", "3 data-parallel ranks", "384 (6 rows) or 576 (9 rows)", "divides 8")),
        ({"tokens": 64 * 8, "micro_rows": 3}, 1, ("3 rows per micro-batch", "384 (6 rows) or 576 (9 rows)")),
        ({"tokens": 100}, 1, ("1.5625 rows of 64", "64 (1 rows) or 128 (2 rows)")),
        (
            {"tokens": 64 * 8, "micro_rows": 2, "accumulation": 2},
            1,
            ("in one step", "set batch.tokens to 256 (4 rows)"),
        ),
    ],
)
def test_a_batch_that_does_not_fit_names_the_nearest_that_do(batch, world, parts):
    with pytest.raises(UserError) as caught:
        resolve_plan(config(model={"depth": 2, "sequence_len": 64}, batch=batch, horizon={"steps": 1}), world, 100)
    for part in parts:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("sections", "part"),
    [
        ({"parallel": {"tensor": 2}}, "does not divide the 1 rank that was started: start 2 ranks"),
        ({"parallel": {"sequence": True}}, "parallel.sequence requires parallel.tensor above 1"),
        ({"model": {"kv_heads": 4}}, "the nearest that does is 3"),
        ({"model": {"depth": 1, "aspect_ratio": 8, "head_size": 8}}, "24 channels"),
        ({"batch": {"tokens": 2**40}}, "shorter than one step"),
        ({"ngram": {"blocks": (1, 12)}}, "ngram.blocks has 12, but the 12 blocks are numbered 0 to 11: choose"),
        ({"ngram": {"blocks": (1,), "orders": ()}}, "ngram.orders is empty"),
        ({"ngram": {"blocks": (1,), "width": 800}}, "ngram.width is 800, but the key/value heads have 768 channels"),
        ({"ngram": {"blocks": (1,), "bos": 32768}}, "ngram.bos is 32768, but the vocabulary has the ids 0 to 32767"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(sections, part):
    with pytest.raises(UserError, match=part):
        resolve_plan(config(**sections), 1, 32768)


def test_ngram_tables_have_derived_sizes_and_change_no_scaling_rule():
    settings = {"blocks": (3, 1), "orders": (3, 2)}
    without, plan = (resolve_plan(config(**sections), 1, 32768) for sections in ({}, {"ngram": settings}))
    assert plan.dims.ngram == NgramDimensions((1, 3), (2, 3), 4 * 32768, 768, True, 0, 32768 - 9)
    assert plan.parameters["ngram"] == 4 * 4 * 32768 * 768 and without.parameters["ngram"] == 0
    assert {"ngram.rows", "ngram.width", "ngram.bos"} <= set(plan.why) and "without tables" in plan.why["target_tokens"]
    gates = 4 * 12 * 6
    assert plan.parameters["matrices"] == without.parameters["matrices"] + gates
    assert (
        plan.tokens_per_step == without.tokens_per_step and plan.flops_per_token == without.flops_per_token + 6 * gates
    )
    saved = json.loads(json.dumps(dataclasses.asdict(plan.dims)))
    assert saved_dimensions(saved) == plan.dims
    del saved["ngram"]  # of a checkpoint from before there were any
    assert saved_dimensions(saved) == without.dims
    described = describe_plan(plan)
    assert "  ngram.rows = 131,072   [4 * vocabulary" in described and "ngram" not in describe_plan(without).split("\n")
    other_seed = resolve_plan(config(ngram=settings, run={"seed": 7}), 1, 32768)
    assert other_seed.dims == plan.dims  # samples may have another seed than the tables


@pytest.mark.parametrize(
    ("sections", "world", "part"),
    [
        (
            {"parallel": {"tensor": 3, "pipeline": 2}},
            16,
            "does not divide the 16 ranks that were started: start 12 or 18 ranks",
        ),
        (
            {"parallel": {"tensor": 4}},
            8,
            "does not divide the model's 6 query heads: set parallel.tensor to 2, or to 3 on a",
        ),
        ({"parallel": {"tensor": 4}}, 12, "does not divide the model's 6 query heads: set parallel.tensor to 3"),
        (
            {"parallel": {"tensor": 6}, "model": {"kv_heads": 2}},
            6,
            "does not divide the model's 2 key/value heads: set parallel.tensor to 2",
        ),
        ({"parallel": {"pipeline": 16}}, 16, "more stages than the model's 12 blocks: set parallel.pipeline to 12"),
        (
            {"parallel": {"tensor": 3, "sequence": True}},
            3,
            r"model.sequence_len \(2048\) to be divisible by parallel.tensor \(3\)",
        ),
    ],
)
def test_a_layout_that_does_not_fit_names_the_nearest_that_does(sections, world, part):
    with pytest.raises(UserError, match=part):
        resolve_plan(config(**sections), world, 32768)


WIDE = {"depth": 2, "head_size": 128, "aspect_ratio": 128, "sequence_len": 64}


@pytest.mark.parametrize(
    ("sections", "world", "part"),
    [
        (
            {"precision": {"compute": "float16"}},
            1,
            "precision.compute is float16: set precision.compute=bfloat16, or precision.fp8=off",
        ),
        (
            {"model": {"sequence_len": 100}, "batch": {"micro_rows": 3}},
            1,
            "3 rows of 100 are 300: set batch.micro_rows to 4, or model.sequence_len to 96 or 112",
        ),
        (
            {"precision": {"fp8": "blockwise"}, "batch": {"micro_rows": 3}},
            1,
            "3 rows of 64 are 192: set batch.micro_rows to 2 or 4, or model.sequence_len to 128",
        ),
        (
            {"model": {"head_size": 24, "aspect_ratio": 12}},
            1,
            "would change nothing: no matrix of width 24 has sides of at least 128",
        ),
        (
            {"model": {"head_size": 60, "aspect_ratio": 60}, "parallel": {"tensor": 2}},
            2,
            "no matrix of width 120 cut in 2 has sides",
        ),
    ],
)
def test_fp8_that_does_not_fit_is_refused_with_what_does(sections, world, part):
    merged = {
        "model": WIDE,
        "precision": {"fp8": "tensorwise"},
        "batch": {"micro_rows": 2, "accumulation": 1},
        "horizon": {"steps": 1},
    }
    merged = {name: {**merged.get(name, {}), **sections.get(name, {})} for name in merged | sections}
    with pytest.raises(UserError) as caught:
        resolve_plan(config(**merged), world, 100)
    assert part in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("tensor", [1, 2])
def test_the_shapes_of_linears_are_the_models(tensor):
    from megachat.model.gpt import ModelOptions, build_layers

    wide = config(model=WIDE | {"kv_heads": 2 if tensor == 2 else 1})
    dims = resolve_dimensions(wide, 100)
    block = build_layers(dims, ModelOptions())[2]
    for name, (rows, columns) in linear_shapes(dims, tensor).items():
        weight = block.get_submodule(name).weight
        row_cut = place_of(weight).cut == "row"
        assert (rows, columns) == (
            weight.size(0) // (1 if row_cut else tensor),
            weight.size(1) // (tensor if row_cut else 1),
        )


@pytest.mark.parametrize("depth", [1, 5, 7, 24])
def test_layers_cost_what_the_model_costs(depth):
    dims = resolve_dimensions(config(model={"depth": depth}), 32768)
    parameters, flops = (sum(cost[kind] for cost in layer_costs(dims)) for kind in (0, 1))
    assert (parameters, flops) == (parameter_counts(dims)["total"], flops_per_token(dims))


@pytest.mark.parametrize(("depth", "stages"), [(1, 1), (5, 2), (7, 3), (7, 7), (24, 4), (24, 8)])
def test_stages_cover_the_layers_once_and_no_other_cut_is_better(depth, stages):
    dims = resolve_dimensions(config(model={"depth": depth}), 32768)
    costs = layer_costs(dims)
    shares = [p / sum(p for p, _ in costs) + f / sum(f for _, f in costs) for p, f in costs]

    def largest(cuts) -> float:
        return max(sum(shares[first:last]) for first, last in cuts)

    result = resolve_stages(dims, stages)
    assert [layer for first, last in result for layer in range(first, last)] == list(range(depth + 2)) and len(
        result
    ) == stages
    for inner in itertools.combinations(range(1, depth + 2), stages - 1) if stages <= 4 else ():
        cuts = (0, *inner, depth + 2)
        assert largest(result) <= largest(zip(cuts, cuts[1:], strict=False)) + 1e-12
    assert largest(result) < 1.5 * 2 / stages or stages == depth


def test_the_bubble_of_equal_stages_is_the_textbooks_and_unequal_ones_wait_longer():
    for stages, micro in ((1, 4), (2, 8), (4, 4), (8, 64)):
        assert bubble_share([7] * stages, micro) == pytest.approx((stages - 1) / (micro + stages - 1))
    assert bubble_share([6, 8], 8) > bubble_share([7, 7], 8)


def test_a_pipeline_gets_enough_micro_batches_by_default():
    plan = resolve_plan(config(parallel={"pipeline": 2}, batch={"tokens": 2048 * 64}, horizon={"steps": 1}), 4, 32768)
    assert (plan.micro_rows, plan.accumulation) == (4, 8)
