"""The plan's invariants over the models that megachat trains, from 1 to 1024 data ranks and 1 to 8 tensor ranks.

Seen to fail with: owners on the first tensor rank only, fragments in another order, a digest without the cuts, scales of whole columns sent to
each shard, the reduction counted over the grid.
"""

import random
import subprocess
import sys

import pytest

from megachat.optim.buckets import ALIGNMENT
from megachat.optim.matrix import NEWTON_SCHULZ_STEPS, Matrix
from megachat.optim.owners import lightest_makespan
from megachat.optim.partition_plan import make_plan
from tests.limits import calls_of

MODELS = {
    "d4": (4, 256, 256),
    "d12": (12, 768, 768),
    "d24": (24, 1536, 1536),
    "d32": (32, 2048, 2048),
    "7B": (32, 4096, 4096),
    "70B": (80, 8192, 1024),
}
RANKS = (1, 2, 3, 4, 7, 8, 16, 31, 64, 127, 512, 1024)
TENSOR = (1, 2, 4, 8)
GOLDEN = {  # digests of the plans before there was a tensor axis: (model, ranks, layers_per_bucket)
    ("d4", 2, None): "3b4ff1ec3566ec1556c9d10759b956d74295d0a7fe630e184096e0f1f54ca7d0",
    ("d12", 8, None): "2d7a8490b4b3b366ca0470315d41d6505a986d555473f479a8fea1c0ff16a524",
    ("d24", 64, None): "1bb648c01352a2f0c66ebb34913ecfc087390f98f1ab091d3857dc21d803451c",
    ("d32", 8, 3): "9b50d31c8ffd6428a5318eed2e30e493e38af2bad2cc423b4b73ae56ac5ad12b",
    ("7B", 1024, None): "54bf43b8f1ef4f5ea36eaf3b4b8f6ddfb755a8b8c5b23f305b129c42fa566b1a",
}


