"""The Muon partition on grids of data x tensor ranks against the whole-matrix update of one process, to the bit.

Seen to fail with: ranks summed in another order, gradients rounded to bfloat16, local matrices cut by row joined like
those cut by column, every rank given the first local matrix's directions or scales, scales of a fragment taken from the
first rows, a returned fragment shifted by one element, state without the tensor offset or with a wrong one, hooks that
overwrite instead of adding, a missing gradient not zeroed, discard_gradients() that discards nothing.
"""

import pytest
import torch
import torch.distributed as dist

from megachat.optim.matrix import Matrix
from tests.harness import run_ranks
from tests.muon import (
    BF16,
    FP16,
    FP32,
    backward,
    build,
    copied_shards,
    differing,
    gradient,
    local_matrix,
    mean_gradient,
    on_cpu,
    oracle,
    reference,
    small_matrices,
    state_bytes,
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
    """Takes three steps for each (compute, wire, blocks_per_bucket, micros, asynchronous). Returns the tensor rank, and
    the state, weights and sums of squares of each."""
    mesh, matrices = on_cpu(layout), small_matrices()
    answers = []
    for compute, wire, blocks_per_bucket, micros, asynchronous in settings:
        parameters, partition = build(matrices, mesh, compute, wire, blocks_per_bucket)
        squares = [
            take_step(parameters, partition, matrices, mesh, step, micros, asynchronous=asynchronous)
            for step in range(3)
        ]
        answers.append((copied_shards(partition.state_shards()), weights(parameters), squares))
    return mesh.tensor.rank, answers


def _discarded_step(layout, compute):
    """Takes a step, discards a step because one rank had an inf, takes two more steps."""
    mesh, matrices = on_cpu(layout), small_matrices()
    parameters, partition = build(matrices, mesh, compute)
    take_step(parameters, partition, matrices, mesh, 0)
    before, weights_before = copied_shards(partition.state_shards()), weights(parameters)
    infinite = mesh.world.rank == mesh.world.size - 1
    backward(parameters, matrices, mesh, 1, infinite=infinite, before_last=partition.start_async_reduce)
    partition.start_reduce()
    partition.wait_for_reduce()
    squares = partition.sum_of_squares()
    dist.all_reduce(squares)
    partition.discard_gradients()
    after = partition.state_shards()
    untouched = all(
        torch.equal(a[2], b[2]) for x, y in zip(before, after, strict=True) for a, b in zip(x[3], y[3], strict=True)
    )
    untouched &= all(torch.equal(weights_before[name], parameter) for name, parameter in parameters.items())
    for step in (1, 2):
        take_step(parameters, partition, matrices, mesh, step)
    return squares.item(), untouched, partition.matrices_updated, copied_shards(partition.state_shards())


def _resumed(layout, whole, compute):
    """Loads whole tensors and takes step 2 with data rank 0's gradients on every rank."""
    mesh, matrices = on_cpu(layout), small_matrices()
    parameters, partition = build(matrices, mesh, compute)
    for kind, name, _, rectangles in partition.state_shards():
        for (row, column), (rows, columns), view in rectangles:
            view.copy_(whole[kind, name][row : row + rows, column : column + columns])
    partition.refresh_weights()
    loaded = True
    for matrix in matrices:
        master = local_matrix(matrix, whole["master", matrix.name], layout[1], mesh.tensor.rank)
        loaded &= torch.equal(master.to(weight_dtype(compute)), parameters[matrix.name])
    take_step(parameters, partition, matrices, mesh, 2, rank=0)
    return loaded, copied_shards(partition.state_shards())


def _reduced_gradients(layout):
    mesh, matrices = on_cpu(layout), small_matrices()
    parameters, partition = build(matrices, mesh, FP32, FP32)
    backward(parameters, matrices, mesh, 0, before_last=partition.start_async_reduce)
    partition.start_reduce()
    partition.wait_for_reduce()
    return copied_shards(partition.gradient_shards())


def _state_bytes(layout, compute):
    mesh = on_cpu(layout)
    shapes = (("a", (192, 128), "column"), ("b", (128, 384), "row"))
    matrices = [Matrix(f"{layer}.{name}", shape, layer, 1.0, cut) for layer in range(6) for name, shape, cut in shapes]
    _, partition = build(matrices, mesh, compute)
    planned = partition.plan.state_bytes(mesh.stage.rank)
    return state_bytes(partition), planned, sum(matrix.elements for matrix in matrices)


def _different_plans(layout):
    mesh = on_cpu(layout)
    build(small_matrices()[mesh.world.rank :], mesh, FP32, FP32)


# ---- the tests


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_grid_and_bucket_size_gives_the_bits_of_one_process(layout):
    settings = [(compute, BF16, layers, 1, True) for compute in (BF16, FP32) for layers in (1, 2, None)]
    settings += [(FP16, BF16, 3, 1, True), (BF16, BF16, 1, 1, False)]
    _check_bits(layout, settings, run_ranks(_train, _ranks(layout), layout, settings))


@pytest.mark.parametrize("layout", [(2, 1), (2, 2)])
def test_micro_batches_accumulate_in_float32(layout):
    settings = [
        (BF16, BF16, None, 2, True),
        (BF16, BF16, 1, 4, True),
        (FP32, BF16, 1, 2, True),
        (FP32, BF16, 2, 4, False),
    ]
    _check_bits(layout, settings, run_ranks(_train, _ranks(layout), layout, settings))


def _check_bits(layout, settings, answers):
    for index, setting in enumerate(settings):
        compute, wire, _, micros, _ = setting
        expected, expected_squares = oracle(layout[0], compute, wire, micros)
        assert not differing(whole_state([answer[index][0] for _, answer in answers]), expected), setting
        for tensor_rank, answer in answers:
            _, parameters, squares = answer[index]
            for matrix in small_matrices():
                master = local_matrix(matrix, expected["master", matrix.name], layout[1], tensor_rank)
                assert torch.equal(parameters[matrix.name], master.to(weight_dtype(compute))), (setting, matrix.name)
            assert squares == pytest.approx(expected_squares, rel=1e-6)


@pytest.mark.parametrize("layout", [(1, 1), (3, 1), (4, 1), (2, 2)])
def test_a_float32_wire_differs_only_by_the_order_of_summation(layout):
    expected, _ = oracle(layout[0], FP32, FP32)
    answers = run_ranks(_train, _ranks(layout), layout, [(FP32, FP32, 2, 1, True)])
    state = whole_state([answer[0][0] for _, answer in answers])
    differences = {key: (state[key] - tensor).abs() for key, tensor in expected.items()}
    assert all(float(value.max()) < 1e-6 for (kind, _), value in differences.items() if kind != "master")
    masters = torch.cat([value.flatten() for (kind, _), value in differences.items() if kind == "master"])
    # where the update is all but zero, its sign decides on the decay of that one element: lr * decay * weight
    assert int((masters > 1e-6).sum()) <= 3 and float(masters.max()) < 2e-3


def test_the_gradients_show_the_order_of_summation():
    matrix = small_matrices()[0]
    forward, reverse = (mean_gradient(matrix, 0, 4, BF16, BF16, 1, ranks) for ranks in ((0, 1, 2, 3), (3, 2, 1, 0)))
    assert not torch.equal(forward, reverse)


@pytest.mark.parametrize("compute, layout", [(BF16, (3, 1)), (FP32, (2, 2)), (BF16, (1, 2))])
def test_an_inf_on_one_rank_is_seen_by_all_and_a_discarded_step_changes_no_bit(compute, layout):
    answers = run_ranks(_discarded_step, _ranks(layout), layout, compute)
    assert all(not torch.isfinite(torch.tensor(squares)) and untouched for squares, untouched, _, _ in answers)
    assert sum(updated for _, _, updated, _ in answers) == len(small_matrices())
    assert not differing(whole_state([shards for _, _, _, shards in answers]), oracle(layout[0], compute)[0])


@pytest.mark.parametrize("compute", [BF16, FP32])
@pytest.mark.parametrize("saved, others", [((4, 1), ((3, 1), (1, 4))), ((2, 2), ((4, 1), (1, 2), (1, 1)))])
def test_state_of_one_grid_resumes_on_another(saved, others, compute):
    answers = run_ranks(_train, _ranks(saved), saved, [(compute, BF16, None, 1, True)])
    whole = whole_state([answer[0][0] for _, answer in answers])
    for layout in others:
        resumed = run_ranks(_resumed, _ranks(layout), layout, whole, compute)
        expected = {key: tensor.clone() for key, tensor in whole.items()}
        for matrix in small_matrices():
            state = [expected[kind, matrix.name] for kind in ("master", "momentum", "second_moment")]
            one = gradient(matrix, 2, 0, 0).to(weight_dtype(compute))
            one = one.to(BF16).float() if layout[0] > 1 else one.float()
            reference(matrix, 2, sum([one] * layout[0]) / layout[0], *state, compute)
        assert not differing(whole_state([shards for _, shards in resumed]), expected), layout
        assert all(loaded for loaded, _ in resumed)


def test_reduced_gradients_can_be_read_by_name_and_whole_shape():
    gradients = whole_state(run_ranks(_reduced_gradients, 4, (2, 2)))
    for matrix in small_matrices():
        expected = mean_gradient(matrix, 0, 2, FP32, FP32, 1)
        torch.testing.assert_close(gradients["gradient", matrix.name], expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_state_is_eight_bytes_per_element_divided_by_the_ranks_of_the_grid(layout):
    for state, planned, elements in run_ranks(_state_bytes, _ranks(layout), layout, BF16):
        assert state == planned
        assert state["master"] + state["momentum"] == 8 * elements // _ranks(layout)
        assert elements % _ranks(layout) == 0


@pytest.mark.parametrize("layout", [(2, 1), (1, 2)])
def test_ranks_with_different_matrices_refuse_to_start(layout):
    with pytest.raises(RuntimeError, match="different Muon partitions"):
        run_ranks(_different_plans, 2, layout)
