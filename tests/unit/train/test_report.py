"""What a run will do, in words: tables and JSON of config, plan and owners."""

import json

import pytest

from megachat.config import BatchConfig, Config
from megachat.plan import resolve
from megachat.train.report import Ownership, describe_config, describe_ownership, describe_plan, ownership, plan_values

CONFIG = Config.model_validate({"model": {"depth": 4, "aspect_ratio": 32, "head_size": 32, "sequence_len": 128}, "horizon": {"steps": 7}})


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
    assert {"depth", "width", "layout", "tokens_per_step", "rates.matrix", "parameters.total", "total_flops", "weight_decay"} <= set(names)
    assert f"  parameters.total = {plan.parameters['total']:,}" in lines
    (steps,) = [line for line in lines if line.startswith("  steps = ")]
    assert steps == "  steps = 7   [horizon.steps]"
    assert all(
        any(line.startswith(f"  {name} = ") and line.endswith(f"[{why}]") for line in lines) for name, why in plan.why.items() if name in names
    )


def test_plan_values_are_json():
    plan = resolve(CONFIG, 2, 1000)
    values = json.loads(json.dumps(plan_values(plan)))
    assert values["layout"] == {"data": 2, "tensor": 1, "pipeline": 1} and values["rates"] == dict(plan.rates)
    assert values["dims"]["windows"] == list(plan.dims.windows) and values["why"]["steps"] == "horizon.steps"


@pytest.mark.parametrize("world", [1, 2, 5])
def test_every_parameter_has_owners(world):
    plan = resolve(CONFIG.model_copy(update={"batch": BatchConfig(tokens=world * 128)}), world, 1000)
    lines = ownership(CONFIG, plan)
    assert sum(_elements(line.shape) for line in lines) == plan.parameters["total"]
    assert len({line.name for line in lines}) == len(lines)
    muon = [line for line in lines if line.optimizer == "muon"]
    assert sum(_elements(line.shape) for line in muon) == plan.parameters["matrices"]
    assert {line.lead for line in muon} == set(range(world)) and all(set(line.owners) <= set(range(world)) and line.owners for line in lines)
    table = describe_ownership(lines).splitlines()
    assert len(table) == len(lines) + 3 and table[-1] == f"{len(muon)} matrices on Muon, {len(lines) - len(muon)} tensors on AdamW"


def _elements(shape) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def test_ranks_are_told_as_ranges():
    lines = [Ownership("a", (3, 4), "adamw", (0, 1, 2, 5), None, 0.1, 0.0), Ownership("b", (2,), "muon", (7,), 7, 0.02, 0.28)]
    rows = [line.split() for line in describe_ownership(lines).splitlines()[2:4]]
    assert rows == [["a", "3x4", "adamw", "0-2,5", "-", "0.1", "0"], ["b", "2", "muon", "7", "7", "0.02", "0.28"]]
