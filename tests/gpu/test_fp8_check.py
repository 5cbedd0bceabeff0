"""The products of a config without and with FP8, as `megachat fp8-check` measures them; the report gets the factors."""

import pytest
import torch

from megachat.config import load_config
from megachat.kernels.choice import choose_fp8
from megachat.planning.plan import resolve_without_text
from megachat.programs.fp8_check import measure_matrices
from megachat.studies.fp8 import advice
from tests.gpu.fp8 import DEVICE, need_fp8


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_the_products_of_a_config_are_measured(backend, report):
    need_fp8()
    config = load_config("configs/d12.json")
    choice = choose_fp8("tensorwise", backend, DEVICE, torch.bfloat16, "")
    plan = resolve_without_text(config, 1, 32768)
    matrices = measure_matrices(config, plan, choice, DEVICE, torch.bfloat16, 7)
    for matrix in matrices:
        report(f"{choice.backend} {matrix.name} {matrix.rows} x {matrix.columns}", str(matrix.factor))
    report("advice", "; ".join(advice(matrices, "tensorwise")))
    assert {matrix.name for matrix in matrices if matrix.fp8} >= {"attn.c_q", "mlp.c_fc", "mlp.c_proj", "lm_head"}
    assert all(min(matrix.plain) > 0 for matrix in matrices)
