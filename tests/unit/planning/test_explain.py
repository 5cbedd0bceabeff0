"""Config, plan and stages in words and JSON."""

import json

import pytest

from megachat.config import Config
from megachat.planning.explain import describe_config, describe_plan, describe_stages, plan_values, setting_warnings
from megachat.planning.plan import resolve_plan
from megachat.settings import ParallelConfig

CONFIG = Config.model_validate(
    {"model": {"depth": 4, "aspect_ratio": 32, "head_size": 32, "sequence_len": 128}, "horizon": {"steps": 7}}
)


def test_the_config_marks_what_differs():
    lines = describe_config(CONFIG).splitlines()
    assert "* model.depth = 4" in lines and "  model.kv_heads = None" in lines and "* horizon.steps = 7" in lines
    assert len(lines) == 1 + sum(len(section) for section in CONFIG.model_dump().values())
    assert sum(line.startswith("* ") for line in lines) == 5


def test_the_plan_has_every_number_once_with_its_formula():
    plan = resolve_plan(CONFIG, 2, 1000)
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
    plan = resolve_plan(CONFIG, 2, 1000)
    values = json.loads(json.dumps(plan_values(plan)))
    assert values["layout"] == {"data": 2, "tensor": 1, "pipeline": 1} and values["rates"] == dict(plan.rates)
    assert values["dims"]["windows"] == list(plan.dims.windows) and values["why"]["steps"] == "horizon.steps"


def test_stages_are_described_with_their_shares():
    plan = resolve_plan(CONFIG.model_copy(update={"parallel": ParallelConfig(pipeline=3)}), 3, 1000)
    stages = describe_stages(plan).split("), ")
    assert (
        len(stages) == 3
        and stages[0].startswith("layers 0-")
        and "of parameters" in stages[1]
        and stages[2].endswith("% of FLOPs)")
    )


@pytest.mark.parametrize(
    ("sections", "part"),
    [
        ({"horizon": {"steps": 20}}, "optimizer.warmup_steps (40 steps) is longer than the training (20 steps)"),
        (
            {"horizon": {"steps": 60}},
            "optimizer.warmup_steps (40 steps) runs into the warm-down, which begins after step 21",
        ),
        (
            {"horizon": {"steps": 400}, "checkpoint": {"keep_every": 5}},
            "checkpoint.keep_every (5) has no effect without",
        ),
        ({"horizon": {"steps": 400}, "checkpoint": {"keep_every": 5, "keep_last": 2}}, None),
        (
            {
                "horizon": {"steps": 400},
                "batch": {"tokens": 4 * 2048, "micro_rows": 1},
                "reliability": {"replay_every": 5},
            },
            "reliability.replay_every (5) makes the training about 10% longer",
        ),
        (
            {
                "horizon": {"steps": 400},
                "batch": {"tokens": 4 * 2048, "micro_rows": 1},
                "reliability": {"replay_every": 50},
            },
            None,
        ),
        ({"horizon": {"steps": 400}, "reliability": {"replay_tolerance": 1e-3}}, "(0.001) has no effect without"),
        ({"horizon": {"steps": 400}, "reliability": {"hash_every": 7}}, "(7) compares only weights with their masters"),
        (
            {"horizon": {"steps": 400}, "reliability": {"on_nonfinite": "rewind"}, "checkpoint": {"every": 0}},
            "nothing to go back to with checkpoint.every=0",
        ),
        ({"horizon": {"steps": 400}, "reliability": {"on_nonfinite": "rewind"}, "checkpoint": {"every": 9}}, None),
    ],
)
def test_settings_that_are_seldom_wanted_together_are_reported(sections, part):
    config = Config.model_validate({"model": {"depth": 2}} | sections)
    lines = setting_warnings(config, resolve_plan(config, 1, 97))
    assert (not lines and part is None) or (len(lines) == 1 and part in lines[0] and lines[0].startswith("WARNING: "))
