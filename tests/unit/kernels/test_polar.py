"""Polar Express: singular values near 1, singular vectors kept, either orientation."""

import pytest
import torch

from megachat.kernels.polar import COEFFICIENTS, polar_express

SHAPES = [(48, 48), (96, 32), (32, 96), (4, 12)]


def _matrix(shape, decay: float = 1.0) -> torch.Tensor:
    """Random singular vectors; singular values from 1 down to `decay`."""
    generator = torch.Generator().manual_seed(0)
    u, s, v = torch.linalg.svd(torch.randn(shape, generator=generator, dtype=torch.float64), full_matrices=False)
    return u * torch.logspace(0, torch.log10(torch.tensor(decay)).item(), len(s), dtype=torch.float64) @ v


def _float64_oracle(x: torch.Tensor) -> torch.Tensor:
    """The same polynomials applied to the singular values alone."""
    u, s, v = torch.linalg.svd(x.double(), full_matrices=False)
    s = s / (s.norm() * 1.01 + 1e-6)
    for a, b, c in COEFFICIENTS:
        s = a * s + b * s**3 + c * s**5
    return u * s @ v


@pytest.mark.parametrize("shape", SHAPES)
def test_float32_follows_the_polynomials(shape):
    x = _matrix(shape, 0.05).float()
    torch.testing.assert_close(polar_express(x).double(), _float64_oracle(x), rtol=0, atol=5e-5)


@pytest.mark.parametrize("dtype, lowest, highest", [(torch.float32, 0.857, 1.143), (torch.bfloat16, 0.75, 1.25)])
@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_end_near_one(shape, dtype, lowest, highest):
    result = polar_express(_matrix(shape, 0.02).to(dtype))
    assert result.dtype == dtype
    values = torch.linalg.svdvals(result.double())
    assert lowest < float(values.min()) and float(values.max()) < highest


def test_singular_vectors_stay():
    x = _matrix((40, 24), 0.3)
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    assert float((polar_express(x.float()).double() - u @ v).norm() / (u @ v).norm()) < 0.1


def test_a_transposed_matrix_gives_the_transposed_result():
    x = _matrix((64, 40), 0.1).float()
    torch.testing.assert_close(polar_express(x.mT.contiguous()), polar_express(x).mT, rtol=0, atol=2e-5)


def test_zeros_stay_zeros():
    assert not polar_express(torch.zeros(8, 16)).any()
