"""What tools/doctor.py finds on this machine: versions, devices, limits. Facts only, as JSON can hold them; nothing is judged here."""

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
from importlib import metadata
from pathlib import Path

from megachat.errors import summary
from megachat.job.host_probe import PACKAGES, code_hashes

TE_PACKAGES = ("transformer_engine", "transformer_engine_torch", "transformer_engine_cu12", "transformer_engine_cu13")
_SHOWN = (
    *PACKAGES,
    *TE_PACKAGES,
    "flash-attn",
    "flash-attn-3",
    "flash-attn-4",
    "apex",
    "mpi4py",
    "nvidia-cudnn-cu12",
    "nvidia-cudnn-cu13",
)
_COMMAND_S = 20


def installed() -> dict:
    """Every fact. Imports torch, and takes no other heavy package."""
    gpus, driver = _driver()
    found = {
        "host": socket.gethostname(),
        "python": platform.python_version(),
        "interpreter": sys.executable,
        "code": hashlib.sha256(json.dumps(code_hashes(Path(__file__).resolve().parents[2])).encode()).hexdigest()[
            :8
        ],  # of this project's files
        "driver": driver,
        "gpus": gpus,
        "packages": {name: there for name in _SHOWN if (there := version(name))},
        "modules": {name: _has_module(name) for name in ("amp_C", "flash_attn_interface")}
        | {"apex.multi_tensor_apply": _is_nvidias_apex()},
        "nvcc": _nvcc(),
        "mpirun": _first_line("mpirun", "--version"),
        "pdsh": _first_line("pdsh", "-V"),
        "compiler": _first_line(_variable("CXX") or "g++", "--version"),  # as torch looks for it
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "shm_bytes": _size("/dev/shm"),
        "open_files": _limit(resource.RLIMIT_NOFILE),
        "locked_bytes": _limit(resource.RLIMIT_MEMLOCK),
        "infiniband": sorted(path.name for path in Path("/sys/class/infiniband").glob("*")),
    }
    return found | _torch_facts()


def _torch_facts() -> dict:
    """torch_error: why torch cannot be imported, else None; then its build, what it sees, and the libraries that it has loaded."""
    nothing = {
        "cuda": None,
        "torch_sees": [],
        "cudnn": None,
        "cudnn_error": None,
        "cudnn_files": [],
        "cudnn_elsewhere": {},
        "nccl": None,
    }
    nothing |= {name: _variable(name) for name in ("LD_BIND_NOW", "CUDA_HOME", "CUDA_VISIBLE_DEVICES")}
    try:
        import torch
    except Exception as error:  # OSError too: it loads libraries
        return nothing | {"torch_error": summary(error)}
    found = nothing | {"torch_error": None, "cuda": torch.version.cuda}
    if torch.cuda.is_available():
        found["torch_sees"] = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    try:
        found["cudnn"] = _cudnn_version(torch.backends.cudnn.version())
        if found["torch_sees"]:  # the parts of cuDNN are loaded where a convolution asks for them
            torch.nn.functional.conv2d(torch.zeros(1, 1, 8, 8, device="cuda"), torch.zeros(1, 1, 3, 3, device="cuda"))
    except RuntimeError as error:
        found["cudnn_error"] = str(error).partition("\n")[0]
    found["cudnn_files"] = sorted(
        {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libcudnn" in line}
    )
    where = {name: _variable(name) for name in ("CUDNN_HOME", "CUDNN_PATH", "CUDA_HOME", "CUDA_PATH")} | {
        "": "/usr/local/cuda"
    }
    found["cudnn_elsewhere"] = {
        name: file for name, folder in where.items() if folder and (file := _cudnn_below(folder))
    }
    return found


def _cudnn_version(number: int | None) -> str | None:
    """91900 -> 9.19.0; before version 9 a minor version was a hundred and not ten thousand."""
    if number is None:
        return None
    major = number // 10_000 if number >= 90_000 else number // 1000
    return f"{major}.{number % (10_000 if number >= 90_000 else 1000) // 100}.{number % 100}"


def _cudnn_below(folder: str) -> str | None:
    """The cuDNN in a folder that Transformer Engine would load before torch's, with its version: the name that its links end in."""
    files = [file for file in glob.glob(f"{folder}/**/libcudnn.so*", recursive=True) if "stub" not in file]
    return os.path.realpath(sorted(files, key=os.path.basename)[-1]) if files else None


def _driver() -> tuple[list[str], str | None]:
    """(names of the GPUs, version of the driver) that nvidia-smi tells."""
    told = _told("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")
    rows = [line.rpartition(", ") for line in (told or "").splitlines() if ", " in line]
    return [name for name, _, _ in rows], rows[0][2] if rows else None


def _nvcc() -> str | None:
    """Version of the CUDA compiler where torch's extensions look for it: CUDA_HOME, PATH, /usr/local/cuda."""
    from_home = [f"{home}/bin/nvcc" for name in ("CUDA_HOME", "CUDA_PATH") if (home := _variable(name))]
    for program in (*from_home, "nvcc", "/usr/local/cuda/bin/nvcc"):
        found = re.search(r"release ([\d.]+)", _told(program, "--version") or "")
        if found:
            return found[1]
        if program in from_home:  # a CUDA_HOME that is set wins, also when it is wrong
            return None
    return None


def _variable(name: str) -> str | None:
    try:
        from megachat.device import variable
    except Exception:  # it imports torch, which may be what is broken
        return None
    return variable(name)


def version(package: str) -> str | None:
    """Of an installed package; None where it is not."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _has_module(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _is_nvidias_apex() -> bool:
    """Whether the package apex, if there is one, is NVIDIA's; it is not imported, because it may be anything."""
    spec = importlib.util.find_spec("apex")
    return (
        any(Path(folder, "multi_tensor_apply").is_dir() for folder in (spec.submodule_search_locations or ()))
        if spec
        else False
    )


def _told(*line: str) -> str | None:
    """What a command prints on both streams; None where it is not there or fails."""
    try:
        done = subprocess.run(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=_COMMAND_S)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _first_line(program: str, option: str) -> str | None:
    """Of what the program prints: the one beside this interpreter, which is first in PATH where its environment is active, or the one in PATH."""
    found = shutil.which(program, path=Path(sys.executable).parent) or shutil.which(program)
    return ((_told(found, option) or "").strip().splitlines() or ["there, but it fails"])[0] if found else None


def _size(folder: str) -> int | None:
    try:
        return shutil.disk_usage(folder).total
    except OSError:
        return None


def _limit(kind: int) -> int | None:
    """The soft limit; None: unlimited."""
    soft, _ = resource.getrlimit(kind)
    return None if soft == resource.RLIM_INFINITY else soft
