"""What a run will do, in words: tables and JSON of config, plan and owners."""

import json
import math

import pytest

from megachat.config import BatchConfig, Config, ParallelConfig
from megachat.planning.manifest import (
    Ownership,
    describe_config,
    describe_ownership,
    describe_plan,
    describe_stages,
    ownership,
    plan_values,
)
from megachat.planning.plan import resolve

CONFIG = Config.model_validate(
    {"model": {"depth": 4, "aspect_ratio": 32, "head_size": 32, "sequence_len": 128}, "horizon": {"steps": 7}}
)


def test_the_config_marks_what_differs():
    lines = describe_config(CONFIG).splitlines()
    assert "* model.depth = 4" in lines and "  model.kv_heads = None" in lines and "* horizon.steps = 7" in lines
    assert len(lines) == 1 + sum(len(section) for section in CONFIG.model_dump().values())
    assert sum(line.startswith("* ") for line in lines) == 5


def test_the_plan_has_every_number_once_with_its_formula():
    plan = resolve(CONFIG, 2, 1000)
    lines = describe_plan(plan).splitlines()
    names = [line.split(" = ")[0].strip() for line in lines[1:]]
    assert len(set(names)) == len(names)
    assert {
        "depth",
        "width",
        "layout",
        "tokens_per_step",
        "rates.matrix",
        "parameters.total",
        "total_flops",
        "weight_decay",
    } <= set(names)
    assert f"  parameters.total = {plan.parameters['total']:,}" in lines
    (steps,) = [line for line in lines if line.startswith("  steps = ")]
    assert steps == "  steps = 7   [horizon.steps]"
    assert all(
        any(line.startswith(f"  {name} = ") and line.endswith(f"[{why}]") for line in lines)
        for name, why in plan.why.items()
        if name in names
    )


def test_plan_values_are_json():
    plan = resolve(CONFIG, 2, 1000)
    values = json.loads(json.dumps(plan_values(plan)))
    assert values["layout"] == {"data": 2, "tensor": 1, "pipeline": 1} and values["rates"] == dict(plan.rates)
    assert values["dims"]["windows"] == list(plan.dims.windows) and values["why"]["steps"] == "horizon.steps"


@pytest.mark.parametrize(
    ("world", "tensor", "pipeline"), [(1, 1, 1), (2, 1, 1), (5, 1, 1), (2, 2, 1), (3, 1, 3), (8, 2, 2)]
)
def test_every_parameter_has_owners(world, tensor, pipeline):
    rows = BatchConfig(tokens=world // (tensor * pipeline) * 128)
    config = CONFIG.model_copy(update={"batch": rows, "parallel": ParallelConfig(tensor=tensor, pipeline=pipeline)})
    plan = resolve(config, world, 1000)
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


def test_stages_are_told_with_what_they_weigh():
    plan = resolve(CONFIG.model_copy(update={"parallel": ParallelConfig(pipeline=3)}), 3, 1000)
    told = describe_stages(plan).split("), ")
    assert (
        len(told) == 3
        and told[0].startswith("layers 0-")
        and "of parameters" in told[1]
        and told[2].endswith("% of FLOPs)")
    )


def test_ranks_are_told_as_ranges():
    lines = [
        Ownership("a", (3, 4), "adamw", (0,), "whole", (0, 1, 2, 5), None, 0.1, 0.0),
        Ownership("b", (2,), "muon", (0, 1), "row", (7,), 7, 0.02, 0.28),
    ]
    rows = [line.split() for line in describe_ownership(lines).splitlines()[2:4]]
    assert rows == [
        ["a", "3x4", "adamw", "0", "whole", "0-2,5", "-", "0.1", "0"],
        ["b", "2", "muon", "0-1", "row", "7", "7", "0.02", "0.28"],
    ]
