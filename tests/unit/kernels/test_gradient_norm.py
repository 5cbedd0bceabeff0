"""The choice of the sum of squares, with stand-ins for Transformer Engine and apex; tests/gpu uses the real ones."""

import subprocess
import sys

import pytest
import torch

from megachat.kernels.choice import choose_gradient_norm
from megachat.kernels.gradient_norm import torch_sum_of_squares
from megachat.kernels.multi_tensor import multi_tensor_sum_of_squares
from tests.limits import limit_s
from tests.runs.job import ROOT

KERNEL = """
import torch

def multi_tensor_l2norm(chunk_size, flag, tensor_lists, per_tensor=False):
    (tensors,) = tensor_lists
    assert chunk_size > 0 and flag.dtype == torch.int32 and flag.numel() == 1 and per_tensor is False
    assert tensors and all(tensor.numel() and tensor.is_contiguous() for tensor in tensors)
    assert len({tensor.dtype for tensor in tensors}) == 1
    return FACTOR * torch.cat([tensor.float().flatten() for tensor in tensors]).norm().view(1), torch.zeros(0)
"""
APPLIER = "def multi_tensor_applier(op, flag, lists, *more):\n    return op(65536, flag, lists, *more)\n"
RIGHT, WRONG = KERNEL.replace("FACTOR", "1"), KERNEL.replace("FACTOR", "1.001")
TE = {
    "transformer_engine/__init__.py": "",
    "transformer_engine/pytorch/__init__.py": "is_fp8_available = is_fp8_block_scaling_available = None",
    "transformer_engine/pytorch/optimizers.py": RIGHT + APPLIER,
    "transformer_engine-2.20.2.dist-info/METADATA": "Name: transformer_engine\nVersion: 2.20.2\n",
}
APEX = {"apex/__init__.py": "", "apex/multi_tensor_apply.py": APPLIER, "amp_C.py": RIGHT}
NO_TE = "not te, because the package transformer_engine is not installed"
NO_APEX = "not apex, because it is not installed"
CASES = {
    "both": (TE | APEX, "te", "Transformer Engine 2.20.2"),
    "apex": (APEX, "apex", f"NVIDIA apex; {NO_TE}"),
    "nothing": ({}, "torch", f"{NO_TE}; {NO_APEX}"),
    "PyPI's apex": (
        {"apex/__init__.py": "import pyramid_of_another_program"},
        "torch",
        f"{NO_TE}; not apex, because the installed apex lacks amp_C: "
        "it is another package, or built without CUDA extensions",
    ),
    "amp_C of another torch": (
        APEX | {"amp_C.py": "raise OSError('undefined symbol: c10\\nand more')"},
        "torch",
        f"{NO_TE}; not apex, because it cannot be imported (OSError: undefined symbol: c10)",
    ),
    "Transformer Engine without it": (
        APEX | TE | {"transformer_engine/pytorch/optimizers.py": ""},
        "apex",
        "NVIDIA apex; not te, because it has no multi_tensor_l2norm (ImportError: cannot import name "
        "'multi_tensor_applier' from ",
    ),
    "a kernel with other sums": (
        APEX | TE | {"transformer_engine/pytorch/optimizers.py": WRONG + APPLIER},
        "apex",
        "NVIDIA apex; not te, because it computes 33",
    ),
    "a kernel that fails": (
        APEX | {"amp_C.py": "def multi_tensor_l2norm(*given):\n    raise RuntimeError('no kernel image')"},
        "torch",
        f"{NO_TE}; not apex, because it fails (RuntimeError: no kernel image)",
    ),
}
PROGRAM = """
import os, sys
root, folder, *cases = sys.argv[1:]
sys.path.insert(0, root)
import torch
from megachat.kernels import choice
from megachat.kernels.gradient_norm import torch_sum_of_squares
from megachat.kernels.multi_tensor import check_sums

def check():
    choice.check_sums = lambda function, device: check_sums(function, torch.device("cpu"))
    chosen = choice.choose_gradient_norm(torch.device("cuda"))
    print(chosen.name, chosen.reason, sep=": ", flush=True)
    tensors = [torch.randn(1000), torch.randn(3, 50).t(), torch.randn(7).bfloat16(), torch.zeros(0)]
    for before in (None, torch.tensor(5.0)):
        result = chosen.sum_of_squares(tensors, before)
        assert result.shape == () and result.dtype == torch.float32
        torch.testing.assert_close(result, torch_sum_of_squares(tensors, before), rtol=1e-5, atol=0)
    assert chosen.sum_of_squares([], torch.tensor(5.0)) == 5
    assert torch.equal(torch.tensor(5.0), before)

for case in cases:  # torch is imported once, the stand-ins in one process per case
    child = os.fork()
    if not child:
        sys.path.insert(0, f"{folder}/{case}")
        check()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, case
"""


@pytest.mark.slow
def test_the_first_that_works_is_chosen_and_the_rejected_have_reasons(tmp_path):
    for number, (files, _, _) in enumerate(CASES.values()):
        (tmp_path / str(number)).mkdir()
        for path, text in files.items():
            (tmp_path / str(number) / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / str(number) / path).write_text(text)
    program = [sys.executable, "-c", PROGRAM, str(ROOT), str(tmp_path), *map(str, range(len(CASES)))]
    done = subprocess.run(program, capture_output=True, text=True, timeout=limit_s())
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    for case, (_, name, reason), line in zip(CASES, CASES.values(), lines, strict=True):
        assert line.startswith(f"{name}: {reason}"), case
        assert line == f"{name}: {reason}" or reason.endswith(("from ", " 33")), case


def test_a_cpu_uses_torch():
    chosen = choose_gradient_norm(torch.device("cpu"))
    assert chosen.name == "torch" and chosen.sum_of_squares is torch_sum_of_squares


def test_torch_sums_are_exact_and_in_order():
    torch.manual_seed(0)
    tensors = [torch.randn(size) * 10**power for size, power in ((150_000, 0), (3, 4), (5000, -3), (0, 0))]
    expected = sum(tensor.double().square().sum().item() for tensor in tensors)
    assert torch_sum_of_squares(tensors).item() == pytest.approx(expected, rel=1e-7)
    assert torch.equal(torch_sum_of_squares(tensors), torch_sum_of_squares(tensors[::-1]))
    before = torch.tensor(2.0)
    in_order = ((before + tensors[0].square().sum()) + tensors[1].square().sum()) + tensors[2].square().sum()
    assert torch.equal(torch_sum_of_squares(tensors, before), in_order) and before == 2
    assert (
        torch_sum_of_squares([*tensors, torch.tensor([torch.inf])]).isinf()
        and torch_sum_of_squares([torch.tensor([torch.nan])], before).isnan()
    )


def test_a_long_tensor_is_split(monkeypatch):
    monkeypatch.setattr("megachat.kernels.multi_tensor._LARGEST", 100)
    sizes = []

    def applier(kernel, flag, lists, per_tensor):
        sizes.extend(tensor.numel() for tensor in lists[0])
        return torch.cat(lists[0]).norm().view(1), None

    function, tensors = multi_tensor_sum_of_squares(applier, None), [torch.randn(250), torch.randn(7)]
    torch.testing.assert_close(function(tensors), torch_sum_of_squares(tensors))
    assert sizes == [100, 100, 50, 7]
    with pytest.raises(ValueError, match="no tensors"):
        function([])
