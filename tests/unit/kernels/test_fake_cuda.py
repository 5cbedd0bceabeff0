"""The code of every attention and FP8 choice on fake CUDA tensors (tests/fake_cuda.py), in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fake_cuda import cases
from tests.limits import limit_s

ROOT = Path(__file__).resolve().parents[3]
FAULTS = {
    "a mask on the CPU": "at least two devices, cuda:0 and cpu",
    "a block mask on the CPU": "operands and mask of flex_attention are on ",
    "positions on the CPU": "at least two devices, cuda:0 and cpu",
    "a scale on the CPU": "at least two devices, cuda:0 and cpu",
    "a rate on the CPU": "on cpu, expected torch.float32 () on cuda:0",
    "a second factor by rows": "mat2 must be col_major",
    "a second factor of the head by rows": "mat2 must be col_major",
    "a side that 16 does not divide": "to be divisible by 16, but got self.size(1)=264",
    "a chunk of the head that 16 does not divide": "to be divisible by 16, but got self.size(1)=122",
}


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.fake_cuda"],
        cwd=ROOT,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=limit_s(),
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_every_choice_runs(outcomes):
    assert outcomes.keys() == {*cases(), *FAULTS}
    assert {name: error for name, error in outcomes.items() if name not in FAULTS and error} == {}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_refused(fault, outcomes):
    assert FAULTS[fault] in outcomes[fault]
