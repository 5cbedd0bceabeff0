"""The memory estimate against torch's FakeTensorMode: state to the byte, activations within 1 %, at the real sizes of
all configs. Compiled blocks keep what torch's partitioner chooses, and Transformer Engine's linears and attention what
these choose; neither can be tracked without a GPU.
"""

import gc

import pytest
import torch

from megachat.config import Config, load_config
from megachat.planning.dimensions import NORMS
from megachat.planning.memory import memory_of_stages
from megachat.planning.plan import resolve_without_text
from megachat.planning.row_tables import row_bytes
from megachat.planning.stage_state import stage_parameters
from tests.unit.planning.fake_stage import build_fake_stage, fake_run, rank_of, tracked

CPU_CONFIGS = ("d2_cpu", "d4_cpu", "demo")
TABLES = {
    "lookup": {"after_blocks": (1,), "rows": 40_000, "max_rows_per_token": 60},
    "ngram": {"blocks": (0, 1), "rows": 50_000},
    "model": {"norm_scales": NORMS},
}
LAYOUTS = {  # name -> (ranks, changed sections)
    "one": (1, {}),
    "data8": (8, {}),
    "tensor2": (2, {"parallel": {"tensor": 2}}),
    "sequence": (2, {"parallel": {"tensor": 2, "sequence": True}}),
    "pipeline2": (2, {"parallel": {"pipeline": 2}}),
    "selective": (1, {"batch": {"recompute": "selective"}}),
    "block": (1, {"batch": {"recompute": "block"}}),
    "tables": (1, TABLES),
}


def planned(name: str, layout: str, **changes: dict):
    """Returns (config, plan, dtype, on a GPU) of a file in configs/ with the sections of a layout."""
    world, sections = LAYOUTS[layout]
    values = load_config(f"configs/{name}.json").model_dump()
    for section, keys in (sections | changes).items():
        values[section] |= keys
    config, on_gpu = Config.model_validate(values), name not in CPU_CONFIGS
    plan = resolve_without_text(config, world, config.model.vocab_size or 32768)
    return config, plan, torch.bfloat16 if on_gpu else torch.float32, on_gpu


def check(name: str, layout: str) -> None:
    config, plan, dtype, on_gpu = planned(name, layout)
    for stage, counted in enumerate(memory_of_stages(config, plan, dtype, on_gpu=on_gpu)):
        actual = tracked(config, plan, stage, dtype)
        gc.collect()
        parameters = stage_parameters(plan.dims, plan.stages[stage], dtype) if plan.dims.ngram else []
        of_rows = row_bytes(config, plan, parameters, dtype).gradients  # depend on how often ids repeat
        state = {kind: actual[kind] for kind in ("weights", "masters", "moments", "gradients")}
        assert {kind: getattr(counted, kind) for kind in state} == state | {"gradients": state["gradients"] + of_rows}
        assert abs(counted.activations / actual["activations"] - 1) < 0.01, (stage, counted.activations, actual)


@pytest.mark.parametrize(("name", "layout"), [("d4_cpu", "pipeline2"), ("d12", "tables"), ("d24_fp8", "sequence")])
def test_the_count_is_what_fake_tensors_hold(name, layout):
    check(name, layout)


FP8 = [("d24_fp8", layout) for layout in LAYOUTS if layout != "sequence"]
CONFIGS = [(name, "one") for name in ("demo", "d12", "d20", "d24", "d26_fp8", "d32_fp8")]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "layout"), [*FP8, *CONFIGS, ("d2_cpu", "tensor2"), ("d32_fp8", "pipeline2")])
def test_the_count_is_what_fake_tensors_hold_in_every_config(name, layout):
    check(name, layout)


@pytest.mark.parametrize(("name", "layout"), [("d12", "data8"), ("d4_cpu", "tensor2")])
def test_the_fullest_rank_holds_the_state_that_is_counted(name, layout):
    config, plan, dtype, _ = planned(name, layout)
    (counted,) = memory_of_stages(config, plan, dtype)
    most = dict.fromkeys(("weights", "masters", "moments"), 0)
    with fake_run():
        for data in range(plan.layout.data):
            for tensor in range(plan.layout.tensor):
                state = build_fake_stage(config, plan, rank_of(plan, 0, data, tensor), dtype).state
                most = {kind: max(most[kind], state[kind]) for kind in most}
    assert {kind: getattr(counted, kind) for kind in most} == most
