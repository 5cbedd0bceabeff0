"""The sums of squares that are here, beside float64; what a run would choose is reported."""

import pytest
import torch

from megachat.kernels import gradient_norm
from megachat.kernels.gradient_norm import choose_gradient_norm, torch_sum_of_squares

DEVICE = torch.device("cuda")
BUILDERS = {"te": gradient_norm._te, "apex": gradient_norm._apex, "torch": lambda device: (torch_sum_of_squares, "")}


@pytest.mark.parametrize("name", BUILDERS)
def test_sums_are_those_of_float64(name):
    function, said = BUILDERS[name](DEVICE)
    if function is None:
        pytest.skip(f"no {name}: {said}")
    generator = torch.Generator(DEVICE).manual_seed(0)
    sizes = ((768, 3072), (32768, 768), (5,), (0,), (12, 12), (100_003,))
    for scale in (1e-6, 1.0, 1e6):
        tensors = [scale * torch.randn(size, device=DEVICE, generator=generator) for size in sizes]
        wanted = sum(tensor.double().square().sum().item() for tensor in tensors)
        before = torch.tensor(wanted, device=DEVICE, dtype=torch.float32)
        assert function(tensors).item() == pytest.approx(wanted, rel=2e-6)
        assert function(tensors, before).item() == pytest.approx(2 * wanted, rel=2e-6)
        assert function(tensors).dtype == torch.float32 and function(tensors).shape == ()
        assert function([*tensors, torch.full((3,), torch.inf, device=DEVICE)]).isinf()
        assert function([*tensors, torch.full((3,), torch.nan, device=DEVICE)]).isnan()


def test_what_is_chosen_works(report):
    chosen = choose_gradient_norm(DEVICE)
    report("gradient norm", f"{chosen.name} ({chosen.reason})")
    assert chosen.sum_of_squares([torch.ones(10, device=DEVICE)]).item() == pytest.approx(10)
    if gradient_norm._te(DEVICE)[0]:
        assert chosen.name == "te"
