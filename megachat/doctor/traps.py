"""What tools/doctor.py judges: each trap is told only where its facts leave no doubt, with the one command that repairs it."""

import importlib
import re
from dataclasses import dataclass
from pathlib import Path

from megachat.doctor.installed import TE_PACKAGES
from megachat.errors import summary

ROOT = Path(__file__).resolve().parents[2]
# The oldest driver for each CUDA release family on Linux (NVIDIA's CUDA Compatibility guide, minor version compatibility).
_OLDEST_DRIVER = {12: (525, 60), 13: (580,)}
_TE = "pip install --no-build-isolation 'transformer_engine[pytorch,core_cu{}]=={}'"
_TE_VERSION = "2.20.2"  # the one that the design was checked against
_LEAST_SHM_BYTES = 512 * 2**20  # Docker gives a container 64 MiB; NCCL's buffers between several GPUs do not fit there
_LEAST_OPEN_FILES = 1024


@dataclass(frozen=True)
class Trap:
    """name: a short one that stays the same. what: what is wrong, in a sentence. repair: one command."""

    name: str
    what: str
    repair: str


def traps(facts: dict, config) -> list[Trap]:
    """All that are found in the facts of megachat/doctor/installed.py, for a run with this config."""
    return [*_torch(facts), *_packages(facts), *_te(facts), *_cudnn(facts), *_machine(facts, config)]


def _torch(facts: dict) -> list[Trap]:
    packages, cuda = facts["packages"], facts["cuda"]
    if facts["torch_error"]:
        what = f"torch {packages.get('torch', '(none)')} cannot be imported: {facts['torch_error']}"
        return [
            Trap(
                "torch",
                what,
                "pip install --force-reinstall torch" if "torch" in packages else "source launch/setup.sh",
            )
        ]
    found = []
    driver = _numbers(facts["driver"] or "")
    if facts["gpus"] and cuda is None:
        index = "cu130" if driver >= _OLDEST_DRIVER[13] else "cu126"
        what = f"this machine has {len(facts['gpus'])} GPU(s) ({facts['gpus'][0]}) but torch {packages.get('torch')} is a CPU build"
        found.append(
            Trap(
                "torch-cpu",
                what,
                f"pip install --force-reinstall 'torch>=2.11' --index-url https://download.pytorch.org/whl/{index}",
            )
        )
    elif cuda and facts["driver"] and driver < (oldest := _OLDEST_DRIVER.get(int(cuda.partition(".")[0]), ())):
        needed = ".".join(map(str, oldest))
        what = f"the driver {facts['driver']} is older than {needed}, which the CUDA {cuda} of torch {packages.get('torch')} needs"
        found.append(Trap("driver", what, f"sudo apt-get install -y cuda-drivers-{oldest[0]} && sudo reboot"))
    elif cuda and facts["gpus"] and not facts["torch_sees"] and facts["CUDA_VISIBLE_DEVICES"] is not None:
        what = f"nvidia-smi lists {len(facts['gpus'])} GPU(s) and torch sees none: CUDA_VISIBLE_DEVICES is {facts['CUDA_VISIBLE_DEVICES']!r}"
        found.append(Trap("gpus-hidden", what, "unset CUDA_VISIBLE_DEVICES"))
    return found


def _packages(facts: dict) -> list[Trap]:
    packages, modules = facts["packages"], facts["modules"]
    found = []
    if "apex" in packages and not modules["apex.multi_tensor_apply"]:
        what = f"the package apex {packages['apex']} is not NVIDIA's, which has no release on PyPI"
        found.append(Trap("apex", what, "pip uninstall -y apex"))
    if "flash-attn-3" in packages and not modules["flash_attn_interface"]:
        what = f"flash-attn-3 {packages['flash-attn-3']} from PyPI is an empty package, and Transformer Engine fails with it"
        found.append(Trap("flash-attn-3", what, "pip uninstall -y flash-attn-3"))
    pinned = re.search(r"deepspeed==([\w.]+)", (ROOT / "setup.py").read_text(encoding="utf-8"))[1]
    if packages.get("deepspeed", "").partition("+")[0] != pinned:
        what = f"deepspeed is {packages.get('deepspeed', 'not installed')}, and megachat overrides private methods of {pinned}"
        found.append(Trap("deepspeed", what, f"pip install deepspeed=={pinned}"))
    if facts["torch_sees"] and "flash-attn" in packages and (error := _import_error("flash_attn")):
        repair = (
            "FLASH_ATTENTION_FORCE_BUILD=TRUE pip install --no-build-isolation --no-deps --force-reinstall flash-attn"
        )
        found.append(Trap("flash-attn", f"flash-attn {packages['flash-attn']} cannot be imported: {error}", repair))
    return found


