"""The plan's invariants over the models that megachat trains, from 1 to 1024 data ranks and 1 to 8 tensor ranks.

Seen to fail with: owners on the first tensor rank only, fragments in another order, a digest without the cuts, scales
of whole columns sent to each local matrix, the reduction counted over the grid.
"""

import random
import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megachat.device import dtype_name
from megachat.kernels.polar import COEFFICIENTS, polar_express
from megachat.optim.buckets import ALIGNMENT, TINY_ELEMENTS
from megachat.optim.matrix import NEWTON_SCHULZ_STEPS, Matrix, polar_products
from megachat.optim.owners import lightest_makespan
from megachat.optim.partition_plan import make_plan
from tests.limits import calls_of

MODELS = {  # depth, width, width of keys and values
    "d4": (4, 256, 256),
    "d12": (12, 768, 768),
    "d24": (24, 1536, 1536),
    "d32": (32, 2048, 2048),
    "7B": (32, 4096, 4096),
    "70B": (80, 8192, 1024),
}
DATA = (1, 2, 3, 4, 7, 8, 16, 31, 64, 127, 512, 1024)
TENSOR = (1, 2, 4, 8)
BFLOAT16_WIRES = {"gradient_bytes": 2, "weight_bytes": 2, "direction_bytes": 2}


