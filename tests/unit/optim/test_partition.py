"""The partition on one rank: hooks, memory, order of calls, errors. More ranks: tests/ranks/test_muon_partition.py."""

import dataclasses

import pytest
import torch

from megachat.optim.matrix import Matrix
from megachat.optim.muon import second_moment_shape
from megachat.optim.partition import MuonPartition
from megachat.parallel.mesh import Axis, Mesh
from tests.muon import reference_step, state_bytes

AXES = {name: Axis(name, 1, 0, None, (0,)) for name in ("world", "data", "tensor", "pipeline", "stage", "saving")}
ALONE = Mesh(**AXES, device=torch.device("cpu"), topology=None)
MATRICES = [Matrix("first", (160, 128), 0, 1.5), Matrix("second", (128, 160), 1), Matrix("tiny", (3, 5), 1)]


def _build(compute=torch.float32, **changes):
    generator = torch.Generator().manual_seed(0)
    parameters = {
        matrix.name: torch.nn.Parameter(torch.randn(matrix.shape, generator=generator)) for matrix in MATRICES
    }
    settings = {"compute_dtype": compute, "gradient_wire": torch.bfloat16, "beta2": 0.9} | changes
    return parameters, MuonPartition(parameters, MATRICES, ALONE, **settings)


def _backward(parameters, factor=1.0):
    sum((factor * parameter.float().sin()).sum() for parameter in parameters.values()).backward()


def test_parameters_become_views_of_bfloat16_buckets_and_masters_stay_float32():
    parameters, partition = _build(torch.bfloat16)
    initial, _ = _build()
    for kind, name, shape, rectangles in partition.state_shards():
        if kind == "master":
            assert parameters[name].shape == shape and parameters[name].dtype == torch.bfloat16
            whole = torch.cat([view.flatten() for _, _, view in rectangles]).view(shape)
            assert torch.equal(whole, initial[name]) and torch.equal(whole.bfloat16(), parameters[name])
    first, second = (parameters[name].untyped_storage().data_ptr() for name in ("first", "second"))
    assert first == second


def test_float32_weights_are_the_masters():
    parameters, partition = _build()
    views = {shard.name: shard.rectangles[0][2] for shard in partition.state_shards() if shard.kind == "master"}
    assert all(views[name].data_ptr() == parameter.data_ptr() for name, parameter in parameters.items())
    elements = sum(parameter.numel() for parameter in parameters.values())
    assert 0 <= partition.plan.shard_elements - elements < 64 * len(partition.plan.buckets)
    state = state_bytes(partition)
    assert state["master"] == state["momentum"] == 4 * partition.plan.shard_elements
    assert state == partition.plan.state_bytes(0)


@pytest.mark.parametrize("scale", [1.0, 0.25, torch.tensor(0.25)])
def test_a_step_equals_the_reference_step_with_the_scaled_gradient(scale):
    parameters, partition = _build()
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    _backward(parameters)
    _backward(parameters, 3.0)
    partition.set_hyper(0.02, 0.1, 0.9)
    partition.start_reduce()
    partition.wait_for_reduce()
    assert float(partition.sum_of_squares()) == pytest.approx(
        sum((4 * w.cos()).square().sum().item() for w in before.values()), rel=1e-5
    )
    partition.step(scale)
    partition.wait_for_gather()
    assert partition.matrices_updated == len(MATRICES)
    for matrix in MATRICES:
        weight = before[matrix.name]
        gradient = (weight.cos() + 3.0 * weight.cos()) * scale
        state = torch.zeros(matrix.shape), torch.zeros(second_moment_shape(matrix.shape))
        rates = {"lr": 0.02 * matrix.multiplier, "weight_decay": 0.1, "momentum_factor": 0.9, "beta2": 0.9}
        reference_step(weight, gradient, *state, torch.float32, **rates)
        assert torch.equal(parameters[matrix.name].detach(), weight)


def test_loaded_masters_reach_the_weights():
    parameters, partition = _build(torch.bfloat16)
    for shard in partition.state_shards():
        for _, _, view in shard.rectangles:
            view.fill_(0.75)
    partition.refresh_weights()
    assert all(bool((parameter == 0.75).all()) for parameter in parameters.values())


def test_calls_out_of_order_are_refused():
    parameters, partition = _build()
    for call in (lambda: partition.step(1.0), partition.sum_of_squares, partition.gradient_shards):
        with pytest.raises(RuntimeError, match=r"\(\) was called in phase BACKWARD of a step, expected REDUCED"):
            call()
    with pytest.raises(RuntimeError, match=r"^wait_for_reduce\(\).* BACKWARD .* REDUCING$"):
        partition.wait_for_reduce()
    _backward(parameters)
    partition.start_reduce()
    with pytest.raises(RuntimeError, match=r"^start_reduce\(\).* REDUCING .* BACKWARD or LAST_BACKWARD"):
        partition.start_reduce()
    with pytest.raises(RuntimeError, match=r"^step\(\).* REDUCING .* REDUCED"):
        partition.step(1.0)
    with pytest.raises(RuntimeError, match="first|second|tiny"):
        _backward(parameters)
    with pytest.raises(RuntimeError, match="start_async_reduce"):
        partition.start_async_reduce()
    partition.discard_gradients()
    partition.start_reduce()
    partition.wait_for_reduce()
    assert partition.sum_of_squares() == 0, "dropped gradients must not come back"


def test_a_gradient_after_its_reduce_was_started_is_refused():
    parameters, partition = _build()
    partition.start_async_reduce()
    _backward(parameters)
    with pytest.raises(RuntimeError, match="first|second|tiny"):
        _backward(parameters)
    partition.discard_gradients()
    partition.start_async_reduce()
    _backward(parameters)
    partition.start_reduce()
    partition.wait_for_reduce()
    assert partition.sum_of_squares() > 0
    with pytest.raises(RuntimeError, match="start_async_reduce"):
        partition.start_async_reduce()


def test_a_partition_without_matrices():
    partition = MuonPartition({}, [], ALONE, compute_dtype=torch.float32, gradient_wire=torch.float32, beta2=0.9)
    partition.start_async_reduce()
    partition.start_reduce()
    partition.wait_for_reduce()
    assert partition.sum_of_squares() == 0
    partition.step(1.0)
    partition.wait_for_block(0)
    partition.wait_for_gather()
    assert partition.state_shards() == []


def test_arguments_that_do_not_match_are_refused():
    with pytest.raises(ValueError, match="gradient_wire"):
        _build(gradient_wire=torch.float16)
    parameters, _ = _build()
    settings = {"compute_dtype": torch.float32, "gradient_wire": torch.float32, "beta2": 0.9}
    with pytest.raises(ValueError, match="tiny"):
        MuonPartition(parameters, MATRICES[:2], ALONE, **settings)
    with pytest.raises(ValueError, match="second is"):
        MuonPartition(parameters, [MATRICES[0], Matrix("second", (160, 128), 1), MATRICES[2]], ALONE, **settings)
    cut = dataclasses.replace(ALONE, tensor=Axis("tensor", 2, 0, None, (0, 1)))
    with pytest.raises(ValueError, match="first is not cut"):
        MuonPartition(parameters, MATRICES, cut, **settings)
