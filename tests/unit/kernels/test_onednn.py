"""oneDNN's products against float64, in linears and in the head, and where they are chosen."""

import pytest
import torch

from megachat import device
from megachat.kernels.cross_entropy import PlainProducts, capped_cross_entropy
from megachat.kernels.linear import Linear
from megachat.kernels.onednn import OneDnnProducts, apply_onednn, onednn_product

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


def _random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_a_linear_and_its_gradients_follow_float64():
    linear, small = Linear(128, 192), Linear(128, 8)
    apply_onednn([linear, small])
    assert linear.product is not None and small.product is None
    with torch.no_grad():
        linear.weight.copy_(_random(0, 192, 128))
    x, gradient = _random(1, 2, 5, 128).requires_grad_(), _random(2, 192, 2, 5).permute(1, 2, 0)  # not contiguous
    y = linear(x)
    y.backward(gradient)
    torch.testing.assert_close(y.double(), x.double() @ linear.weight.double().T, rtol=0, atol=1e-4)
    torch.testing.assert_close(x.grad.double(), gradient.double() @ linear.weight.double(), rtol=0, atol=1e-4)
    expected = gradient.flatten(0, 1).double().T @ x.flatten(0, 1).double()
    torch.testing.assert_close(linear.weight.grad.double(), expected, rtol=0, atol=1e-4)


def test_the_head_follows_the_plain_products():
    hidden, table, targets = _random(3, 6, 128), _random(4, 192, 128), torch.tensor([0, 5, -1, 190, 7, 191])
    results = []
    for products in (PlainProducts, OneDnnProducts):
        inputs = [hidden.clone().requires_grad_(), table.clone().requires_grad_()]
        loss = capped_cross_entropy(*inputs, targets, 192, 15.0, products=products)
        results.append((loss, *torch.autograd.grad(loss, inputs)))
    for plain, onednn in zip(*results, strict=True):
        torch.testing.assert_close(onednn, plain, rtol=1e-5, atol=1e-6)


def test_shapes_are_known_without_numbers():
    result = onednn_product(torch.empty(2, 3, 128, device="meta"), torch.empty(192, 128, device="meta"))
    assert result.shape == (2, 3, 192)


def test_it_is_chosen_for_float32_on_amd_with_avx512(monkeypatch):
    cpu, vendor = torch.device("cpu"), "AuthenticAMD"
    monkeypatch.setattr(device, "_cpu_info", lambda key: vendor)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert device.onednn_multiplies_faster(cpu, torch.float32)
    assert not device.onednn_multiplies_faster(cpu, torch.bfloat16)
    assert not device.onednn_multiplies_faster(torch.device("cuda"), torch.float32)
    vendor = "GenuineIntel"
    assert not device.onednn_multiplies_faster(cpu, torch.float32)
