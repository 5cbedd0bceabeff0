"""The GPU memory of a step against the estimate; tests/unit/planning/test_memory.py compares it by tensors on a CPU."""

import pytest
import torch

from megachat.planning.memory import memory_of_stages
from megachat.planning.plan import resolve_plan
from megachat.programs.verify_layout import related_rows
from megachat.train.build import build_training_model
from megachat.train.step import set_schedules
from tests.gpu.fp8 import need_fp8
from tests.gpu.test_model import mesh  # noqa: F401
from tests.training import small_config, take_step


@pytest.mark.parametrize(("fp8", "rows"), [("off", 16), ("off", 4), ("tensorwise", 16)])
def test_a_step_needs_what_is_estimated(fp8, rows, mesh, report):  # noqa: F811
    if fp8 != "off":
        need_fp8()
    model = {
        "depth": 8,
        "aspect_ratio": 64,
        "head_size": 128,
        "kv_heads": None,
        "sequence_len": 2048,
        "window_pattern": "L",
    }
    precision = {"compute": "bfloat16", "fp8": fp8, "fp8_backend": "torch", "attention": "sdpa"}
    config = small_config(model=model, batch={"tokens": 32 * 2048, "micro_rows": rows}, precision=precision)
    plan = resolve_plan(config, 1, 32768)
    (estimate,) = memory_of_stages(config, plan, torch.bfloat16)
    before = torch.cuda.memory_allocated()
    training = build_training_model(config, plan, mesh, torch.ones(32768, dtype=torch.int64))
    for step in range(2):
        set_schedules(training, step)
        torch.cuda.reset_peak_memory_stats()
        take_step(training, related_rows(step, plan.rows_per_step, 2049, 32768))
    peak = torch.cuda.max_memory_allocated() - before
    report(
        f"fp8 {fp8}, {rows} rows: bytes at the peak, estimate, their ratio",
        [peak, estimate.total, estimate.total / peak],
    )
    assert 0.95 * peak < estimate.total < 1.3 * peak
