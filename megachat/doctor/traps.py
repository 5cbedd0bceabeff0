"""Judges an installation: a trap is a problem that the facts prove, with the one command that repairs it."""

import importlib
import re
from dataclasses import dataclass
from pathlib import Path

from megachat.config import Config
from megachat.errors import summary
from megachat.installation import DEEPSPEED_VERSION, TE_PACKAGES

# The oldest Linux driver for each CUDA major version (NVIDIA CUDA Compatibility, minor version compatibility).
_OLDEST_DRIVER: dict[int, tuple[int, ...]] = {12: (525, 60), 13: (580,)}
_TE_VERSION = "2.20.2"  # the version that megachat was checked against
_MIN_SHM_BYTES = 512 * 2**20  # Docker's default is 64 MiB; NCCL's buffers between several GPUs do not fit there
_MIN_OPEN_FILES = 1024


@dataclass(frozen=True)
class Trap:
    """name: short and stable. what: the problem, in one sentence. repair: one command."""

    name: str
    what: str
    repair: str


def find_traps(facts: dict, config: Config) -> list[Trap]:
    """Returns all traps in the facts of installed.py for a run with this config."""
    return [
        *_torch_traps(facts),
        *_package_traps(facts),
        *_te_traps(facts),
        *_cudnn_traps(facts),
        *_machine_traps(facts, config),
    ]


def _torch_traps(facts: dict) -> list[Trap]:
    cuda, gpus = facts["cuda"], facts["gpus"]
    torch, driver = facts["packages"].get("torch"), _version_numbers(facts["driver"] or "")
    if facts["torch_error"]:
        repair = "pip install --force-reinstall torch" if torch else "source launch/setup.sh"
        return [Trap("torch", f"torch {torch or '(none)'} cannot be imported: {facts['torch_error']}", repair)]
    if gpus and cuda is None:
        index = "cu130" if driver >= _OLDEST_DRIVER[13] else "cu126"
        what = f"this machine has {len(gpus)} GPU(s) ({gpus[0]}) but torch {torch} is a CPU build"
        index_url = f"https://download.pytorch.org/whl/{index}"
        return [Trap("torch-cpu", what, f"pip install --force-reinstall 'torch>=2.11' --index-url {index_url}")]
    oldest = _OLDEST_DRIVER.get(int(cuda.partition(".")[0]), ()) if cuda else ()
    if facts["driver"] and driver < oldest:
        required = ".".join(map(str, oldest))
        what = f"the driver {facts['driver']} is older than {required}, which CUDA {cuda} of torch {torch} requires"
        return [Trap("driver", what, f"sudo apt-get install -y cuda-drivers-{oldest[0]} && sudo reboot")]
    hidden = facts["CUDA_VISIBLE_DEVICES"]
    if cuda and gpus and not facts["torch_sees"] and hidden is not None:
        what = f"nvidia-smi lists {len(gpus)} GPU(s) but torch sees none: CUDA_VISIBLE_DEVICES is {hidden!r}"
        return [Trap("gpus-hidden", what, "unset CUDA_VISIBLE_DEVICES")]
    return []


def _package_traps(facts: dict) -> list[Trap]:
    packages, modules = facts["packages"], facts["modules"]
    traps = []
    if "apex" in packages and not modules["apex.multi_tensor_apply"]:
        what = f"the package apex {packages['apex']} is not NVIDIA's, which has no release on PyPI"
        traps.append(Trap("apex", what, "pip uninstall -y apex"))
    if "flash-attn-3" in packages and not modules["flash_attn_interface"]:
        version = packages["flash-attn-3"]
        what = f"flash-attn-3 {version} from PyPI is an empty package that breaks Transformer Engine"
        traps.append(Trap("flash-attn-3", what, "pip uninstall -y flash-attn-3"))
    deepspeed = packages.get("deepspeed", "not installed")
    if deepspeed.partition("+")[0] != DEEPSPEED_VERSION:
        what = f"deepspeed is {deepspeed}, but megachat overrides private methods of {DEEPSPEED_VERSION}"
        traps.append(Trap("deepspeed", what, f"pip install deepspeed=={DEEPSPEED_VERSION}"))
    if facts["torch_sees"] and "flash-attn" in packages and (error := _import_error("flash_attn")):
        options = "--no-build-isolation --no-deps --force-reinstall"
        repair = f"FLASH_ATTENTION_FORCE_BUILD=TRUE pip install {options} flash-attn"
        traps.append(Trap("flash-attn", f"flash-attn {packages['flash-attn']} cannot be imported: {error}", repair))
    return traps


