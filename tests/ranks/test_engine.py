"""The engine's decisions and dtypes: skipped steps, float16, bfloat16 tables, state size, compilation.

Equal results: test_layouts.py.
"""

import math

import pytest
import torch

from megachat.place import place_of
from megachat.train.step import set_schedules
from tests.harness import run_ranks
from tests.muon import state_bytes
from tests.oracle import ROWS, TOKENS, train
from tests.training import SMALL_VOCAB, build, random_rows, small_config, take_step, whole_state


def skip_then_go_on(config, poison: str, bad_rank: int):
    training = build(config, SMALL_VOCAB)
    set_schedules(training, 0)
    take_step(training, random_rows(0, ROWS, TOKENS, SMALL_VOCAB))
    before = whole_state(training)
    if training.mesh.world.rank == bad_rank:
        parameter = next(p for p in training.layers.parameters() if place_of(p).name == poison)
        hook = parameter.register_hook(lambda gradient: torch.full_like(gradient, torch.inf))
    scale = training.engine.adamw.loss_scale
    loss, norm, skipped = take_step(training, random_rows(1, ROWS, TOKENS, SMALL_VOCAB))
    after = whole_state(training)
    if training.mesh.world.rank == bad_rank:
        hook.remove()
    halved = training.engine.adamw.loss_scale / scale
    _, _, skipped_next = take_step(training, random_rows(2, ROWS, TOKENS, SMALL_VOCAB))
    same = [name for name in before if torch.equal(before[name], after[name])]
    changed_next = sum(not torch.equal(after[name], tensor) for name, tensor in whole_state(training).items())
    return (
        math.isfinite(loss),
        norm,
        skipped,
        len(same) == len(before),
        halved,
        skipped_next,
        changed_next / len(before),
    )


@pytest.mark.parametrize("poison", ["transformer.h.1.mlp.c_fc.weight", "lm_head.weight"])
@pytest.mark.parametrize("compute", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(("world", "parallel"), [(2, {}), (4, {"tensor": 2, "pipeline": 2})])
def test_inf_in_one_gradient_of_one_rank_skips_everything_everywhere(world, parallel, poison, compute):
    model = {"aspect_ratio": 32, "head_size": 16, "kv_heads": 2}
    precision, ngram = {"compute": compute, "loss_scale": 1024.0}, {"blocks": (0, 2), "rows": 40, "storage": "host"}
    lookup = {"after_blocks": (1,), "rows": 97, "up_width": 32}
    config = small_config(model=model, precision=precision, parallel=parallel, ngram=ngram, lookup=lookup)
    bad_rank = 1 if world == 2 or poison != "lm_head.weight" else 3  # the second of the last stage
    for finite, norm, skipped, untouched, halved, skipped_next, changed in run_ranks(
        skip_then_go_on, world, config, poison, bad_rank
    ):
        assert finite and skipped and norm == math.inf
        assert untouched, "a skipped step changed state"
        assert halved == (0.5 if compute == "float16" else 1.0)
        assert not skipped_next and changed > 0.9


def test_float16_unscales_before_all_optimizers():
    tables = {"ngram": {"blocks": (1,), "rows": 40}, "lookup": {"after_blocks": (1,), "rows": 200}}
    plain = run_ranks(train, 1, small_config(**tables), 4)[0]
    # a window of one step doubles the scale at every step: an optimizer that divides by the new scale would move half
    # as far
    config = small_config(precision={"compute": "float16", "loss_scale": 256.0, "loss_scale_window": 1}, **tables)
    half = run_ranks(train, 2, config, 4)[0]
    for (loss, norm, skipped), (loss_plain, norm_plain, _) in zip(half[0], plain[0], strict=True):
        assert not skipped
        assert loss == pytest.approx(loss_plain, rel=5e-3)
        assert norm == pytest.approx(norm_plain, rel=5e-2)


def test_bfloat16_tables_accumulate_gradients_in_float32():
    config = small_config(precision={"compute": "bfloat16"})
    plain, (outcomes, _, (*_, state), views) = (
        run_ranks(train, 1, small_config(), 3)[0],
        run_ranks(train, 2, config, 3)[0],
    )
    for (loss, _, _), (loss_plain, _, _) in zip(outcomes, plain[0], strict=True):
        assert loss == pytest.approx(loss_plain, rel=2e-2)
    table = state["model/transformer.wte.weight"]
    assert torch.equal(views["transformer.wte.weight"][1], table.bfloat16().float())
    assert not torch.equal(table, table.bfloat16().float()), "the master of a bfloat16 table is float32"


def state_size(config):
    training = build(config, SMALL_VOCAB)
    take_step(training, random_rows(0, ROWS, TOKENS, SMALL_VOCAB))
    zero = training.engine.adamw
    adamw = sum(
        t.numel() * t.element_size()
        for flat in zero.single_partition_of_fp32_groups
        for t in (flat, *zero.optimizer.state[flat].values())
        if t.ndim
    )
    return state_bytes(training.muon), adamw, dict(training.plan.parameters)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_state_is_eight_bytes_a_muon_parameter_over_ranks_and_the_zero1_share(world):
    # kv_heads = heads makes all attention matrices alike, and 16 columns a head keeps every count divisible: no padding
    # to explain away
    config = small_config(model={"depth": 4, "kv_heads": None}, precision={"compute": "bfloat16"})
    for muon, adamw, parameters in run_ranks(state_size, world, config):
        gates = 2 * 4 * 12  # two gates of 4 heads x 12 channels, in a bucket padded to 64 elements a rank
        padded = (64 if world > 1 else 128) * world
        assert muon["master"] + muon["momentum"] == 8 * (parameters["matrices"] - gates + padded) // world
        tables = parameters["wte"] + parameters["value_embeds"] + parameters["lm_head"]
        assert 12 * tables // world <= adamw <= 12 * (tables + parameters["scalars"] + 6 * 2 * world) // world + 12
