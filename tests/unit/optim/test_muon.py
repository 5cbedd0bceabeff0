"""Muon's functions against another formulation in float64, and the properties that the papers promise."""

import pytest
import torch

from megachat.kernels.polar import COEFFICIENTS
from megachat.optim.muon import (
    apply_update,
    equilibrate_rows,
    momentum_update,
    orthogonalization_dtype,
    second_moment_shape,
    update_direction,
    update_scales,
)
from tests.muon import reference_step

SHAPES = [(48, 48), (96, 32), (32, 96), (4, 12)]
LR, DECAY, MOMENTUM, BETA2 = 0.03, 0.2, 0.9, 0.8
HYPERPARAMETERS = {"lr": LR, "weight_decay": DECAY, "momentum_factor": MOMENTUM, "beta2": BETA2}


def _random(seed, shape, scale=1.0):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _float64_step(weight, gradient, momentum, moment):
    """Takes the step in float64, on singular values. Returns (weight, momentum, second moment)."""
    momentum = MOMENTUM * momentum + (1 - MOMENTUM) * gradient
    update = (1 - MOMENTUM) * gradient + MOMENTUM * momentum
    norms = update.square().sum(1).sqrt()
    update = torch.diag(norms.square().mean().sqrt() / norms) @ update
    u, s, v = torch.linalg.svd(update, full_matrices=False)
    s = s / (1.01 * s.norm() + 1e-6)
    for a, b, c in COEFFICIENTS:
        s = a * s + b * s**3 + c * s**5
    direction = u * s @ v
    direction *= (min(direction.shape) / direction.square().sum()).sqrt()
    mean = direction.square().mean(1 if direction.shape[0] >= direction.shape[1] else 0, keepdim=True)
    moment = BETA2 * moment + (1 - BETA2) * mean
    scaled = direction / moment.sqrt()
    scaled *= direction.norm() / scaled.norm()
    decayed = torch.where(scaled * weight >= 0, LR * DECAY * weight, 0.0)
    return weight - LR * scaled - decayed, momentum, moment


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("compute, tolerance", [(torch.float32, 1e-4), (torch.float16, 1e-4), (torch.bfloat16, 0.15)])
def test_three_steps_follow_float64(shape, compute, tolerance):
    weight, momentum, moment = _random(0, shape, 0.1), torch.zeros(shape), torch.zeros(second_moment_shape(shape))
    expected = tuple(tensor.double() for tensor in (weight, momentum, moment))
    start = weight.clone()
    for step in range(3):
        gradient = _random(step + 1, shape, 0.01)
        kept = gradient.clone()
        reference_step(weight, gradient, momentum, moment, compute, **HYPERPARAMETERS)
        assert torch.equal(gradient, kept)
        expected = _float64_step(expected[0], gradient.double(), *expected[1:])
    moved = (expected[0] - start.double()).norm()
    assert float((weight.double() - expected[0]).norm() / moved) < tolerance
    torch.testing.assert_close(momentum.double(), expected[1], rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(moment.double(), expected[2], rtol=max(1e-3, tolerance), atol=0)


def test_momentum_is_nesterov_and_in_place():
    momentum, gradient = torch.tensor([1.0, 2.0]), torch.tensor([3.0, -2.0])
    update = momentum_update(momentum, gradient, torch.tensor(0.75))
    assert update is gradient
    torch.testing.assert_close(momentum, torch.tensor([1.5, 1.0]))
    torch.testing.assert_close(update, torch.tensor([0.75 * 1.5 + 0.25 * 3, 0.75 * 1.0 - 0.25 * 2]))


def test_equilibrated_rows_have_the_same_norm_and_zero_rows_stay_zero():
    x = _random(3, (6, 10)) * torch.logspace(-3, 3, 6)[:, None]
    norms = equilibrate_rows(x).norm(dim=1)
    torch.testing.assert_close(norms, norms[:1].expand(6))
    torch.testing.assert_close(norms[0], x.norm() / 6**0.5)
    x[2] = 0
    assert not equilibrate_rows(x)[2].any() and bool(torch.isfinite(equilibrate_rows(x)).all())


@pytest.mark.parametrize("shape", SHAPES)
def test_scales_set_the_norm_and_equalize_the_vectors_of_the_longer_side(shape):
    direction = update_direction(_random(4, shape) * torch.logspace(-1, 1, shape[1]))
    moment = torch.zeros(second_moment_shape(shape))
    norm, scale = update_scales(direction, moment, torch.tensor(0.0))  # beta2 0: only this step counts
    assert norm.shape == (1, 1) and scale.shape == moment.shape == (
        (shape[0], 1) if shape[0] >= shape[1] else (1, shape[1])
    )
    torch.testing.assert_close((direction * norm * scale).norm(), torch.tensor(float(min(shape))).sqrt())
    lengths = (direction * norm * scale).norm(dim=1 if shape[0] >= shape[1] else 0)
    torch.testing.assert_close(lengths, lengths[:1].expand(max(shape)), rtol=1e-4, atol=0)


def test_the_second_moment_is_a_running_mean():
    direction, moment = update_direction(_random(5, (8, 4))), torch.full((8, 1), 2.0)
    norm, _ = update_scales(direction, moment, torch.tensor(0.75))
    torch.testing.assert_close(moment, 1.5 + 0.25 * (direction * norm).square().mean(1, keepdim=True))


def test_decay_is_cautious():
    weight = torch.tensor([[2.0, 2.0, 0.0, -2.0]])
    one = torch.ones(1, 1)
    apply_update(weight, torch.tensor([[1.0, -1.0, 1.0, 1.0]]), one, one, torch.tensor(0.1), torch.tensor(0.5))
    torch.testing.assert_close(weight, torch.tensor([[2.0 - 0.1 - 0.1, 2.0 + 0.1, -0.1, -2.0 - 0.1]]))


def test_the_update_does_not_depend_on_the_scale_of_the_gradient():
    results = []
    for factor in (1.0, 1024.0):
        weight, gradient = _random(0, (32, 16), 0.1), factor * _random(1, (32, 16))
        state = torch.zeros(32, 16), torch.zeros(32, 1)
        reference_step(weight, gradient, *state, torch.float32, **HYPERPARAMETERS)
        results.append(weight)
    torch.testing.assert_close(*results, rtol=0, atol=1e-6)


def test_float16_is_orthogonalized_in_float32():
    assert orthogonalization_dtype(torch.bfloat16) == torch.bfloat16
    assert orthogonalization_dtype(torch.float16) == orthogonalization_dtype(torch.float32) == torch.float32