def _te(facts: dict) -> list[Trap]:
    packages = {name: version for name, version in facts["packages"].items() if name in TE_PACKAGES}
    if not packages or facts["torch_error"]:
        return []
    cores = [name for name in packages if "_cu" in name]
    repair = _TE.format(
        12 if cores == ["transformer_engine_cu12"] else 13,
        packages.get("transformer_engine", _TE_VERSION).partition("+")[0],
    )
    found = []
    if facts["LD_BIND_NOW"]:
        what = "LD_BIND_NOW is set, and Transformer Engine refers to functions that the cuBLAS of torch may lack and that it never calls"
        found.append(Trap("LD_BIND_NOW", what, "unset LD_BIND_NOW"))
    if len({version.partition("+")[0] for version in packages.values()}) > 1:
        told = ", ".join(f"{name} {version}" for name, version in packages.items())
        return [
            *found,
            Trap(
                "te-versions",
                f"Transformer Engine's packages have several versions ({told}), which must be one",
                repair,
            ),
        ]
    built = re.search(r"torch(\d+\.\d+)", packages.get("transformer_engine_torch", ""))
    torch = facts["packages"].get("torch", "")
    if built and not torch.startswith(built[1] + "."):
        what = f"transformer_engine_torch {packages['transformer_engine_torch']} was built for torch {built[1]}, and here is {torch}"
        return [*found, Trap("te-torch", what, _rebuilt(repair))]
    if "flash-attn-3" not in facts["packages"] and (error := _import_error("transformer_engine.pytorch")):
        other = "undefined symbol" in error
        what = f"transformer_engine {'was built for another torch than' if other else 'cannot be imported with'} {torch}: {error}"
        if other or facts["cuda"]:  # a CPU build of torch has not the libraries that it loads, and no use for it
            found.append(Trap("te-torch" if other else "te-import", what, _rebuilt(repair)))
    return found


def _rebuilt(install: str) -> str:
    return "NVTE_PYTORCH_FORCE_BUILD=TRUE " + install.replace("install", "install --force-reinstall --no-cache-dir", 1)


def _cudnn(facts: dict) -> list[Trap]:
    packages = facts["packages"]
    if facts["cudnn_error"]:
        return [Trap("cudnn", f"torch cannot use its cuDNN: {facts['cudnn_error']}", "unset LD_LIBRARY_PATH")]
    both = [name for name in ("nvidia-cudnn-cu12", "nvidia-cudnn-cu13") if name in packages]
    if len(both) == 2:
        what = (
            f"cuDNN is installed twice into one folder: {both[0]} {packages[both[0]]} and {both[1]} {packages[both[1]]}"
        )
        other = both[0] if (facts["cuda"] or "13").startswith("13") else both[1]
        kept = both[1] if other == both[0] else both[0]
        return [
            Trap(
                "cudnn",
                what,
                f"pip uninstall -y {other} && pip install --force-reinstall --no-deps {kept}=={packages[kept]}",
            )
        ]
    folders = sorted({str(Path(file).parent) for file in facts["cudnn_files"]})
    if len(folders) > 1:
        return [Trap("cudnn", f"torch has loaded parts of cuDNN from {' and '.join(folders)}", "unset LD_LIBRARY_PATH")]
    own = facts["cudnn"] or next((packages[name] for name in both), None)
    if own is None or "transformer_engine" not in packages:
        return []
    for name, file in facts["cudnn_elsewhere"].items():
        version = Path(file).name.partition(".so.")[2]
        if version.count(".") >= 2 and _numbers(version)[:3] != _numbers(own)[:3]:
            where = f"{name}={facts['CUDA_HOME']}" if name == "CUDA_HOME" else name or "/usr/local/cuda"
            what = f"Transformer Engine loads cuDNN {version} ({file}, by {where}) before the {own} of torch, and the two do not mix"
            pip = "$(python -c 'import nvidia.cudnn as c; print(c.__path__[0])')"
            return [Trap("cudnn", what, f"export CUDNN_HOME={pip}")]
    return []


def _machine(facts: dict, config) -> list[Trap]:
    found = []
    if facts["cuda"] and facts["gpus"] and facts["nvcc"] is None:
        home, major = facts["CUDA_HOME"], facts["cuda"].replace(".", "-")
        what = f"{'CUDA_HOME=' + home + ' has no bin/nvcc' if home else 'there is no nvcc'}: neither DeepSpeed's ops nor Transformer Engine can be built"
        toolkits = sorted(str(path.parents[2]) for path in Path("/usr/local").glob("cuda*/bin/nvcc"))
        repair = f"export CUDA_HOME={toolkits[-1]}" if toolkits else f"sudo apt-get install -y cuda-toolkit-{major}"
        found.append(Trap("nvcc", what, repair))
    if facts["compiler"] is None and (config.precision.compile or facts["torch_sees"]):
        found.append(
            Trap(
                "compiler",
                "there is no C++ compiler, which torch.compile and Triton need",
                "sudo apt-get install -y g++",
            )
        )
    if len(facts["gpus"]) > 1 and facts["shm_bytes"] is not None and facts["shm_bytes"] < _LEAST_SHM_BYTES:
        what = f"/dev/shm has {facts['shm_bytes'] >> 20} MiB, too little for NCCL between {len(facts['gpus'])} GPUs (docker run --ipc=host avoids it)"
        found.append(Trap("shm", what, "sudo mount -o remount,size=8G /dev/shm"))
    if facts["open_files"] is not None and facts["open_files"] < _LEAST_OPEN_FILES:
        what = f"a process may have {facts['open_files']} open files, and connections to other ranks count"
        found.append(Trap("open-files", what, "ulimit -n 65536"))
    if facts["infiniband"] and facts["locked_bytes"] is not None:
        what = f"InfiniBand ({facts['infiniband'][0]}) needs locked memory, which is limited to {facts['locked_bytes'] >> 10} KiB"
        found.append(Trap("memlock", what, "ulimit -l unlimited"))
    return found


def _import_error(module: str) -> str | None:
    try:
        importlib.import_module(module)
    except Exception as error:  # they load libraries and check versions while they are imported
        return summary(error)
    return None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version))
