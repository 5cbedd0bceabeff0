"""Training in FP8 by torch on every axis: steps are sane and not bfloat16's, evaluation is bfloat16's to the bit, and
its state loads without FP8.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from megachat.evals.bpb import ValidationRows, bits_per_byte
from megachat.place import place_of
from megachat.programs.verify_layout import warm_up
from megachat.train.build import build_training_model
from megachat.train.micro_batch_replay import replay_micro_batch
from megachat.train.replicas import compare_replicas
from megachat.train.step import set_schedules
from tests.harness import run_ranks
from tests.training import (
    assembled,
    build,
    gradient_pieces,
    load_whole_state,
    random_rows,
    rows_of_rank,
    small_config,
    take_step,
    whole_state,
)

VOCAB, ROWS, TOKENS, STEPS = 256, 8, 65, 2
MODEL = {"depth": 2, "aspect_ratio": 128, "head_size": 64, "kv_heads": 4, "sequence_len": 64, "window_pattern": "L"}
# E4M3 rounds to 2^-4; a token's logits, of size 1, as much; the mean over all tokens varies by the square root of their
# number less. Twice five standard deviations, for two steps.
LOSS_NOISE = 10 * 2**-4 / (ROWS * (TOKENS - 1)) ** 0.5
LAYOUTS = [(1, {}), (2, {}), (2, {"tensor": 2}), (2, {"tensor": 2, "sequence": True}), (2, {"pipeline": 2})]


def fp8_config(fp8: str, parallel: dict, **batch):
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


def train(config, plant=lambda training: None):
    """Returns (the training, its state before, losses and gradient norms of its steps, the first step's mean
    gradients).
    """
    training = build(config, VOCAB)
    warm_up(training)
    plant(training)
    started, losses, norms, gradients = whole_state(training), [], [], {}
    for step in range(STEPS):
        set_schedules(training, step)
        inspect = None if step else lambda: gradients.update(gradient_pieces(training))
        rows = random_rows(step, ROWS, TOKENS, VOCAB)
        replay_micro_batch(training, rows_of_rank(training, rows), step, Path("no evidence"))
        loss, norm, skipped = take_step(training, rows, inspect_gradients=inspect)
        compare_replicas(training, step + 1, Path("no evidence"))
        assert not skipped
        losses.append(loss)
        norms.append(norm)
    return training, started, losses, norms, assembled(gradients, training)


def first_gradients(config):
    return train(config)[4]


def train_then_evaluate_without(config, plain):
    training, started, losses, norms, gradients = train(config)
    bf16_bits, state = bits(training), whole_state(training)
    products = sum(getattr(module, "product", None) is not None for module in training.layers.modules())
    other = build_training_model(plain, training.plan, training.mesh, torch.ones(VOCAB, dtype=torch.int64))
    load_whole_state(other, state, STEPS)
    wanted_bits = bits(other)
    load_whole_state(other, started, 0)
    set_schedules(other, 0)
    bf16, _, _ = take_step(other, random_rows(0, ROWS, TOKENS, VOCAB))
    load_whole_state(training, whole_state(other), 1)  # and back: FP8 continues from bfloat16
    onward = []
    for each in (training, other):
        set_schedules(each, 1)
        onward.append(take_step(each, random_rows(1, ROWS, TOKENS, VOCAB))[0])
    return losses, norms, bf16_bits, wanted_bits, [(bf16, losses[0]), tuple(onward)], products, gradients


def distances(gradients, others) -> dict[str, float]:
    """By matrix: the norm of the difference of two gradients over the norm of the second."""
    return {
        name: ((gradients[name] - other).norm() / other.norm()).item()
        for name, other in others.items()
        if other.numel() > 1000  # of few elements the noise has no steady size
    }


def compare(ranks, alone, noise) -> None:
    """Hold a layout in FP8 to one process in FP8. noise: `distances` of that process from bfloat16.

    A layout scales other parts of a tensor together, so it rounds to other numbers of the same error: two such errors
    are independent, so they differ by the square root of two of one; it is held to twice that. Losses are held to what
    that rounding can do to them.
    """
    for losses, norms, *_, gradients in ranks:
        for name, distance in distances(gradients, alone[-1]).items():
            assert distance < 2 * noise[name], f"gradient of {name}: {distance:.3f} away, FP8 alone {noise[name]:.3f}"
        assert losses == pytest.approx(alone[0], abs=LOSS_NOISE)
        assert norms[0] == pytest.approx(alone[1][0], rel=2 * max(noise.values()))
        assert np.isfinite(norms).all() and losses[1] < losses[0] + LOSS_NOISE


@pytest.fixture(scope="module")
def alone():
    return run_ranks(train_then_evaluate_without, 1, fp8_config("tensorwise", {}), fp8_config("off", {}))[0]


@pytest.fixture(scope="module")
def noise(alone) -> dict[str, float]:
    """What FP8 does to the gradient of each matrix, in one process."""
    noise = distances(alone[-1], run_ranks(first_gradients, 1, fp8_config("off", {}))[0])
    assert len(noise) > 12 and max(noise.values()) < 0.5
    return noise


@pytest.mark.parametrize(("world", "parallel"), LAYOUTS)
def test_every_layout_trains_in_fp8_and_evaluates_in_bfloat16(world, parallel, alone, noise):
    ranks = [alone]
    if world > 1:
        configs = fp8_config("tensorwise", parallel), fp8_config("off", parallel)
        ranks = run_ranks(train_then_evaluate_without, world, *configs)
    assert sum(products for *_, products, _ in ranks) == (12 if "pipeline" in parallel else 12 * world)
    for _, _, bf16_bits, wanted_bits, pairs, _, _ in ranks:
        assert bf16_bits == wanted_bits, "evaluation was in FP8, or the state is not what was evaluated"
        for bf16, fp8 in pairs:
            assert 0 < abs(fp8 - bf16) < LOSS_NOISE, "FP8 changed nothing, or too much"
    compare(ranks, alone, noise)


def double_a_product(training) -> None:
    """A scale that is off by one power of two, in one product of rank 1.

    (Queries and keys are normalized, values are not.)
    """
    if training.mesh.world.rank == 1:
        products = [module for module in training.layers.modules() if getattr(module, "product", None) is not None]
        module = next(module for module in products if place_of(module.weight).name.endswith("attn.c_v.weight"))
        module.register_forward_hook(lambda module, inputs, output: 2 * output)


def gradients_with_a_wrong_scale(config):
    return train(config, plant=double_a_product)[2:]


@pytest.mark.parametrize("parallel", [{"tensor": 2}, {"pipeline": 2}])
def test_a_planted_fault_is_reported(parallel, alone, noise):
    with pytest.raises(AssertionError, match="gradient of "):
        compare(run_ranks(gradients_with_a_wrong_scale, 2, fp8_config("tensorwise", parallel)), alone, noise)


def train_with_all_kinds():
    return [train(fp8_config("tensorwise", {}, recompute=kind))[2:4] for kind in ("none", "selective", "block")]


def test_a_recomputed_forward_pass_is_in_fp8_too(alone):
    """Layers round the same numbers again: the gradients are those of what was kept, to the bit."""
    none, selective, block = run_ranks(train_with_all_kinds, 1)[0]
    assert none == selective == block == alone[:2]
