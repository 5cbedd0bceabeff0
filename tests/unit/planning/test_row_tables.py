"""The bytes of sparse tables: what the tables hold on the fullest rank, and what does not fit before it is made."""

import re

import pytest
import torch

from megachat.errors import UserError
from megachat.planning.manifest import describe_ownership, ownership
from megachat.planning.memory import describe_memory, memory_of_stages
from megachat.planning.memory_advice import check_state_fits
from megachat.planning.plan import resolve_plan
from tests.harness import run_ranks
from tests.training import SMALL_VOCAB, build, random_rows, small_config, take_step

NGRAM = {"blocks": (0, 2), "orders": (2, 3), "rows": 11}


def config_of(**ngram):
    return small_config(model={"aspect_ratio": 32, "kv_heads": 2}, ngram=NGRAM | ngram)


def stages_of(config, world: int, **how):
    return memory_of_stages(config, resolve_plan(config, world, SMALL_VOCAB), torch.float32, **how)


def held(config) -> tuple[int, int]:
    """Returns the bytes of rows and state, and of the step's gradients, on this rank."""
    training, gradients = build(config, SMALL_VOCAB), []
    rows = random_rows(0, training.plan.rows_per_step, training.plan.dims.sequence_len + 1, SMALL_VOCAB)
    take_step(
        training, rows, inspect_gradients=lambda: gradients.append(sum(g.nbytes for g in training.rows.gradients()))
    )
    return sum(tensor.nbytes for *_, parts in training.rows.state_shards() for *_, tensor in parts), gradients[0]


@pytest.mark.parametrize("optimizer", ["adamw", "rowwise"])
def test_the_estimate_is_what_the_fullest_rank_holds(optimizer):
    config = config_of(optimizer=optimizer)
    (stage,) = stages_of(config, 2, on_gpu=False)
    (without,) = stages_of(config_of(blocks=()), 2, on_gpu=False)
    ranks = run_ranks(held, 2, config)
    assert stage.tables == max(state for state, _ in ranks) > min(state for state, _ in ranks)  # 6 and 5 rows
    width = 32
    per_row = {"adamw": 4 * (3 * width + 1), "rowwise": 4 * (width + 2)}[optimizer]
    assert stage.tables == 4 * 6 * per_row
    assert max(gradients for _, gradients in ranks) <= stage.gradients - without.gradients
    # 6 micro-batches read half of the 11 rows of 4 tables from the other rank: a request, and a row and its gradient
    assert stage.wire == 4 * (6 * 11 // 2) * (8 + 2 * 4 * width)


def test_tables_that_do_not_fit_are_refused_before_they_are_made():
    config = config_of(rows=10**9)
    (stage,) = stages_of(config, 1)
    with pytest.raises(
        UserError,
        match=r"need 1552\.\d GB per rank on stage 0 \(1552\.0 GB of them for n-gram tables\), but .* ngram.rows",
    ):
        check_state_fits([stage], 80 * 10**9, 10**12)
    config = config_of(rows=10**9, storage="host")
    (stage,) = stages_of(config, 1)
    assert stage.state < 10**9 and stage.host == 1552 * 10**9
    with pytest.raises(UserError, match=r"need 1552\.0 GB of host memory per rank, but a rank's share is 1000\.0 GB: "):
        check_state_fits([stage], 80 * 10**9, 10**12)
    check_state_fits([stage], 80 * 10**9, 2 * 10**12)
    assert "sparse tables: 1552.0 GB of host memory per rank" in describe_memory([stage], None)
    (on_cpu,) = stages_of(config, 1, on_gpu=False)
    assert on_cpu.host == 0 and on_cpu.tables == stage.host


def test_the_manifest_lists_who_owns_rows():
    config = small_config(
        model={"aspect_ratio": 32, "kv_heads": 2}, ngram=NGRAM | {"rows": 3}, parallel={"pipeline": 2}
    )
    lines = ownership(config, resolve_plan(config, 8, SMALL_VOCAB))
    tables = {line.name: line for line in lines if line.optimizer == "rows"}
    assert list(tables) == [f"ngram.{block}.{order}.weight" for block in (0, 2) for order in (2, 3)]
    ranks = {line.stages: line.state_ranks for line in tables.values()}
    assert ranks == {(0,): (0, 1, 2), (1,): (4, 5, 6)}  # three rows on the four ranks of a stage
    assert all(line.cut == "rows" and line.shape == (3, 32) and line.lr > 0 for line in tables.values())
    assert re.search(r"tensors on AdamW, 4 sparse tables divided by rows$", describe_ownership(lines))
