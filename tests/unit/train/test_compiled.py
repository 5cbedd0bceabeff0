"""precision.compile where it cannot work is refused; that it works is in tests/ranks/test_compile.py and
tests/runs/test_compile.py.
"""

import sys

import pytest
import torch

from megachat.errors import UserError
from megachat.kernels.choice import choose_kernels, compile_problem
from megachat.planning.plan import resolve
from tests.training import small_config

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def empty(monkeypatch, tmp_path):
    """A machine without compilers, with Triton."""
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def test_without_a_compiler_it_is_refused(empty):
    config = small_config(precision={"compile": True})
    with pytest.raises(
        UserError,
        match=r"precision.compile is true.* no g[+][+]: .*precision.compile=false$",
    ):
        choose_kernels(config, resolve(config, 1, 97), CPU)
    assert compile_problem(GPU) == "this machine has no gcc or clang"


@pytest.mark.parametrize("device, usual, named", [(CPU, "g++", "CXX"), (GPU, "gcc", "CC"), (GPU, "clang", "CC")])
def test_compilers_are_looked_for_where_torch_and_triton_look(empty, monkeypatch, device, usual, named):
    for name in (usual, "mine"):
        (empty / name).touch(mode=0o755)
    assert compile_problem(device) is None
    monkeypatch.setenv(named, "absent")
    assert compile_problem(device) == "this machine has no absent"
    monkeypatch.setenv(named, "mine")
    assert compile_problem(device) is None


def test_a_gpu_needs_triton(monkeypatch):
    monkeypatch.setattr("sys.path", [])
    monkeypatch.delitem(sys.modules, "triton", raising=False)
    assert compile_problem(GPU) == "the package triton is not installed"
