"""Devices: dtypes, names and peak rates."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megachat import device
from megachat.device import choose_compute_dtype, peak_flops, peak_of_name, slow_dtype_warning

ROOT = Path(__file__).resolve().parents[2]


def test_dtype_is_requested_or_explained():
    cpu = torch.device("cpu")
    assert choose_compute_dtype("float16", cpu) == (torch.float16, "requested")
    dtype, reason = choose_compute_dtype("auto", cpu)
    assert (dtype == torch.bfloat16) == ("has native" in reason)


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [((6, 1), torch.float32), ((7, 0), torch.float16), ((7, 5), torch.float16), ((8, 0), torch.bfloat16)],
)
def test_a_gpu_without_bfloat16_computes_in_float16_if_that_is_fast(capability, dtype, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert choose_compute_dtype("auto", torch.device("cuda", 0))[0] == dtype


def test_auto_is_bfloat16_on_a_cpu_only_if_that_is_native_and_used(monkeypatch):
    cpu, flags, used = torch.device("cpu"), {"flags": "fpu avx2 avx512f avx512_bf16"}, [True]
    monkeypatch.setattr(device, "_cpu_info", lambda key: flags.get(key, ""))
    monkeypatch.setattr(device, "_onednn_computes_bfloat16", lambda: used[0])
    assert choose_compute_dtype("auto", cpu)[0] == torch.bfloat16 and not slow_dtype_warning("bfloat16", cpu)
    used[0] = False
    assert choose_compute_dtype("auto", cpu)[0] == torch.float32
    used[0], flags["flags"] = True, "fpu avx2 avx512f"  # oneDNN emulates it there
    assert choose_compute_dtype("auto", cpu)[0] == torch.float32
    assert slow_dtype_warning("auto", cpu) is slow_dtype_warning("float32", cpu) is None
    warning = slow_dtype_warning("bfloat16", cpu)
    assert warning and re.search(r"no native bfloat16: .* takes \d+\.\d times as long as in float32", warning)


def test_unknown_hardware_has_no_peak():
    assert peak_flops(torch.device("cpu")) is None


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("A100-SXM4-40GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA A100-PCIE-40GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA GB200", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA L40", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA A100X", None),
        ("NVIDIA H100", None),
        ("Tesla V100-SXM2-16GB", None),
    ],
)
def test_peaks_are_of_whole_names(name, peak):
    assert peak_of_name(name) == peak


@pytest.mark.parametrize("variables, expected", [({}, None), ({"ATEN_CPU_CAPABILITY": "avx2"}, "avx2")])
def test_code_compiled_for_another_vector_width_is_not_taken_from_the_cache(variables, expected):
    """torch's own cache is shared: AVX2 code that runs with AVX512 vectors writes outside of its memory."""
    names = ("ATEN_CPU_CAPABILITY", "TORCHINDUCTOR_CACHE_DIR")
    clean = {name: value for name, value in os.environ.items() if name not in names}
    line = "import os, megachat.device; print(os.environ.get('TORCHINDUCTOR_CACHE_DIR'))"
    done = subprocess.run([sys.executable, "-c", line], env=clean | variables, cwd=ROOT, capture_output=True, text=True)
    folder = done.stdout.strip()
    assert folder == "None" if expected is None else folder.endswith(expected), done.stderr
