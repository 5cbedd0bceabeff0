"""Bits per byte against a direct sum over rows, and the same on any number of ranks."""

import math
from datetime import timedelta

import pytest
import torch
import torch.nn.functional as F

from megachat.evals.bpb import ValidationRows, bits_per_byte
from megachat.model.gpt import logits, run_layers
from megachat.parallel.build import start_collectives
from megachat.parallel.mesh import Axis, Mesh, build_mesh
from megachat.planning.plan import resolve_plan
from megachat.train.build import build_training_model
from megachat.train.step import set_schedules
from tests.harness import run_ranks
from tests.training import SMALL_VOCAB, random_rows, small_config, take_step

ROWS, MICRO_ROWS, TOKENS = 7, 2, 161  # 7 rows do not divide by 2 ranks or by micro-batches of 2
TOKEN_BYTES = torch.arange(SMALL_VOCAB) % 5  # every fifth token has no bytes, like special tokens


def mesh_of(ranks: int, rank: int) -> Mesh:
    alone, data = Axis("tensor", 1, 0, None, (0,)), Axis("data", ranks, rank, None, tuple(range(ranks)))
    return Mesh(
        world=data,
        data=data,
        tensor=alone,
        pipeline=alone,
        stage=data,
        saving=data,
        device=torch.device("cpu"),
        topology=None,
    )


def rank_batches(rows: torch.Tensor, ranks: int, rank: int):
    """Yields a rank's micro-batches as the loader does: every ranks-th row of each ranks * MICRO_ROWS rows."""
    for step in rows.split(ranks * MICRO_ROWS):
        yield step[rank::ranks]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_the_first_rows_count_once_and_the_others_not(ranks):
    rows = random_rows(0, 24, TOKENS, SMALL_VOCAB)
    counted = []
    for rank in range(ranks):
        share = ValidationRows(rank_batches(rows, ranks, rank), ROWS, MICRO_ROWS, mesh_of(ranks, rank))
        assert all(ids.shape == targets.shape == (MICRO_ROWS, TOKENS - 1) for ids, targets in share.micro_batches)
        assert len(share.micro_batches) == math.ceil(ROWS / (MICRO_ROWS * ranks)), (
            "all ranks need the same number, or they would wait for each other"
        )
        for ids, targets in share.micro_batches:
            for row, target in zip(ids, targets, strict=True):
                (number,) = [index for index, whole in enumerate(rows) if torch.equal(whole[:-1], row)]
                assert torch.equal(target, rows[number, 1:]) if number < ROWS else bool((target == -1).all())
                counted += [number] * (number < ROWS)
    assert sorted(counted) == list(range(ROWS))


def evaluate(rows):
    """Returns bits per byte through the engine, the same as a direct float64 sum, and the loss of the next step."""
    config = small_config(batch={"micro_rows": MICRO_ROWS})
    start_collectives(torch.device("cpu"), "gloo", timedelta(seconds=600))
    mesh = build_mesh(torch.device("cpu"))
    training = build_training_model(config, resolve_plan(config, mesh.world.size, SMALL_VOCAB), mesh, TOKEN_BYTES)
    # weights that differ between rows, without training
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in training.layers.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator) * (parameter.ndim == 2))
    share = ValidationRows(rank_batches(rows, mesh.data.size, mesh.data.rank), ROWS, MICRO_ROWS, mesh)
    values = [bits_per_byte(training.engine, share, mesh) for _ in range(2)]
    nats = size = 0.0
    with torch.no_grad():
        for row in rows[:ROWS]:
            capped = logits(run_layers(training.layers, row[None, :-1]), training.plan.dims)[0].double()
            each = F.cross_entropy(capped, row[1:], reduction="none")
            nats, size = nats + each[TOKEN_BYTES[row[1:]] > 0].sum().item(), size + TOKEN_BYTES[row[1:]].sum().item()
    set_schedules(training, 0)
    loss, *_ = take_step(training, random_rows(1, 12, TOKENS, SMALL_VOCAB))
    return values, nats / math.log(2) / size, loss


def test_every_number_of_ranks_has_the_direct_sum():
    rows = random_rows(0, 24, TOKENS, SMALL_VOCAB)
    answers = {world: run_ranks(evaluate, world, rows) for world in (1, 2, 3)}
    reference, direct, loss = answers[1][0]
    for world, ranks in answers.items():
        for (first, second), rank_direct, rank_loss in ranks:
            assert first == second == ranks[0][0][0], "repeated, and on every rank, the same bits"
            # float32 matrix products of a row may round differently next to other rows; sums over rows are float64
            assert first == pytest.approx(reference[0], rel=1e-8), f"on {world} ranks"
            assert first == pytest.approx(direct, rel=1e-6) and rank_direct == direct
            assert rank_loss == pytest.approx(loss, rel=1e-6), "evaluation does not change training"
    assert 1 < direct < 20
