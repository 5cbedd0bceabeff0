"""The owner ranks of every parameter."""

import math

import pytest

from megachat.config import Config
from megachat.place import place_of
from megachat.planning.manifest import Ownership, describe_ownership, ownership, zero1_shares
from megachat.planning.plan import resolve_plan
from megachat.settings import BatchConfig, ParallelConfig
from tests.harness import run_ranks
from tests.training import SMALL_VOCAB, build, small_config

CONFIG = Config.model_validate(
    {"model": {"depth": 4, "aspect_ratio": 32, "head_size": 32, "sequence_len": 128}, "horizon": {"steps": 7}}
)


@pytest.mark.parametrize(
    ("world", "tensor", "pipeline"), [(1, 1, 1), (2, 1, 1), (5, 1, 1), (2, 2, 1), (3, 1, 3), (8, 2, 2)]
)
def test_every_parameter_has_owners(world, tensor, pipeline):
    rows = BatchConfig(tokens=world // (tensor * pipeline) * 128)
    config = CONFIG.model_copy(update={"batch": rows, "parallel": ParallelConfig(tensor=tensor, pipeline=pipeline)})
    plan = resolve_plan(config, world, 1000)
    lines = ownership(config, plan)
    assert sum(math.prod(line.shape) for line in lines) == plan.parameters["total"]
    assert len({line.name for line in lines}) == len(lines)
    muon = [line for line in lines if line.optimizer == "muon"]
    assert sum(math.prod(line.shape) for line in muon) == plan.parameters["matrices"]
    if pipeline == 1:
        assert {line.owner for line in muon} == set(range(world)), "a rank orthogonalizes nothing"
    for line in lines:
        of_stage = {rank for stage in line.stages for rank in range(world) if rank // (world // pipeline) == stage}
        assert line.state_ranks and set(line.state_ranks) <= of_stage and (line.owner is None or line.owner in of_stage)
        if tensor > 1:
            assert {rank % tensor for rank in line.state_ranks} == set(range(tensor)), (
                "every tensor rank holds a part or a copy"
            )
            assert (line.cut == "whole") == (line.optimizer == "adamw" and len(line.shape) == 1 or "smear" in line.name)
    assert {stage for line in lines for stage in line.stages} == set(range(pipeline))
    assert len({line.stages for line in lines if line.name == "resid_lambdas"}) == 1
    table = describe_ownership(lines).splitlines()
    assert (
        len(table) == len(lines) + 3
        and table[-1] == f"{len(muon)} matrices on Muon, {len(lines) - len(muon)} tensors on AdamW"
    )


def test_ranks_are_listed_as_ranges():
    lines = [
        Ownership("a", (3, 4), "adamw", (0,), "whole", (0, 1, 2, 5), None, 0.1, 0.0),
        Ownership("b", (2,), "muon", (0, 1), "row", (7,), 7, 0.02, 0.28),
    ]
    rows = [line.split() for line in describe_ownership(lines).splitlines()[2:4]]
    assert rows == [
        ["a", "3x4", "adamw", "0", "whole", "0-2,5", "-", "0.1", "0"],
        ["b", "2", "muon", "0-1", "row", "7", "7", "0.02", "0.28"],
    ]


def held_names(config):
    return [
        place_of(parameter).name + str(place_of(parameter).offset)
        for parameter, *_ in build(config, SMALL_VOCAB).engine.adamw.fragments()
    ]


@pytest.mark.parametrize("world", [1, 3])
def test_adamw_owners_are_deepspeeds(world):
    config = small_config()
    by_rank = run_ranks(held_names, world, config)
    training_groups = run_ranks(group_sizes, 1, config)[0]
    for members in training_groups:
        for (name, _), owners in zip(members, zero1_shares([size for _, size in members], world)[1], strict=True):
            assert owners == tuple(rank for rank in range(world) if name in by_rank[rank]), name


def group_sizes(config):
    zero = build(config, SMALL_VOCAB).engine.adamw
    return [
        [(place_of(parameter).name + str(place_of(parameter).offset), parameter.numel()) for parameter in group]
        for group in zero.bit16_groups
    ]


def test_a_padded_share():
    assert zero1_shares([1, 1, 1], 4) == (2, [(0,), (0,), (1,)])
    assert zero1_shares([100], 2) == (50, [(0, 1)])
