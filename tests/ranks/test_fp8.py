"""Training in FP8 by torch on every axis: steps are sane and not bfloat16's, evaluation is bfloat16's to the bit, and its state loads without FP8."""

import numpy as np
import pytest
import torch

from megachat.evals.bpb import ValidationRows, bits_per_byte
from megachat.programs.verify import warm_up
from megachat.train.build import build_training
from megachat.train.step import set_schedules
from tests.harness import run_ranks
from tests.training import build, load_whole_state, random_rows, small_config, take_step, whole_state

VOCAB, ROWS, TOKENS, STEPS = 256, 8, 65, 2
MODEL = {"depth": 2, "aspect_ratio": 128, "head_size": 64, "kv_heads": 4, "sequence_len": 64, "window_pattern": "L"}
LAYOUTS = [(1, {}), (2, {"tensor": 2}), (2, {"tensor": 2, "sequence": True}), (2, {"pipeline": 2})]


def asked(fp8: str, parallel: dict, **batch):
    batch |= {"tokens": ROWS * 64, "micro_rows": 2}
    return small_config(
        model=MODEL,
        batch=batch,
        parallel=parallel,
        precision={"compute": "bfloat16", "fp8": fp8, "fp8_backend": "torch"},
    )


def bits(training) -> float:
    rows = random_rows(9, 2, 51, VOCAB)  # 50 tokens: FP8 could not do these
    return bits_per_byte(training.engine, ValidationRows(iter(rows.split(1)), 2, 1, training.mesh), training.mesh)


def train(config):
    """(the training; its state before; losses and gradient norms of its steps)."""
    training = build(config, VOCAB)
    warm_up(training)
    started, losses, norms = whole_state(training), [], []
    for step in range(STEPS):
        set_schedules(training, step)
        loss, norm, skipped = take_step(training, random_rows(step, ROWS, TOKENS, VOCAB))
        assert not skipped
        losses.append(loss)
        norms.append(norm)
    return training, started, losses, norms


def train_then_evaluate_without(config, plain):
    training, started, losses, norms = train(config)
    found, state = bits(training), whole_state(training)
    products = sum(getattr(module, "product", None) is not None for module in training.layers.modules())
    other = build_training(plain, training.plan, training.mesh, torch.ones(VOCAB, dtype=torch.int64))
    load_whole_state(other, state, STEPS)
    wanted = bits(other)
    load_whole_state(other, started, 0)
    set_schedules(other, 0)
    bf16, _, _ = take_step(other, random_rows(0, ROWS, TOKENS, VOCAB))
    load_whole_state(training, whole_state(other), 1)  # and back: FP8 goes on from bfloat16
    onward = []
    for each in (training, other):
        set_schedules(each, 1)
        onward.append(take_step(each, random_rows(1, ROWS, TOKENS, VOCAB))[0])
    return losses, norms, found, wanted, (bf16, losses[0]), onward, products


@pytest.fixture(scope="module")
def alone():
    return run_ranks(train_then_evaluate_without, 1, asked("tensorwise", {}), asked("off", {}))[0]


@pytest.mark.parametrize(("world", "parallel"), LAYOUTS)
def test_every_layout_trains_in_fp8_and_evaluates_in_bfloat16(world, parallel, alone):
    same = parallel == {}
    ranks = (
        [alone]
        if same
        else run_ranks(train_then_evaluate_without, world, asked("tensorwise", parallel), asked("off", parallel))
    )
    assert sum(products for *_, products in ranks) == (12 if "pipeline" in parallel else 12 * world)
    for losses, norms, found, wanted, *pairs, _ in ranks:
        assert found == wanted, "evaluation was in FP8, or the state is not what was evaluated"
        for bf16, fp8 in pairs:
            assert 1e-5 < abs(fp8 - bf16) < 1e-2, "FP8 changed nothing, or too much"
        assert losses == pytest.approx(alone[0], abs=1e-2) and norms == pytest.approx(alone[1], rel=0.1)
        assert np.isfinite(norms).all() and losses[1] < losses[0] + 1e-2


def train_with_all_kinds():
    return [train(asked("tensorwise", {}, recompute=kind))[2:] for kind in ("none", "selective", "block")]


def test_a_recomputed_forward_pass_is_in_fp8_too(alone):
    """Layers round the same numbers again: the gradients are those of what was kept, to the bit."""
    none, selective, block = run_ranks(train_with_all_kinds, 1)[0]
    assert none == selective == block == alone[:2]
