import pytest
import torch
import torch.nn.functional as F

from megachat.kernels.squared_relu import squared_relu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_value_and_gradient_equal_the_plain_form(dtype):
    x = torch.randn(7, 33, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    gradient = torch.randn(7, 33, generator=torch.Generator().manual_seed(1)).to(dtype)
    results = [(y := function(x), *torch.autograd.grad(y, x, gradient)) for function in (squared_relu, _plain)]
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def _plain(x: torch.Tensor) -> torch.Tensor:
    return F.relu(x).square()