def _te_traps(facts: dict) -> list[Trap]:
    packages = {name: version for name, version in facts["packages"].items() if name in TE_PACKAGES}
    if not packages or facts["torch_error"]:
        return []
    traps = []
    if facts["LD_BIND_NOW"]:
        what = "LD_BIND_NOW is set, and Transformer Engine refers to unused functions that torch's cuBLAS may lack"
        traps.append(Trap("LD_BIND_NOW", what, "unset LD_BIND_NOW"))
    cuda = 12 if [name for name in packages if "_cu" in name] == ["transformer_engine_cu12"] else 13
    wanted = packages.get("transformer_engine", _TE_VERSION).partition("+")[0]
    package = f"'transformer_engine[pytorch,core_cu{cuda}]=={wanted}'"
    rebuild = "NVTE_PYTORCH_FORCE_BUILD=TRUE pip install --force-reinstall --no-cache-dir --no-build-isolation "
    if len({version.partition("+")[0] for version in packages.values()}) > 1:
        versions = ", ".join(f"{name} {version}" for name, version in packages.items())
        what = f"Transformer Engine's packages have different versions ({versions}), and they must be the same"
        return [*traps, Trap("te-versions", what, f"pip install --no-build-isolation {package}")]
    built = re.search(r"torch(\d+\.\d+)", packages.get("transformer_engine_torch", ""))
    torch = facts["packages"].get("torch", "")
    if built and not torch.startswith(built[1] + "."):
        version = packages["transformer_engine_torch"]
        what = f"transformer_engine_torch {version} was built for torch {built[1]}, but torch is {torch}"
        return [*traps, Trap("te-torch", what, rebuild + package)]
    if "flash-attn-3" not in facts["packages"] and (error := _import_error("transformer_engine.pytorch")):
        if "undefined symbol" in error:
            what = f"transformer_engine was built for another torch than {torch}: {error}"
            traps.append(Trap("te-torch", what, rebuild + package))
        elif facts["cuda"]:  # a CPU build of torch has no use for it, and lacks the libraries that it loads
            what = f"transformer_engine cannot be imported with torch {torch}: {error}"
            traps.append(Trap("te-import", what, rebuild + package))
    return traps


def _cudnn_traps(facts: dict) -> list[Trap]:
    packages = facts["packages"]
    if facts["cudnn_error"]:
        return [Trap("cudnn", f"torch cannot use its cuDNN: {facts['cudnn_error']}", "unset LD_LIBRARY_PATH")]
    installed = [name for name in ("nvidia-cudnn-cu12", "nvidia-cudnn-cu13") if name in packages]
    if len(installed) == 2:
        names = " and ".join(f"{name} {packages[name]}" for name in installed)
        kept, removed = reversed(installed) if (facts["cuda"] or "13").startswith("13") else installed
        repair = f"pip install --force-reinstall --no-deps {kept}=={packages[kept]}"
        what = f"cuDNN is installed twice into one folder: {names}"
        return [Trap("cudnn", what, f"pip uninstall -y {removed} && {repair}")]
    folders = sorted({str(Path(file).parent) for file in facts["cudnn_files"]})
    if len(folders) > 1:
        return [Trap("cudnn", f"torch has loaded parts of cuDNN from {' and '.join(folders)}", "unset LD_LIBRARY_PATH")]
    of_torch = facts["cudnn"] or (packages[installed[0]] if installed else None)
    if of_torch is None or "transformer_engine" not in packages:
        return []
    for variable, file in facts["cudnn_elsewhere"].items():
        version = Path(file).name.partition(".so.")[2]
        if version.count(".") >= 2 and _version_numbers(version)[:3] != _version_numbers(of_torch)[:3]:
            where = f"CUDA_HOME={facts['CUDA_HOME']}" if variable == "CUDA_HOME" else variable or "/usr/local/cuda"
            what = f"Transformer Engine loads cuDNN {version} ({file}, from {where}) before torch's {of_torch}"
            folder = "$(python -c 'import nvidia.cudnn as c; print(c.__path__[0])')"
            return [Trap("cudnn", f"{what}, and the two conflict", f"export CUDNN_HOME={folder}")]
    return []


def _machine_traps(facts: dict, config: Config) -> list[Trap]:
    gpus, shm, files, locked = facts["gpus"], facts["shm_bytes"], facts["open_files"], facts["locked_bytes"]
    traps = []
    if facts["cuda"] and gpus and facts["nvcc"] is None:
        home = facts["CUDA_HOME"]
        missing = f"CUDA_HOME={home} has no bin/nvcc" if home else "there is no nvcc"
        toolkits = sorted(str(path.parents[1]) for path in Path("/usr/local").glob("cuda*/bin/nvcc"))
        package = f"cuda-toolkit-{facts['cuda'].replace('.', '-')}"
        repair = f"export CUDA_HOME={toolkits[-1]}" if toolkits else f"sudo apt-get install -y {package}"
        what = f"{missing}: neither DeepSpeed's ops nor Transformer Engine can be built"
        traps.append(Trap("nvcc", what, repair))
    if facts["compiler"] is None and (config.precision.compile or facts["torch_sees"]):
        what = "there is no C++ compiler, which torch.compile and Triton require"
        traps.append(Trap("compiler", what, "sudo apt-get install -y g++"))
    if len(gpus) > 1 and shm is not None and shm < _MIN_SHM_BYTES:
        what = f"/dev/shm has {shm >> 20} MiB, too little for NCCL between {len(gpus)} GPUs"
        repair = "sudo mount -o remount,size=8G /dev/shm"
        traps.append(Trap("shm", f"{what} (docker run --ipc=host avoids it)", repair))
    if files is not None and files < _MIN_OPEN_FILES:
        what = f"a process may have {files} open files, and each connection to another rank counts as one"
        traps.append(Trap("open-files", what, "ulimit -n 65536"))
    if facts["infiniband"] and locked is not None:
        what = f"InfiniBand ({facts['infiniband'][0]}) requires locked memory, which is limited to {locked >> 10} KiB"
        traps.append(Trap("memlock", what, "ulimit -l unlimited"))
    return traps


def _import_error(module: str) -> str | None:
    try:
        importlib.import_module(module)
    except Exception as error:  # these packages load libraries and check versions when they are imported
        return summary(error)
    return None


def _version_numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version))
