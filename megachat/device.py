"""Devices: names, dtypes, peak rates and memory, and the environment variables that must be set before imports."""

import os
import platform
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

# Dense bf16 tensor-core peaks from NVIDIA's data sheets (which also print twice as much, for sparse matrices), by the
# full name that the driver reports, without "NVIDIA". Full names, because "RTX A1000", "GH200", "RTX 4090 D" and a MIG
# slice of an A100 are other devices. A device that is not listed gets no MFU.
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


def dtype_name(dtype: torch.dtype) -> str:
    """Returns the name of a dtype in configs and files: "float32" for torch.float32."""
    return str(dtype).removeprefix("torch.")


# Every dtype that a config or a file may name. A name that was read is looked up here, never among torch's attributes.
DTYPES = {
    dtype_name(dtype): dtype
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8)
}

# DeepSpeed looks for an accelerator when it is imported, and warns about a CPU unless it is configured.
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
# Without a fast kernel, Transformer Engine would silently use one that keeps all scores; this makes that an error.
os.environ.setdefault("NVTE_UNFUSED_ATTN", "0")
# torch's cache of compiled CPU code does not know this variable of torch: code for another vector width writes outside
# of its memory, or leaves out elements.
if capability := os.environ.get("ATEN_CPU_CAPABILITY"):
    compiled = Path(tempfile.gettempdir(), f"torchinductor_{os.getuid()}_{Path(capability).name}")
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(compiled))


def this_device() -> torch.device:
    """Returns the device of a process that is no rank: CUDA's current GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def has_native_bfloat16(device: torch.device) -> bool:
    """Returns True for GPUs from sm80 on, and for x86 CPUs with bf16 instructions that oneDNN uses.

    False for other CPUs, macOS's and ARM's included, where bfloat16 was not measured.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    instructions = any(flag in _cpu_info("flags").split() for flag in ("avx512_bf16", "amx_bf16"))
    return instructions and torch.backends.mkldnn.is_available() and _onednn_computes_bfloat16()


def onednn_multiplies_faster(device: torch.device, dtype: torch.dtype) -> bool:
    """Returns True where oneDNN's products take less time than those of MKL, torch's default: in float32 on AMD's CPUs
    with AVX512, which MKL does not use there. With AVX2 both take the same time; other CPUs were not measured.
    """
    if device.type != "cpu" or dtype != torch.float32 or not torch.backends.mkldnn.is_available():
        return False
    return _cpu_info("vendor_id") == "AuthenticAMD" and torch.backends.cpu.get_cpu_capability() == "AVX512"


def _onednn_computes_bfloat16() -> bool:
    """Returns False where oneDNN refuses, for example because of ONEDNN_MAX_CPU_ISA. Other AVX512 CPUs may emulate."""
    check = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return check is None or bool(check())


def slow_dtype_warning(requested: str, device: torch.device) -> str | None:
    """Returns a warning with a measured factor if a requested dtype is not native to a CPU; it takes 0.1 to 0.5 s."""
    native = requested in ("auto", "float32") or (requested == "bfloat16" and has_native_bfloat16(device))
    if device.type != "cpu" or native:
        return None
    factor = _product_s(DTYPES[requested]) / _product_s(torch.float32)
    return (
        f"WARNING: this CPU has no native {requested}: a product of {_TRIAL_SIDE} x {_TRIAL_SIDE} matrices takes "
        f"{factor:.1f} times as long as in float32, measured now; auto chooses a fast dtype"
    )


_TRIAL_SIDE = 256


def _product_s(dtype: torch.dtype) -> float:
    """Returns the least time of five products, the first of which starts threads and makes the kernel."""
    left = right = torch.ones(_TRIAL_SIDE, _TRIAL_SIDE, dtype=dtype)
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        left @ right
        times.append(time.perf_counter() - begin)
    return min(times)


def compute_capability(device: torch.device) -> tuple[int, int]:
    """Returns CUDA's (major, minor) of the GPU, for example (9, 0) for a Hopper; (0, 0) for a CPU."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def choose_compute_dtype(requested: str, device: torch.device) -> tuple[torch.dtype, str]:
    """Returns (dtype of activations, reason) for "auto", "bfloat16", "float16" or "float32"."""
    if requested != "auto":
        return DTYPES[requested], "requested"
    if has_native_bfloat16(device):
        return torch.bfloat16, f"this {device.type} has native bfloat16"
    if compute_capability(device) >= (7, 0):
        return torch.float16, "this GPU has no native bfloat16, but tensor cores for float16"
    return torch.float32, f"this {device.type} has no native bfloat16"


def collective_backend(device: torch.device) -> str:
    """Returns torch.distributed's backend for the device."""
    return "nccl" if device.type == "cuda" else "gloo"


def device_name(device: torch.device) -> str:
    """Returns the vendor's name of the device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return _cpu_info("model name") or platform.processor() or "unknown CPU"


def gpu_id(device: torch.device) -> str | None:
    """Returns the identity of the GPU, equal only for processes that share it; None for the CPU."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else None


def peak_flops(device: torch.device) -> float | None:
    """Returns the device's dense bf16 FLOPs per second, or None if unknown."""
    return peak_of_name(device_name(device)) if device.type == "cuda" else None


def peak_of_name(name: str) -> float | None:
    """Returns the dense bf16 FLOPs per second of a GPU by CUDA's name for it ("NVIDIA H200"); None if unknown."""
    name = name.removeprefix("NVIDIA ")
    return next((peak for pattern, peak in _PEAK_BF16_FLOPS.items() if re.fullmatch(pattern, name)), None)


def memory_bytes(device: torch.device, local_ranks: int) -> int:
    """Returns the GPU's memory, or on a CPU this process's share of the machine's when `local_ranks` run there."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return host_memory_bytes(local_ranks)


def host_memory_bytes(local_ranks: int) -> int:
    """Returns this process's share of the machine's memory when `local_ranks` run there."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // local_ranks


def variable(name: str) -> str | None:
    """Returns an environment variable of this process."""
    return os.environ.get(name)


def synchronize(device: torch.device) -> None:
    """Waits for the device's queue, so that a clock read next measures finished work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def random_states(device: torch.device) -> dict[str, torch.Tensor]:
    """Returns the states of torch's generators by kind of device: of the CPU and, on a GPU, of the GPU."""
    on_gpu = {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {}
    return {"cpu": torch.get_rng_state()} | on_gpu


def restore_random_states(states: dict[str, torch.Tensor], device: torch.device) -> None:
    """Sets the generators to what random_states returned, perhaps on another kind of device."""
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


def seconds_of(action: Callable[[], object], device: torch.device) -> float:
    """Returns the seconds of a call, with the work that it gives the device."""
    synchronize(device)
    begin = time.perf_counter()
    action()
    synchronize(device)
    return time.perf_counter() - begin


def peak_memory_bytes(device: torch.device) -> int:
    """Returns the peak bytes in use so far: allocated on a GPU, resident in the process on a CPU."""
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


def gradient_wire(setting: str, compute_dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype in which gradients of matrices and sparse tables travel between ranks.

    setting: optimizer.gradient_wire, a dtype's name or "auto".
    """
    if setting != "auto":
        return DTYPES[setting]
    return torch.bfloat16 if compute_dtype == torch.bfloat16 else torch.float32
