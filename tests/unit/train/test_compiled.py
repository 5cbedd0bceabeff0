"""precision.compile where it cannot work is refused; that it works is in tests/ranks/test_compile.py and
tests/runs/test_compile.py.
"""

import sys

import pytest
import torch

from megachat.errors import UserError
from megachat.kernels.choice import choose_kernels, compile_problem
from megachat.model.gpt import ModelOptions, build_layers
from megachat.optim.muon import compiled_functions
from megachat.planning.plan import resolve_plan
from megachat.train.compiled import apply_compile, torch_mode
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
        choose_kernels(config, resolve_plan(config, 1, 97), CPU)
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


def test_the_mode_reaches_everything_that_is_compiled_and_has_no_cuda_graphs(monkeypatch):
    modes = []

    def compile_function(function, **options):
        modes.append(options["mode"])
        return function

    monkeypatch.setattr(torch, "compile", compile_function)
    for recompute, blocks in (("none", 3), ("selective", 6), ("block", 3)):
        config = small_config(batch={"recompute": recompute})
        layers = build_layers(resolve_plan(config, 1, 97).dims, ModelOptions(recompute=recompute))
        for name in ("default", "max-autotune"):
            modes.clear()
            apply_compile(layers, torch_mode(name))
            compiled_functions(torch_mode(name))
            # Module.compile makes those of embed and head
            assert modes == [{"default": None, "max-autotune": "max-autotune-no-cudagraphs"}[name]] * (blocks + 2 + 4)


def test_a_mode_without_compilation_is_refused():
    with pytest.raises(UserError, match="compile_mode is max-autotune, but precision.compile is false.*compile=true"):
        resolve_plan(small_config(precision={"compile_mode": "max-autotune"}), 1, 97)
