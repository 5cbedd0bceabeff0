"""Collects what this machine has: versions, devices, limits. The result is JSON-compatible; traps.py judges it."""

import glob
import hashlib
import importlib.util
import json
import os
import platform
import re
import resource
import shutil
import socket
import subprocess
import sys
from pathlib import Path

from megachat.errors import summary
from megachat.installation import ROOT, TE_PACKAGES
from megachat.job.host_probe import PACKAGES, code_hashes, installed_version

_OPTIONAL = ("flash-attn", "flash-attn-3", "flash-attn-4", "apex", "mpi4py", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13")
_COMMAND_S = 20


def installed_facts() -> dict:
    """Returns all facts. Imports torch and no other large package."""
    gpus, driver = _gpus_and_driver()
    versions = {name: installed_version(name) for name in (*PACKAGES, *TE_PACKAGES, *_OPTIONAL)}
    modules = {name: importlib.util.find_spec(name) is not None for name in ("amp_C", "flash_attn_interface")}
    return {
        "host": socket.gethostname(),
        "python": platform.python_version(),
        "interpreter": sys.executable,
        "code": hashlib.sha256(json.dumps(code_hashes(ROOT)).encode()).hexdigest()[:8],
        "driver": driver,
        "gpus": gpus,
        "packages": {name: version for name, version in versions.items() if version},
        "modules": modules | {"apex.multi_tensor_apply": _is_nvidia_apex()},
        "nvcc": _nvcc_version(),
        "mpirun": _first_line("mpirun", "--version"),
        "pdsh": _first_line("pdsh", "-V"),
        "compiler": _first_line(_variable("CXX") or "g++", "--version"),  # torch's choice
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "shm_bytes": shutil.disk_usage("/dev/shm").total if os.path.isdir("/dev/shm") else None,
        "open_files": _soft_limit(resource.RLIMIT_NOFILE),
        "locked_bytes": _soft_limit(resource.RLIMIT_MEMLOCK),
        "infiniband": sorted(path.name for path in Path("/sys/class/infiniband").glob("*")),
        **_torch_facts(),
    }


def _torch_facts() -> dict:
    """Returns torch's build, the devices that it sees and the libraries that it loaded, or why its import fails."""
    facts: dict = {"cuda": None, "torch_sees": [], "cudnn": None, "cudnn_error": None, "cudnn_files": []}
    facts |= {"cudnn_elsewhere": {}, "nccl": None, "torch_error": None}
    facts |= {name: _variable(name) for name in ("LD_BIND_NOW", "CUDA_HOME", "CUDA_VISIBLE_DEVICES")}
    try:
        import torch
    except Exception as error:  # also OSError, from loading its libraries
        return facts | {"torch_error": summary(error)}
    facts["cuda"] = torch.version.cuda
    if torch.cuda.is_available():
        facts["torch_sees"] = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        facts["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    try:
        facts["cudnn"] = _format_cudnn_version(torch.backends.cudnn.version())
        if facts["torch_sees"]:  # a convolution makes cuDNN load its sublibraries
            torch.nn.functional.conv2d(torch.zeros(1, 1, 8, 8, device="cuda"), torch.zeros(1, 1, 3, 3, device="cuda"))
    except RuntimeError as error:
        facts["cudnn_error"] = str(error).partition("\n")[0]
    maps = Path("/proc/self/maps").read_text().splitlines()
    facts["cudnn_files"] = sorted({line.split()[-1] for line in maps if "libcudnn" in line})
    folders = {name: _variable(name) for name in ("CUDNN_HOME", "CUDNN_PATH", "CUDA_HOME", "CUDA_PATH")}
    folders |= {"": "/usr/local/cuda"}
    files = {name: _cudnn_library(folder) for name, folder in folders.items() if folder}
    facts["cudnn_elsewhere"] = {name: file for name, file in files.items() if file}
    return facts


def _format_cudnn_version(number: int | None) -> str | None:
    """91900 -> 9.19.0. Before version 9, the major version counted 1000 and not 10,000."""
    if number is None:
        return None
    unit = 10_000 if number >= 90_000 else 1000
    return f"{number // unit}.{number % unit // 100}.{number % 100}"


def _cudnn_library(folder: str) -> str | None:
    """Returns the cuDNN library in a folder, whose name has the version. Transformer Engine loads it before torch's."""
    files = [file for file in glob.glob(f"{folder}/**/libcudnn.so*", recursive=True) if "stub" not in file]
    return os.path.realpath(max(files, key=os.path.basename)) if files else None


def _gpus_and_driver() -> tuple[list[str], str | None]:
    """Returns the names of the GPUs and the version of the driver, from nvidia-smi."""
    output = _output_of("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader") or ""
    rows = [line.rpartition(", ") for line in output.splitlines() if ", " in line]
    return [name for name, _, _ in rows], rows[0][2] if rows else None


def _nvcc_version() -> str | None:
    """Returns the version of the CUDA compiler that torch's extensions use: from CUDA_HOME, PATH or /usr/local/cuda."""
    home = _variable("CUDA_HOME") or _variable("CUDA_PATH")  # if set, it wins even if it is wrong
    for program in [f"{home}/bin/nvcc"] if home else ["nvcc", "/usr/local/cuda/bin/nvcc"]:
        match = re.search(r"release ([\d.]+)", _output_of(program, "--version") or "")
        if match:
            return match[1]
    return None


def _variable(name: str) -> str | None:
    try:
        from megachat.device import variable
    except Exception:  # it imports torch, which may be broken
        return None
    return variable(name)


def _is_nvidia_apex() -> bool:
    """Returns True if an installed apex is NVIDIA's. Does not import it: the apex on PyPI is another project."""
    spec = importlib.util.find_spec("apex")
    folders = (spec.submodule_search_locations or ()) if spec else ()
    return any(Path(folder, "multi_tensor_apply").is_dir() for folder in folders)


def _output_of(*line: str) -> str | None:
    """Returns what a command prints on both streams, or None if it does not exist or fails."""
    try:
        done = subprocess.run(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=_COMMAND_S)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _first_line(program: str, option: str) -> str | None:
    """Returns the first line that a program prints. A program beside this interpreter comes before those in PATH."""
    path = shutil.which(program, path=Path(sys.executable).parent) or shutil.which(program)
    if path is None:
        return None
    return ((_output_of(path, option) or "").strip().splitlines() or ["installed, but it fails"])[0]


def _soft_limit(kind: int) -> int | None:
    """Returns the soft limit of a resource, or None if it is unlimited."""
    soft, _ = resource.getrlimit(kind)
    return None if soft == resource.RLIM_INFINITY else soft
