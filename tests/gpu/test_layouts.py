"""Layouts over NCCL against one GPU, on a machine with two or more: losses and gradient norms of three steps."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.gpu.layout import AXES

ROOT = Path(__file__).resolve().parents[2]


def measured(axis: str, ranks: int) -> list[list[float]]:
    command = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "-m", "tests.gpu.layout"]
    done = subprocess.run([sys.executable, *command, axis], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def alone():
    return measured("data", 1)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("axis", AXES)
def test_two_gpus_compute_what_one_does(axis, alone, report):
    results = measured(axis, 2)
    report(f"{axis} of 2 GPUs: losses and norms, of one", [results, alone])
    for one, other in zip(results, alone, strict=True):
        assert one == pytest.approx(other, rel=1e-3)
