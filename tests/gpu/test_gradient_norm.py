"""The available sums of squares compared with float64; the report names the one that a run would choose."""

import pytest
import torch

from megachat.kernels.choice import choose_gradient_norm
from megachat.kernels.gradient_norm import torch_sum_of_squares
from megachat.kernels.multi_tensor import KernelUnavailable, load_apex, load_te
from megachat.kernels.te import te_problem

DEVICE = torch.device("cuda")
LOADERS = {"te": load_te, "apex": load_apex, "torch": lambda device: (torch_sum_of_squares, "")}


@pytest.mark.parametrize("name", LOADERS)
def test_sums_are_those_of_float64(name):
    try:
        function, _ = LOADERS[name](DEVICE)
    except KernelUnavailable as problem:
        pytest.skip(f"no {name}: {problem}")
    generator = torch.Generator(DEVICE).manual_seed(0)
    sizes = ((768, 3072), (32768, 768), (5,), (0,), (12, 12), (100_003,))
    for scale in (1e-6, 1.0, 1e6):
        tensors = [scale * torch.randn(size, device=DEVICE, generator=generator) for size in sizes]
        expected = sum(tensor.double().square().sum().item() for tensor in tensors)
        before = torch.tensor(expected, device=DEVICE, dtype=torch.float32)
        assert function(tensors).item() == pytest.approx(expected, rel=2e-6)
        assert function(tensors, before).item() == pytest.approx(2 * expected, rel=2e-6)
        assert function(tensors).dtype == torch.float32 and function(tensors).shape == ()
        assert function([*tensors, torch.full((3,), torch.inf, device=DEVICE)]).isinf()
        assert function([*tensors, torch.full((3,), torch.nan, device=DEVICE)]).isnan()


def test_the_chosen_one_works(report):
    chosen = choose_gradient_norm(DEVICE)
    report("gradient norm", f"{chosen.name} ({chosen.reason})")
    assert chosen.sum_of_squares([torch.ones(10, device=DEVICE)]).item() == pytest.approx(10)
    if te_problem(DEVICE) is None:
        assert chosen.name == "te"
