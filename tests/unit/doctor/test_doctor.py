"""tools/doctor.py against real installations: packages on PYTHONPATH, programs in PATH, limits of the process."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.limits import limit_s
from tests.runs.job import environment

ROOT = Path(__file__).resolve().parents[3]
SMI = """#!/bin/sh
for name in $GPUS; do echo "NVIDIA $name, $DRIVER"; done
"""
TORCH = '''"""As much of torch as shows which build it is; it sees no GPU."""
CUDA, CUDNN = {cuda!r}, lambda: {cudnn}
class device: pass
class dtype: pass
class Tensor: pass
class version: cuda = CUDA
class cuda:
    is_available = staticmethod(lambda: False)
class backends:
    class cudnn:
        version = staticmethod(lambda: CUDNN() if CUDA else None)
__version__ = "2.13.0"
float64 = float32 = bfloat16 = float16 = int64 = int32 = uint8 = "dtype"
'''


class Site:
    """An installation: a folder of packages and a folder of programs."""

    def __init__(self, folder: Path):
        self.packages, self.programs = folder / "site", folder / "bin"
        self.packages.mkdir()
        self.programs.mkdir()
        self.program("nvidia-smi", SMI)  # lists $GPUS, whatever the machine has

    def install(self, name: str, version: str, files: dict[str, str] | None = None) -> None:
        """Writes what pip writes for a package: metadata and files."""
        metadata = self.packages / f"{name.replace('-', '_')}-{version}.dist-info" / "METADATA"
        for path, text in {metadata: f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"}.items():
            path.parent.mkdir(parents=True)
            path.write_text(text)
        for path, text in (files or {}).items():
            (self.packages / path).parent.mkdir(parents=True, exist_ok=True)
            (self.packages / path).write_text(text)

    def program(self, name: str, text: str) -> None:
        (self.programs / name).write_text(text)
        (self.programs / name).chmod(0o755)

    def doctor(
        self, *arguments: str, within: tuple[str, ...] = (), before: str = "", **variables: str
    ) -> subprocess.CompletedProcess:
        """Runs the doctor. within: a program that starts the shell. before: what the shell does first."""
        variables = (
            environment()
            | {"PYTHONPATH": str(self.packages), "PATH": f"{self.programs}{os.pathsep}{os.environ['PATH']}"}
            | variables
        )
        line = f'{before} exec "{sys.executable}" tools/doctor.py "$@"'
        return subprocess.run(
            [*within, "bash", "-c", line, "doctor", *arguments],
            cwd=ROOT,
            env=variables,
            capture_output=True,
            text=True,
            timeout=limit_s(),
        )

    def traps(self, **how) -> dict[str, dict]:
        done = self.doctor("--json", **how)
        assert not done.stderr, done.stderr
        traps = {trap["name"]: trap for trap in json.loads(done.stdout)["traps"]}
        assert done.returncode == (1 if traps else 0)
        return traps


@pytest.fixture
def site(tmp_path) -> Site:
    return Site(tmp_path)


def test_a_healthy_cpu_machine(site):
    """With NVIDIA's apex and the true flash-attention 3, whose names others took."""
    site.install("apex", "0.1", {"apex/__init__.py": "", "apex/multi_tensor_apply/__init__.py": ""})
    site.install("flash-attn-3", "3.0.0", {"flash_attn_interface.py": ""})
    done = site.doctor(
        "--config", "configs/d24_fp8.json", "--set", "precision.compute=bfloat16", "--set", "precision.compile=false"
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    lines = [line.strip() for line in done.stdout.splitlines()]
    assert lines[-1] == "no traps"
    facts = {line.split()[0]: line.split(maxsplit=1)[1] for line in lines if len(line.split()) > 1}
    assert facts["python"] == ".".join(map(str, sys.version_info[:3])) and facts["deepspeed"] and facts["torch"]
    assert any(line.startswith("compute: bfloat16 (") for line in lines)
    assert any(re.match(r"fp8: torch \(auto: not te, .*no CUDA device", line) for line in lines)
    (flash3,) = (line for line in lines if line.startswith("attention flash3: not available ("))
    assert "CUDA device" in flash3
    assert any(line.startswith("attention: ") for line in lines) and any(
        line.startswith("gradient norm: ") for line in lines
    )
    assert any(line.startswith("compile: off (precision.compile; ") for line in lines) and not any(
        ": unknown (" in line for line in lines
    )


def test_wrong_packages_are_named_with_their_repair(site):
    site.install("apex", "0.9.10.dev0", {"apex/__init__.py": "raise ImportError('a toolkit for web pages')"})
    site.install("flash-attn-3", "0.0.0")
    site.install("deepspeed", "0.15.0")
    for name, version in (
        ("transformer_engine", "2.20.2"),
        ("transformer_engine_torch", "2.19.0"),
        ("transformer_engine_cu13", "2.20.2"),
    ):
        site.install(name, version)
    site.install("nvidia-cudnn-cu12", "9.10.2.21")
    site.install("nvidia-cudnn-cu13", "9.19.0.56")
    traps = site.traps(before="ulimit -n 200;", LD_BIND_NOW="1")
    assert set(traps) == {"apex", "flash-attn-3", "deepspeed", "te-versions", "LD_BIND_NOW", "cudnn", "open-files"}
    assert traps["apex"]["repair"] == "pip uninstall -y apex"
    assert traps["flash-attn-3"]["repair"] == "pip uninstall -y flash-attn-3"
    assert traps["deepspeed"]["repair"] == "pip install deepspeed==0.19.8"
    assert traps["te-versions"]["repair"].endswith("'transformer_engine[pytorch,core_cu13]==2.20.2'")
    assert "pip uninstall -y nvidia-cudnn-cu12" in traps["cudnn"]["repair"]
    assert "200 open files" in traps["open-files"]["what"]


def test_a_gpu_machine_with_the_cpu_build_and_an_engine_for_another_torch(site, tmp_path):
    site.install("torch", "2.13.0+cpu", {"torch/__init__.py": TORCH.format(cuda=None, cudnn=0)})
    symbol = "raise ImportError('libtransformer_engine.so: undefined symbol: _ZN3c104cuda9SetDeviceEa')"
    site.install(
        "transformer_engine", "2.20.2", {"transformer_engine/__init__.py": "", "transformer_engine/pytorch.py": symbol}
    )
    site.install("nvidia-cudnn-cu13", "9.19.0.56")
    library = tmp_path / "cuda" / "lib64" / "libcudnn.so.9.10.2"
    library.parent.mkdir(parents=True)
    library.touch()
    library.with_name("libcudnn.so.9").symlink_to(library)
    how = {"GPUS": "H200 H200", "DRIVER": "570.86.10", "CUDA_HOME": str(tmp_path / "cuda")}
    can_mount = not subprocess.run(
        ["unshare", "--mount", "true"], capture_output=True
    ).returncode  # may mount what no other process sees
    if can_mount:
        how |= {"within": ("unshare", "--mount"), "before": "mount -t tmpfs -o size=64m none /dev/shm;"}
    traps = site.traps(**how)
    assert set(traps) == {"torch-cpu", "te-torch", "cudnn", *(["shm"] if can_mount else [])}
    assert "2 GPU(s) (NVIDIA H200)" in traps["torch-cpu"]["what"] and traps["torch-cpu"]["repair"].endswith("whl/cu126")
    assert (
        "was built for another torch" in traps["te-torch"]["what"] and "undefined symbol" in traps["te-torch"]["what"]
    )
    assert "cuDNN 9.10.2" in traps["cudnn"]["what"] and f"CUDA_HOME={tmp_path / 'cuda'}" in traps["cudnn"]["what"]
    assert not can_mount or "64 MiB" in traps["shm"]["what"]


def test_a_driver_that_is_too_old_and_no_compiler_of_cuda(site, tmp_path):
    site.install("torch", "2.13.0+cu130", {"torch/__init__.py": TORCH.format(cuda="13.0", cudnn="91900")})
    site.install(
        "transformer_engine",
        "2.20.2",
        {"transformer_engine/__init__.py": "raise OSError('libnvrtc.so: cannot open shared object file')"},
    )
    traps = site.traps(GPUS="H100", DRIVER="535.183.01", CUDA_HOME=str(tmp_path))
    assert set(traps) == {"driver", "nvcc", "te-import"} and traps["te-import"]["what"].endswith(
        "OSError: libnvrtc.so: cannot open shared object file"
    )
    assert (
        "535.183.01 is older than 580" in traps["driver"]["what"]
        and f"CUDA_HOME={tmp_path} has no bin/nvcc" in traps["nvcc"]["what"]
    )
    traps = site.traps(GPUS="H100", DRIVER="580.65.06", CUDA_HOME=str(tmp_path), CUDA_VISIBLE_DEVICES="7")
    assert set(traps) == {"gpus-hidden", "nvcc", "te-import"} and traps["gpus-hidden"]["what"].endswith(
        "CUDA_VISIBLE_DEVICES is '7'"
    )


def test_a_torch_that_cannot_be_imported_is_one_trap_among_others(site):
    site.install(
        "torch", "2.13.0", {"torch/__init__.py": "raise OSError('libcudart.so.13: cannot open shared object file')"}
    )
    site.install("apex", "0.9.10.dev0", {"apex/__init__.py": ""})
    traps = site.traps()
    assert set(traps) == {"torch", "apex"}
    assert (
        "OSError: libcudart.so.13" in traps["torch"]["what"]
        and traps["torch"]["repair"] == "pip install --force-reinstall torch"
    )


def test_mistakes_in_the_command_line(site):
    done = site.doctor("--config", "configs/none.json")
    assert done.returncode == 2 and done.stderr.startswith("error: configs/none.json: cannot read the config")
    assert site.doctor("--set", "model.depth=2").returncode == 2


def test_compiling_without_a_compiler(site):
    site.install("torch", "2.13.0+cpu", {"torch/__init__.py": TORCH.format(cuda=None, cudnn=0)})
    (site.programs / "bash").symlink_to("/bin/bash")
    done = site.doctor(
        "--json", "--config", "configs/d2_cpu.json", "--set", "precision.compile=true", PATH=str(site.programs)
    )
    (trap,) = json.loads(done.stdout)["traps"]
    assert (done.returncode, trap["name"], trap["repair"]) == (1, "compiler", "sudo apt-get install -y g++")


def test_a_cudnn_that_torch_refuses_and_an_engine_that_names_its_torch(site):
    error = "cuDNN version incompatibility: compiled against (9, 20, 0) but found (9, 1, 0)"
    refuses = f"exec('raise RuntimeError(\\'{error}\\')')"
    site.install("torch", "2.13.0+cu130", {"torch/__init__.py": TORCH.format(cuda="13.0", cudnn=refuses)})
    site.install("transformer_engine", "2.20.2")
    site.install("transformer_engine_torch", "2.20.2+cu13torch2.11.0cxx11abiTRUE")
    traps = site.traps()
    assert set(traps) == {"cudnn", "te-torch"}
    assert (
        traps["cudnn"]["what"].endswith("compiled against (9, 20, 0) but found (9, 1, 0)")
        and traps["cudnn"]["repair"] == "unset LD_LIBRARY_PATH"
    )
    assert "was built for torch 2.11, but torch is 2.13.0+cu130" in traps["te-torch"]["what"]
