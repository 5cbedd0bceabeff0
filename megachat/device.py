"""The only file that asks "cpu or cuda?" or reads the environment: devices, launch variables, dtypes, peak rates, versions."""

import os
import platform
import re
from pathlib import Path

import torch

# Dense bf16 tensor-core peaks from NVIDIA's data sheets, which print twice as much for sparse matrices, by the whole name that the driver gives
# (before it, "NVIDIA" is left out). Whole, because "RTX A1000", "GH200", "RTX 4090 D" and a MIG slice of an A100 are other devices: what is not
# here is unknown and gets no MFU.
_PEAK_BF16_FLOPS = {
    r"A100[- ](SXM4?|PCIE)-(40|80)GB|A100 80GB PCIe": 312e12,
    r"H100 PCIe": 756e12,
    r"H100 NVL": 835e12,
    r"H100 80GB HBM3": 989e12,
    r"H200 NVL": 835e12,
    r"H200": 989e12,
    r"B200": 2250e12,
    r"L40S": 362e12,
    r"(GeForce )?RTX 4090": 165.2e12,
}

# DeepSpeed looks for an accelerator when it is imported, and warns of a CPU; this tells it beforehand.
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
# Where it finds no fast kernel, Transformer Engine would quietly take one that keeps all scores; this makes that an error.
os.environ.setdefault("NVTE_UNFUSED_ATTN", "0")


def this_device() -> torch.device:
    """Of a process that is no rank: CUDA's current GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def has_native_bfloat16(device: torch.device) -> bool:
    """True on sm80 and newer and on CPUs with bf16 instructions."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    flags = _cpu_info("flags")
    return any(flag in flags.split() for flag in ("avx512_bf16", "amx_bf16", "bf16"))


def compute_capability(device: torch.device) -> tuple[int, int]:
    """CUDA's (major, minor) of the GPU, as (9, 0) for a Hopper; (0, 0) of a CPU."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def choose_compute_dtype(asked: str, device: torch.device) -> tuple[torch.dtype, str]:
    """(dtype of activations, the reason in words) for "auto", "bfloat16", "float16" or "float32"."""
    if asked != "auto":
        return getattr(torch, asked), "requested"
    if has_native_bfloat16(device):
        return torch.bfloat16, f"this {device.type} has native bfloat16"
    if compute_capability(device) >= (7, 0):
        return torch.float16, "this GPU has no native bfloat16 but tensor cores for float16"
    return torch.float32, f"this {device.type} has no native bfloat16"


def collective_backend(device: torch.device) -> str:
    """torch.distributed's backend for the device."""
    return "nccl" if device.type == "cuda" else "gloo"


def device_name(device: torch.device) -> str:
    """The vendor's name of the device."""
    return (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else _cpu_info("model name") or platform.processor() or "unknown CPU"
    )


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 FLOPs a second of the device, or None when it is not known."""
    if device.type != "cuda":
        return None
    return peak_of_name(device_name(device))


def peak_of_name(name: str) -> float | None:
    """Dense bf16 FLOPs a second of the GPU that CUDA calls so, as "NVIDIA H100 80GB HBM3"; None when it is not known."""
    name = name.removeprefix("NVIDIA ")
    return next((peak for pattern, peak in _PEAK_BF16_FLOPS.items() if re.fullmatch(pattern, name)), None)


def memory_bytes(device: torch.device, local_ranks: int) -> int:
    """Of the GPU, or this process's share of the machine's memory when `local_ranks` of them run on its CPU."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // local_ranks


def variable(name: str) -> str | None:
    """An environment variable of this process."""
    return os.environ.get(name)


def synchronize(device: torch.device) -> None:
    """Wait for the device's queue, so that a clock read next measures finished work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory_bytes(device: torch.device) -> int:
    """Most bytes in use so far: allocated on a GPU, resident of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _cpu_info(key: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.split(":")[0].strip() == key), "")
