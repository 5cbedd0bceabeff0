"""Prints the packages that tests/gpu and tools/bench.py gpu still need, as arguments of pip, for tests/run_gpu.sh."""

import importlib.util
import re
from pathlib import Path

SETUP = Path(__file__).resolve().parents[2] / "setup.py"
# module -> package. DeepSpeed's dependencies are listed too, because wheels without a network are installed without
# them.
NEEDED = {
    "deepspeed": "deepspeed",
    "einops": "einops",
    "hjson": "hjson",
    "msgpack": "msgpack",
    "ninja": "ninja",
    "packaging": "packaging",
    "psutil": "psutil",
    "cpuinfo": "py-cpuinfo",
    "numpy": "numpy",
    "pyarrow": "pyarrow",
    "pydantic": "pydantic",
    "pytest": "pytest",
    "requests": "requests",
    "safetensors": "safetensors",
    "tiktoken": "tiktoken",
    "tqdm": "tqdm",
    "yaml": "pyyaml",
}


def missing(installed=lambda module: importlib.util.find_spec(module) is not None) -> list[str]:
    """Packages whose module is not `found`, with the version that setup.py pins."""
    pinned = dict(re.findall(r'"([a-z_-]+)==([0-9.]+)"', SETUP.read_text()))
    names = [package for module, package in NEEDED.items() if not installed(module)]
    return [f"{name}=={pinned[name]}" if name in pinned else name for name in names]


if __name__ == "__main__":
    print(" ".join(missing()))