def _model(depth, width, kv_width, gates=None):
    matrices = []
    for layer in range(depth):
        shapes = {"q": (width, width), "k": (kv_width, width), "v": (kv_width, width), "o": (width, width)}
        shapes |= {"fc": (4 * width, width), "proj": (width, 4 * width)}
        if layer % 2 == (depth - 1) % 2:
            shapes["gate"] = (gates or kv_width // 128, 12)
        matrices += [
            Matrix(f"{layer}.{name}", shape, layer, 1.0, "row" if name in ("o", "proj") else "column")
            for name, shape in shapes.items()
        ]
    return matrices


def _large(plan):
    return [index for index, matrix in enumerate(plan.matrices) if matrix.elements >= TINY_ELEMENTS]


def _moved(plan, indices):
    """Elements that the owners of these matrices receive from other ranks."""
    transfers = [transfer for bucket in plan.buckets for transfer in plan.transfers(bucket)]
    return sum(fragment.size for index, _, fragment in transfers if index in set(indices))


@pytest.mark.parametrize("tensor", TENSOR)
@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("model", MODELS)
def test_invariants(model, data, tensor):
    plan = make_plan(_model(*MODELS[model], gates=8), data, tensor=tensor)
    buckets_of = [0] * len(plan.matrices)
    for bucket in plan.buckets:
        position = 0
        for offset, index in sorted(zip(bucket.offsets, bucket.matrices, strict=True)):
            fragments, elements = plan.fragments[index], plan.matrices[index].elements // tensor
            assert offset >= position, "matrices of a bucket overlap"
            position = offset + elements
            assert fragments[0].start == 0 and fragments[-1].stop == elements
            assert all(
                left.stop == right.start and left.rank + 1 == right.rank
                for left, right in zip(fragments, fragments[1:], strict=False)
            )
            for fragment in fragments:  # shards are consecutive ranges of the bucket
                assert fragment.rank * bucket.shard_size + fragment.offset == offset + fragment.start
                assert 0 <= fragment.offset and fragment.offset + fragment.size <= bucket.shard_size
            buckets_of[index] += 1
        assert bucket.shard_size % ALIGNMENT == 0 and position <= data * bucket.shard_size
        members = sum(plan.matrices[index].elements for index in bucket.matrices) // tensor
        assert 0 <= data * bucket.shard_size - members < ALIGNMENT * data
        if bucket.kind == "aligned":
            assert all(len(plan.fragments[index]) == 1 for index in bucket.matrices)
    assert buckets_of == [1] * len(plan.matrices)
    loads, costs = plan.flops(), [matrix.flops for matrix in plan.matrices]
    assert sum(loads) == sum(costs) and max(loads) <= 1.02 * lightest_makespan(costs, plan.grid_size)
    assert len(plan.owners) == len(plan.matrices) and all(0 <= owner < plan.grid_size for owner in plan.owners)
    if plan.grid_size <= 256:
        _check_stored(plan)
        _check_bytes(plan)


def _check_stored(plan):
    for index, matrix in enumerate(plan.matrices):
        stored = plan.stored(index)
        for rank in range(plan.tensor):  # every tensor rank stores its whole local matrix, all in the same way
            fragments = [(at // plan.tensor, fragment) for at, fragment in stored if at % plan.tensor == rank]
            assert fragments == [(fragment.rank, fragment) for fragment in plan.fragments[index]]
        assert sum(fragment.size for _, fragment in stored) == matrix.elements


def _check_bytes(plan):
    transfers = [transfer for bucket in plan.buckets for transfer in plan.transfers(bucket)]
    moved = sum(fragment.size for _, _, fragment in transfers)
    assert moved <= plan.elements and all(rank != plan.owners[index] for index, rank, _ in transfers)
    sent = plan.wire_bytes(**BFLOAT16_WIRES)
    scales = sum(4 * plan.returned_scales(index, fragment) for index, _, fragment in transfers)
    assert sum(one["exchange"] for one in sent) == 2 * 2 * moved + scales
    assert all(
        one["reduce"] == one["gather"] == 2 * (plan.data - 1) * (plan.elements + plan.padding) // plan.grid_size
        for one in sent
    )
    assert (plan.grid_size > 1) or not any(sum(one.values()) for one in sent)
    if plan.data > 1:
        bound = 2 * 2 * plan.elements * (plan.data - 1) / plan.data / plan.tensor
        mean = (sum(sum(one.values()) for one in sent) - scales) / plan.grid_size
        padding = 2 * 2 * plan.padding * (plan.data - 1) / plan.grid_size
        assert bound + padding <= mean <= bound * (1 + 1 / (plan.data - 1)) + padding


def test_a_matrix_has_one_owner_anywhere_in_the_grid():
    plan = make_plan(_model(12, 768, 768, gates=8), 2, tensor=4)
    assert set(plan.owners) == set(range(8)) and max(plan.flops()) <= 1.001 * min(plan.flops())
    large = _large(plan)
    for index in large:
        assert sum(rank == plan.owners[index] for rank, _ in plan.stored(index)) == 1, "the owner stores a fragment"
        data_ranks = {rank // plan.tensor for rank, _ in plan.stored(index)}
        assert data_ranks == {plan.owners[index] // plan.tensor}, "fragments come from the owner's data rank only"
    assert not plan.crosses_data_ranks
    assert _moved(plan, large) == sum(plan.matrices[index].elements for index in large) * 3 // 4


def test_returned_scales_are_those_of_the_local_matrix():
    matrices = [
        Matrix("tall", (512, 128), 0, 1.0, "row"),
        Matrix("wide", (128, 512), 0, 1.0, "row"),
        Matrix("column", (512, 128), 0, 1.0, "column"),
    ]
    plan = make_plan(matrices, 1, tensor=4)
    returned = {
        plan.matrices[index].name: plan.returned_scales(index, fragment)
        for bucket in plan.buckets
        for index, _, fragment in plan.transfers(bucket)
    }
    assert returned == {"tall": 1 + 512, "wide": 1 + 128, "column": 1 + 128}


@pytest.mark.parametrize(
    "matrix, message",
    [
        (Matrix("a", (6, 8), 0), "a is not cut by the tensor axis.* 4 "),
        (Matrix("a", (6, 8), 0, 1.0, "column"), r"a .*\(6, 8\).*column.* 4 "),
        (Matrix("a", (8, 6), 0, 1.0, "row"), r"a .*\(8, 6\).*row.* 4 "),
    ],
)
def test_a_cut_that_does_not_divide_evenly_is_refused(matrix, message):
    with pytest.raises(ValueError, match=message):
        make_plan([matrix], 2, tensor=4)


@pytest.mark.parametrize("depth", [4, 8, 12, 16, 20, 24, 32])
@pytest.mark.parametrize("data", [1, 2, 4, 8])
def test_no_large_matrix_is_cut_or_moved_on_one_node(depth, data):
    plan = make_plan(_model(depth, 64 * depth, 64 * depth), data)
    assert _moved(plan, _large(plan)) == 0
    assert max(plan.flops()) <= 1.001 * sum(plan.flops()) / data


def test_aligned_matrices_stay_on_their_data_rank():
    plan = make_plan(_model(24, 1536, 1536), 8, blocks_per_bucket=4)
    assert [bucket.kind for bucket in plan.buckets] == ["aligned"] * 6 + ["tiny"]
    assert not any(plan.transfers(bucket) for bucket in plan.buckets[:-1])


def test_aligned_matrices_move_if_that_relieves_the_busiest_rank():
    # the four small matrices divide evenly and are aligned; the big one then has to share a rank with two of them
    matrices = [Matrix(f"a{number}", (256, 256), 0) for number in range(4)] + [Matrix("b", (512, 512), 0)]
    plan = make_plan(matrices, 2, blocks_per_bucket=1)
    assert max(plan.flops()) == lightest_makespan([matrix.flops for matrix in matrices], 2)


def test_buckets_follow_backward_and_tiny_matrices_are_last():
    plan = make_plan(_model(6, 384, 384), 2, blocks_per_bucket=2)
    first_blocks = [min(plan.matrices[index].block for index in bucket.matrices) for bucket in plan.buckets]
    assert first_blocks == [4, 2, 0, 1]
    assert [bucket.kind for bucket in plan.buckets] == ["aligned", "aligned", "aligned", "tiny"]


def test_the_order_given_does_not_matter_but_everything_else_does():
    matrices = _model(6, 384, 128)
    shuffled = random.Random(0).sample(matrices, len(matrices))
    plan = make_plan(matrices, 6)
    assert make_plan(shuffled, 6) == plan and make_plan(shuffled, 6).digest == plan.digest
    renamed = [Matrix("other", matrices[0].shape, matrices[0].block)] + matrices[1:]
    scaled = [Matrix(matrices[0].name, matrices[0].shape, 0, 2.0)] + matrices[1:]
    others = [
        make_plan(matrices, 5),
        make_plan(matrices, 6, blocks_per_bucket=5),
        make_plan(renamed, 6),
        make_plan(scaled, 6),
    ]
    cut = [matrix for matrix in matrices if not matrix.name.endswith("gate")]
    recut = [Matrix("0.q", cut[0].shape, 0, 1.0, "row")] + cut[1:]
    others += [make_plan(cut, 6, tensor=2), make_plan(recut, 6, tensor=2), make_plan(cut, 3, tensor=4)]
    assert cut[0].name == "0.q" and len({plan.digest, *(other.digest for other in others)}) == 8


def test_the_digest_is_the_same_in_another_process():
    code = (
        "from megachat.optim.partition_plan import Matrix, make_plan; import sys;"
        "print(make_plan({Matrix(str(i), (128 + 8 * i, 256), i) for i in range(9)}, 4).digest, 'torch' in sys.modules)"
    )
    command = [sys.executable, "-c", code]
    first, second = (subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(2))
    assert first == second and len(first.split()[0]) == 64
    assert first.split()[1] == "False", "planning must not need torch"


@pytest.mark.parametrize("model", ["d24", "7B"])
@pytest.mark.parametrize("tensor", [1, 8])
def test_a_plan_for_1024_data_ranks_takes_few_calls(model, tensor):
    """A million calls take about a second; less than half of that is needed."""
    matrices = _model(*MODELS[model], gates=8)
    assert calls_of(lambda: make_plan(matrices, 1024, tensor=tensor).digest) < 1_000_000


def test_state_is_eight_bytes_per_element_divided_by_the_ranks_of_the_grid():
    matrices = [matrix for matrix in _model(24, 1536, 1536) if not matrix.name.endswith("gate")]
    for data, tensor in ((1, 1), (2, 1), (3, 1), (4, 1), (8, 1), (16, 1), (64, 1), (1, 8), (8, 4), (3, 2)):
        plan = make_plan(matrices, data, tensor=tensor)
        assert plan.padding == 0
        state = [plan.state_bytes(rank) for rank in range(plan.grid_size)]
        assert {one["master"] + one["momentum"] for one in state} == {8 * plan.elements // plan.grid_size}
        assert sum(one["second_moment"] for one in state) == 4 * sum(max(matrix.shape) for matrix in matrices)


def test_flops_are_those_of_the_kernel_and_the_same_for_tall_and_wide():
    assert len(COEFFICIENTS) == NEWTON_SCHULZ_STEPS
    for dtype in (torch.bfloat16, torch.float32):
        for shape in ((48, 48), (48, 95), (96, 48), (48, 160)):
            with FlopCounterMode(display=False) as counter:
                polar_express(torch.ones(shape, dtype=dtype))
            products = polar_products(*shape, dtype_name(dtype))
            assert counter.get_total_flops() == sum(2 * m * n * k * count for (m, n, k), count in products)
            assert dtype == torch.float32 or counter.get_total_flops() == Matrix("", shape, 0).flops
    assert Matrix("", (768, 3072), 0).flops == Matrix("", (3072, 768), 0).flops == NEWTON_SCHULZ_STEPS * 18 * 768**3


def test_a_plan_without_matrices():
    plan = make_plan([], 4)
    assert plan.buckets == () and plan.shard_elements == 0


@pytest.mark.parametrize(
    "matrices, data, tensor, blocks, message",
    [
        ([Matrix("a", (2, 2), 0)] * 2, 1, 1, None, "same name"),
        ([], 0, 1, None, "data=0.*at least 1"),
        ([], 1, 0, None, "tensor=0.*at least 1"),
        ([], 1, 1, 0, "blocks_per_bucket=0.*at least 1"),
    ],
)
def test_mistakes_are_refused(matrices, data, tensor, blocks, message):
    with pytest.raises(ValueError, match=message):
        make_plan(matrices, data, tensor=tensor, blocks_per_bucket=blocks)
