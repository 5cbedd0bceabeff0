"""The Muon partition on grids of data x tensor ranks against the whole-matrix update of one process, bit for bit.

Seen to fail with: ranks summed in another order, gradients rounded to bfloat16, shards cut by row joined like those cut
by column, every place given the first shard's directions or scales, scales of a fragment taken from the first rows, a
returned fragment shifted by one element, state without the tensor offset or with a wrong one, hooks that overwrite
instead of adding, a missing gradient not zeroed, discard_gradients() that forgets nothing.
"""

import pytest
import torch
import torch.distributed as dist

from megachat.optim.matrix import Matrix
from megachat.optim.muon import reference_step
from tests.harness import run_ranks
from tests.muon import (
    BF16,
    FP16,
    FP32,
    backward,
    build,
    different,
    gradient,
    hyper,
    mean_gradient,
    on_cpu,
    oracle,
    shard,
    small_matrices,
    state,
    take_step,
    weight_dtype,
    weights,
    whole_state,
)

LAYOUTS = ((1, 1), (2, 1), (3, 1), (4, 1), (1, 2), (1, 4), (2, 2))  # data, tensor


def _ranks(layout):
    return layout[0] * layout[1]


# ---- what the ranks run


def _train(layout, settings):
    """Three steps for each (compute, wire, layers_per_bucket, micros, armed); for each: state, whether weights are the
    masters, sums of squares.
    """
    mesh, matrices = on_cpu(layout), small_matrices()
    answers = []
    for compute, wire, layers_per_bucket, micros, armed in settings:
        parameters, partition = build(matrices, mesh, compute, wire, layers_per_bucket)
        squares = [take_step(parameters, partition, matrices, mesh, step, micros, armed=armed) for step in range(3)]
        answers.append((state(partition), weights(parameters), squares))
    return mesh.tensor.rank, answers


def _spoiled_step(layout, compute):
    """A step, a step given up because one rank had an inf, two more steps."""
    mesh, matrices = on_cpu(layout), small_matrices()
    parameters, partition = build(matrices, mesh, compute)
    take_step(parameters, partition, matrices, mesh, 0)
    before, kept = state(partition), weights(parameters)
    backward(
        parameters,
        matrices,
        mesh,
        1,
        1,
        last=partition.start_async_reduce,
        spoil=mesh.world.rank == mesh.world.size - 1,
    )
    partition.start_reduce()
    partition.wait_for_reduce()
    squares = partition.sum_of_squares()
    dist.all_reduce(squares)
    partition.discard_gradients()
    after = state(partition)
    untouched = all(
        torch.equal(a[2], b[2]) for x, y in zip(before, after, strict=True) for a, b in zip(x[3], y[3], strict=True)
    )
    untouched &= all(torch.equal(kept[name], parameter) for name, parameter in parameters.items())
    for step in (1, 2):
        take_step(parameters, partition, matrices, mesh, step)
    return squares.item(), untouched, partition.matrices_updated, state(partition)


def _resumed(layout, whole, compute):
    """Load whole tensors, take step 2 with data rank 0's gradients on every rank."""
    mesh, matrices = on_cpu(layout), small_matrices()
    parameters, partition = build(matrices, mesh, compute)
    for kind, name, _, pieces in partition.state_shards():
        for (row, column), (rows, width), view in pieces:
            view.copy_(whole[kind, name][row : row + rows, column : column + width])
    partition.refresh_weights()
    loaded = all(
        torch.equal(
            shard(matrix, whole["master", matrix.name], mesh).to(weight_dtype(compute)), parameters[matrix.name]
        )
        for matrix in matrices
    )
    take_step(parameters, partition, matrices, mesh, 2, rank=0)
    return loaded, state(partition)


def _reduced_gradients(layout):
    mesh, matrices = on_cpu(layout), small_matrices()
    parameters, partition = build(matrices, mesh, FP32, FP32)
    backward(parameters, matrices, mesh, 0, 1, last=partition.start_async_reduce)
    partition.start_reduce()
    partition.wait_for_reduce()
    return [
        ("gradient", name, shape, [(at, size, view.clone()) for at, size, view in pieces])
        for name, shape, pieces in partition.gradient_shards()
    ]


def _even_bytes(layout, compute):
    mesh = on_cpu(layout)
    shapes = (("a", (192, 128), "column"), ("b", (128, 384), "row"))
    matrices = [Matrix(f"{layer}.{name}", shape, layer, 1.0, cut) for layer in range(6) for name, shape, cut in shapes]
    _, partition = build(matrices, mesh, compute)
    return (
        partition.state_bytes(),
        partition.plan.state_bytes(mesh.stage.rank),
        sum(matrix.elements for matrix in matrices),
    )


def _different_plans(layout):
    mesh = on_cpu(layout)
    build(small_matrices()[mesh.world.rank :], mesh, FP32, FP32)


# ---- the tests


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_grid_and_bucket_size_gives_the_bits_of_one_process(layout):
    settings = [(compute, BF16, layers, 1, True) for compute in (BF16, FP32) for layers in (1, 2, None)]
    settings += [(FP16, BF16, 3, 1, True), (BF16, BF16, 1, 1, False)]
    answers = run_ranks(_train, _ranks(layout), layout, settings)
    _compare(layout, settings, answers)