def _model(depth, width, kv_width, gates=None):
    found = []
    for layer in range(depth):
        shapes = {"q": (width, width), "k": (kv_width, width), "v": (kv_width, width), "o": (width, width)}
        shapes |= {"fc": (4 * width, width), "proj": (width, 4 * width)}
        if layer % 2 == (depth - 1) % 2:
            shapes["gate"] = (gates or kv_width // 128, 12)
        found += [
            Matrix(f"{layer}.{name}", shape, layer, 1.0, "row" if name in ("o", "proj") else "column")
            for name, shape in shapes.items()
        ]
    return found


def _loads(plan):
    loads = [0] * plan.grid_size
    for matrix, owner in zip(plan.matrices, plan.owners, strict=True):
        loads[owner] += matrix.flops
    return loads


@pytest.mark.parametrize("key", GOLDEN, ids=str)
def test_without_a_tensor_axis_plans_are_what_they_were(key):
    model, ranks, layers = key
    assert make_plan(_model(*MODELS[model]), ranks, layers_per_bucket=layers).digest == GOLDEN[key]


@pytest.mark.parametrize("tensor", TENSOR)
@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("model", MODELS)
def test_invariants(model, ranks, tensor):
    plan = make_plan(_model(*MODELS[model], gates=8), ranks, tensor=tensor)
    placed = [0] * len(plan.matrices)
    for bucket in plan.buckets:
        position = 0
        for offset, index in sorted(zip(bucket.offsets, bucket.matrices, strict=True)):
            pieces, elements = plan.pieces[index], plan.matrices[index].elements // tensor
            assert offset >= position, "matrices of a bucket overlap"
            position = offset + elements
            assert pieces[0].start == 0 and pieces[-1].stop == elements
            assert all(
                left.stop == right.start and left.rank + 1 == right.rank
                for left, right in zip(pieces, pieces[1:], strict=False)
            )
            for piece in pieces:  # the fragment's place in the shard is its place in the bucket
                assert piece.rank * bucket.shard + piece.offset == offset + piece.start
                assert 0 <= piece.offset and piece.offset + piece.stop - piece.start <= bucket.shard
            placed[index] += 1
        assert bucket.shard % ALIGNMENT == 0 and position <= ranks * bucket.shard
        members = sum(plan.matrices[index].elements for index in bucket.matrices) // tensor
        assert 0 <= ranks * bucket.shard - members < ALIGNMENT * ranks
        if bucket.kind == "aligned":
            assert all(len(plan.pieces[index]) == 1 for index in bucket.matrices)
    assert placed == [1] * len(plan.matrices)
    loads, costs = _loads(plan), [matrix.flops for matrix in plan.matrices]
    assert sum(loads) == sum(costs) and max(loads) <= 1.02 * lightest_makespan(costs, plan.grid_size)
    assert len(plan.owners) == len(plan.matrices) and all(0 <= owner < plan.grid_size for owner in plan.owners)
    if plan.grid_size <= 256:
        _check_fragments(plan)
        _check_bytes(plan)


def _check_fragments(plan):
    for matrix, pieces, fragments in zip(plan.matrices, plan.pieces, plan.fragments, strict=True):
        for rank in range(plan.tensor):  # every tensor rank has the whole of its shard, held like everyone's
            own = [fragment for fragment in fragments if fragment.rank % plan.tensor == rank]
            assert [(f.rank // plan.tensor, f.start, f.stop, f.offset) for f in own] == [
                (p.rank, p.start, p.stop, p.offset) for p in pieces
            ]
        assert sum(fragment.stop - fragment.start for fragment in fragments) == matrix.elements


def _check_bytes(plan):
    moves = [move for moves in plan.moves for move in moves]
    moved = sum(move.stop - move.start for move in moves)
    assert moved <= plan.elements and plan.moved <= moved <= plan.moved + sum(
        m.elements for m in plan.matrices if m.elements < 16384
    )
    assert all(move.holder != move.owner == plan.owners[move.matrix] for move in moves)
    sent = [
        plan.wire_bytes(place, gradient_bytes=2, weight_bytes=2, direction_bytes=2) for place in range(plan.grid_size)
    ]
    scales = sum(4 * plan.returned_scales(move) for move in moves)
    assert sum(one["exchange"] for one in sent) == 2 * 2 * moved + scales
    assert all(
        one["reduce"] == one["gather"] == 2 * (plan.ranks - 1) * (plan.elements + plan.padding) // plan.grid_size
        for one in sent
    )
    assert (plan.grid_size > 1) or not any(sum(one.values()) for one in sent)
    if plan.ranks > 1:
        bound = 2 * 2 * plan.elements * (plan.ranks - 1) / plan.ranks / plan.tensor
        mean = (sum(sum(one.values()) for one in sent) - scales) / plan.grid_size
        padding = 2 * 2 * plan.padding * (plan.ranks - 1) / plan.grid_size
        assert bound + padding <= mean <= bound * (1 + 1 / (plan.ranks - 1)) + padding


def test_a_matrix_goes_to_one_owner_that_may_be_anywhere_in_the_grid():
    plan = make_plan(_model(12, 768, 768, gates=8), 2, tensor=4)
    assert set(plan.owners) == set(range(8)) and max(_loads(plan)) <= 1.001 * min(_loads(plan))
    large = [index for index, matrix in enumerate(plan.matrices) if matrix.elements > 16384]
    assert all(
        sum(fragment.rank == plan.owners[index] for fragment in plan.fragments[index]) == 1 for index in large
    ), "the owner holds a shard"
    assert not plan.crosses and plan.moved == sum(plan.matrices[index].elements for index in large) * 3 // 4


def test_scales_that_go_back_are_those_of_the_local_shard():
    matrices = [
        Matrix("tall", (512, 128), 0, 1.0, "row"),
        Matrix("wide", (128, 512), 0, 1.0, "row"),
        Matrix("column", (512, 128), 0, 1.0, "column"),
    ]
    plan = make_plan(matrices, 1, tensor=4)
    returned = {plan.matrices[move.matrix].name: plan.returned_scales(move) for moves in plan.moves for move in moves}
    assert returned == {"tall": 1 + 512, "wide": 1 + 128, "column": 1 + 128}


@pytest.mark.parametrize(
    "matrix, message",
    [
        (Matrix("a", (6, 8), 0), "a is not cut by the tensor axis"),
        (Matrix("a", (6, 8), 0, 1.0, "column"), "column cut does not divide into 4"),
        (Matrix("a", (8, 6), 0, 1.0, "row"), "row cut does not divide into 4"),
    ],
)
def test_a_cut_that_does_not_divide_is_refused(matrix, message):
    with pytest.raises(ValueError, match=message):
        make_plan([matrix], 2, tensor=4)


@pytest.mark.parametrize("depth", [4, 8, 12, 16, 20, 24, 32])
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_no_large_matrix_is_cut_or_moved_on_one_node(depth, ranks):
    plan = make_plan(_model(depth, 64 * depth, 64 * depth), ranks)
    assert plan.moved == 0
    loads = _loads(plan)
    assert max(loads) <= 1.001 * sum(loads) / ranks


def test_aligned_matrices_stay_at_home():
    plan = make_plan(_model(24, 1536, 1536), 8, layers_per_bucket=4)
    kinds = [bucket.kind for bucket in plan.buckets]
    assert kinds == ["aligned"] * 6 + ["tiny"]
    assert [len(moves) for moves in plan.moves[:-1]] == [0] * 6


def test_owners_leave_home_when_that_lightens_the_heaviest_rank():
    # one class divides evenly and is pinned; the other's single big matrix then has to share a rank with it
    matrices = [Matrix(f"a{place}", (256, 256), 0) for place in range(4)] + [Matrix("b", (512, 512), 0)]
    plan = make_plan(matrices, 2, layers_per_bucket=1)
    assert max(_loads(plan)) == lightest_makespan([matrix.flops for matrix in matrices], 2)


def test_backward_order_and_tiny_matrices_last():
    plan = make_plan(_model(6, 384, 384), 2, layers_per_bucket=2)
    first_layers = [min(plan.matrices[index].layer for index in bucket.matrices) for bucket in plan.buckets]
    assert first_layers == [4, 2, 0, 1]
    assert [bucket.kind for bucket in plan.buckets] == ["aligned", "aligned", "aligned", "tiny"]


def test_the_order_given_does_not_matter_but_everything_else_does():
    matrices = _model(6, 384, 128)
    shuffled = random.Random(0).sample(matrices, len(matrices))
    plan = make_plan(matrices, 6)
    assert make_plan(shuffled, 6) == plan and make_plan(shuffled, 6).digest == plan.digest
    renamed = [Matrix("other", *(getattr(matrices[0], key) for key in ("shape", "layer")))] + matrices[1:]
    scaled = [Matrix(matrices[0].name, matrices[0].shape, 0, 2.0)] + matrices[1:]
    others = [
        make_plan(matrices, 5),
        make_plan(matrices, 6, layers_per_bucket=5),
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
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    ]
    assert runs[0] == runs[1] and len(runs[0].split()[0]) == 64
    assert runs[0].split()[1] == "False", "planning must not need torch"


@pytest.mark.parametrize("model", ["d24", "7B"])
@pytest.mark.parametrize("tensor", [1, 8])
def test_a_plan_for_1024_data_ranks_takes_few_calls(model, tensor):
    """A million calls take about a second; less than half of that is needed."""
    matrices = _model(*MODELS[model], gates=8)
    assert calls_of(lambda: make_plan(matrices, 1024, tensor=tensor).digest) < 1_000_000


def test_state_is_eight_bytes_an_element_divided_by_the_places():
    matrices = [matrix for matrix in _model(24, 1536, 1536) if not matrix.name.endswith("gate")]
    for ranks, tensor in ((1, 1), (2, 1), (3, 1), (4, 1), (8, 1), (16, 1), (64, 1), (1, 8), (8, 4), (3, 2)):
        plan = make_plan(matrices, ranks, tensor=tensor)
        assert plan.padding == 0
        held = [plan.state_bytes(place) for place in range(plan.grid_size)]
        assert {one["master"] + one["momentum"] for one in held} == {8 * plan.elements // plan.grid_size}
        assert sum(one["second_moment"] for one in held) == 4 * sum(max(matrix.shape) for matrix in matrices)


def test_work_adds_up():
    plan = make_plan(_model(12, 768, 768), 8)
    assert [plan.newton_schulz_flops(rank) for rank in range(8)] == _loads(plan)
    assert Matrix("", (768, 3072), 0).flops == Matrix("", (3072, 768), 0).flops == NEWTON_SCHULZ_STEPS * 18 * 768**3


def test_the_steps_counted_are_the_steps_of_the_kernel():
    from megachat.kernels.polar import COEFFICIENTS

    assert len(COEFFICIENTS) == NEWTON_SCHULZ_STEPS


def test_no_matrices_is_a_plan_too():
    plan = make_plan([], 4)
    assert plan.buckets == () and plan.elements == plan.padding == 0


@pytest.mark.parametrize(
    "matrices, ranks, tensor, layers",
    [([Matrix("a", (2, 2), 0)] * 2, 1, 1, None), ([], 0, 1, None), ([], 1, 0, None), ([], 1, 1, 0)],
)
def test_mistakes_are_refused(matrices, ranks, tensor, layers):
    with pytest.raises(ValueError):
        make_plan(matrices, ranks, tensor=tensor, layers_per_bucket=layers)