@pytest.mark.parametrize("layout", [(2, 1), (2, 2)])
def test_micro_batches_accumulate_in_float32(layout):
    settings = [
        (BF16, BF16, None, 2, True),
        (BF16, BF16, 1, 4, True),
        (FP32, BF16, 1, 2, True),
        (FP32, BF16, 2, 4, False),
    ]
    _compare(layout, settings, run_ranks(_train, _ranks(layout), layout, settings))


def _compare(layout, settings, answers):
    for index, (compute, wire, layers, micros, armed) in enumerate(settings):
        expected, squares = oracle(layout[0], compute, wire, micros)
        assert not different(whole_state([answer[index][0] for _, answer in answers]), expected), (
            compute,
            layers,
            armed,
        )
        for tensor_rank, answer in answers:
            _, found, found_squares = answer[index]
            for matrix in small_matrices():
                (row, column), (rows, columns) = (
                    matrix.local_offset(layout[1], tensor_rank),
                    matrix.local_shape(layout[1]),
                )
                part = expected["master", matrix.name][row : row + rows, column : column + columns]
                assert torch.equal(found[matrix.name], part.to(weight_dtype(compute))), (
                    compute,
                    layers,
                    armed,
                    matrix.name,
                )
            assert found_squares == pytest.approx(squares, rel=1e-6)


@pytest.mark.parametrize("layout", [(1, 1), (3, 1), (4, 1), (2, 2)])
def test_a_float32_wire_differs_only_by_the_order_of_summation(layout):
    (expected, _), answers = (
        oracle(layout[0], FP32, FP32),
        run_ranks(_train, _ranks(layout), layout, [(FP32, FP32, 2, 1, True)]),
    )
    found = whole_state([answer[0][0] for _, answer in answers])
    apart = {key: (found[key] - tensor).abs() for key, tensor in expected.items()}
    assert all(float(value.max()) < 1e-6 for (kind, _), value in apart.items() if kind != "master")
    masters = torch.cat([value.flatten() for (kind, _), value in apart.items() if kind == "master"])
    # where the update is all but zero, its sign decides on the decay of that one element: lr * decay * weight
    assert int((masters > 1e-6).sum()) <= 3 and float(masters.max()) < 2e-3


def test_the_gradients_show_the_order_of_summation():
    matrix = small_matrices()[0]
    forward, reverse = (mean_gradient(matrix, 0, 4, BF16, BF16, 1, ranks) for ranks in ((0, 1, 2, 3), (3, 2, 1, 0)))
    assert not torch.equal(forward, reverse)


@pytest.mark.parametrize("compute, layout", [(BF16, (3, 1)), (FP32, (2, 2)), (BF16, (1, 2))])
def test_an_inf_on_one_rank_is_seen_by_all_and_leaves_every_bit(compute, layout):
    answers = run_ranks(_spoiled_step, _ranks(layout), layout, compute)
    assert all(not torch.isfinite(torch.tensor(squares)) and untouched for squares, untouched, _, _ in answers)
    assert sum(updated for _, _, updated, _ in answers) == len(small_matrices())
    assert not different(whole_state([found for _, _, _, found in answers]), oracle(layout[0], compute)[0])


@pytest.mark.parametrize("compute", [BF16, FP32])
@pytest.mark.parametrize("saved, others", [((4, 1), ((3, 1), (1, 4))), ((2, 2), ((4, 1), (1, 2), (1, 1)))])
def test_state_of_one_grid_goes_on_with_another(saved, others, compute):
    answers = run_ranks(_train, _ranks(saved), saved, [(compute, BF16, None, 1, True)])
    whole = whole_state([answer[0][0] for _, answer in answers])
    for layout in others:
        resumed = run_ranks(_resumed, _ranks(layout), layout, whole, compute)
        expected = {}
        for matrix in small_matrices():
            weight, momentum, moment = (
                whole[kind, matrix.name].clone() for kind in ("master", "momentum", "second_moment")
            )
            one = gradient(matrix, 2, 0, 0).to(weight_dtype(compute))
            one = one.to(BF16).float() if layout[0] > 1 else one.float()
            reference_step(weight, sum([one] * layout[0]) / layout[0], momentum, moment, hyper(matrix, 2), compute)
            expected |= {
                ("master", matrix.name): weight,
                ("momentum", matrix.name): momentum,
                ("second_moment", matrix.name): moment,
            }
        assert not different(whole_state([found for _, found in resumed]), expected), layout
        assert all(loaded for loaded, _ in resumed)


def test_reduced_gradients_can_be_read_by_name_and_whole_shape():
    found = whole_state(run_ranks(_reduced_gradients, 4, (2, 2)))
    for matrix in small_matrices():
        torch.testing.assert_close(
            found["gradient", matrix.name], mean_gradient(matrix, 0, 2, FP32, FP32, 1), rtol=0, atol=1e-8
        )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_state_is_eight_bytes_an_element_divided_by_the_places(layout):
    for held, planned, elements in run_ranks(_even_bytes, _ranks(layout), layout, BF16):
        assert held == planned
        assert held["master"] + held["momentum"] == 8 * elements // _ranks(layout) and elements % _ranks(layout) == 0


@pytest.mark.parametrize("layout", [(2, 1), (1, 2)])
def test_ranks_with_different_matrices_refuse_to_start(layout):
    with pytest.raises(RuntimeError, match="different Muon partitions"):
        run_ranks(_different_plans, 2, layout)
