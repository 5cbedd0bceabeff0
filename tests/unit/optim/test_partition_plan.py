"""The plan's invariants over the models that megachat trains, from 1 to 1024 ranks."""

import random
import subprocess
import sys
import time

import pytest

from megachat.optim.partition_plan import ALIGNMENT, NEWTON_SCHULZ_STEPS, Matrix, lightest_makespan, make_plan

MODELS = {"d4": (4, 256, 256), "d12": (12, 768, 768), "d24": (24, 1536, 1536), "7B": (32, 4096, 4096), "70B": (80, 8192, 1024)}
RANKS = (1, 2, 3, 4, 7, 8, 16, 31, 64, 127, 512, 1024)


def _model(depth, width, kv_width):
    found = []
    for layer in range(depth):
        shapes = {"q": (width, width), "k": (kv_width, width), "v": (kv_width, width), "o": (width, width)}
        shapes |= {"fc": (4 * width, width), "proj": (width, 4 * width)}
        if layer % 2 == (depth - 1) % 2:
            shapes["gate"] = (kv_width // 128, 12)
        found += [Matrix(f"{layer}.{name}", shape, layer) for name, shape in shapes.items()]
    return found


def _loads(plan):
    loads = [0] * plan.ranks
    for matrix, lead in zip(plan.matrices, plan.leads, strict=True):
        loads[lead] += matrix.flops
    return loads


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("model", MODELS)
def test_invariants(model, ranks):
    plan = make_plan(_model(*MODELS[model]), ranks)
    placed = [0] * len(plan.matrices)
    for bucket in plan.buckets:
        position = 0
        for offset, index in sorted(zip(bucket.offsets, bucket.matrices, strict=True)):
            pieces, matrix = plan.fragments[index], plan.matrices[index]
            assert offset >= position, "matrices of a bucket overlap"
            position = offset + matrix.elements
            assert pieces[0].start == 0 and pieces[-1].stop == matrix.elements
            assert all(left.stop == right.start and left.rank + 1 == right.rank for left, right in zip(pieces, pieces[1:], strict=False))
            for piece in pieces:  # the fragment's place in the shard is its place in the bucket
                assert piece.rank * bucket.shard + piece.offset == offset + piece.start
                assert 0 <= piece.offset and piece.offset + piece.stop - piece.start <= bucket.shard
            placed[index] += 1
        assert bucket.shard % ALIGNMENT == 0 and position <= ranks * bucket.shard
        members = sum(plan.matrices[index].elements for index in bucket.matrices)
        assert 0 <= ranks * bucket.shard - members < ALIGNMENT * ranks
        if bucket.kind == "aligned":
            assert all(len(plan.fragments[index]) == 1 for index in bucket.matrices)
    assert placed == [1] * len(plan.matrices)
    loads, costs = _loads(plan), [matrix.flops for matrix in plan.matrices]
    assert sum(loads) == sum(costs) and max(loads) <= 1.02 * lightest_makespan(costs, ranks)
    assert all(len(plan.leads) == len(plan.matrices) and 0 <= lead < ranks for lead in plan.leads)
    _check_bytes(plan)


def _check_bytes(plan):
    moved = sum(move.stop - move.start for moves in plan.moves for move in moves)
    assert moved <= plan.elements
    if plan.ranks > 64:
        return  # wire_bytes walks all moves for each rank
    sent = [plan.wire_bytes(rank, gradient_bytes=2, weight_bytes=2, direction_bytes=2) for rank in range(plan.ranks)]
    scales = sum(4 * plan.returned_scales(move) for moves in plan.moves for move in moves)
    assert sum(one["exchange"] for one in sent) == 2 * 2 * moved + scales
    assert all(one["reduce"] == one["gather"] == 2 * (plan.ranks - 1) * (plan.elements + plan.padding) // plan.ranks for one in sent)
    assert (plan.ranks > 1) or not any(sum(one.values()) for one in sent)


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


def test_leads_leave_home_when_that_lightens_the_heaviest_rank():
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
    others = [make_plan(matrices, 5), make_plan(matrices, 6, layers_per_bucket=5), make_plan(renamed, 6), make_plan(scaled, 6)]
    assert len({plan.digest, *(other.digest for other in others)}) == 5


def test_the_digest_is_the_same_in_another_process():
    code = (
        "from megachat.optim.partition_plan import *; import sys;"
        "print(make_plan({Matrix(str(i), (128 + 8 * i, 256), i) for i in range(9)}, 4).digest, 'torch' in sys.modules)"
    )
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout for _ in range(2)]
    assert runs[0] == runs[1] and len(runs[0].split()[0]) == 64
    assert runs[0].split()[1] == "False", "planning must not need torch"


@pytest.mark.parametrize("model", ["d24", "7B"])
def test_a_plan_for_1024_ranks_takes_less_than_a_second(model):
    matrices = _model(*MODELS[model])
    begin = time.process_time()
    make_plan(matrices, 1024).digest  # noqa: B018
    assert time.process_time() - begin < 1.0


def test_state_is_eight_bytes_an_element_divided_by_the_ranks():
    matrices = [matrix for matrix in _model(24, 1536, 1536) if not matrix.name.endswith("gate")]
    for ranks in (1, 2, 3, 4, 8, 16, 64):
        plan = make_plan(matrices, ranks)
        assert plan.padding == 0
        held = [plan.state_bytes(rank) for rank in range(ranks)]
        assert {one["master"] + one["momentum"] for one in held} == {8 * plan.elements // ranks}
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


@pytest.mark.parametrize("matrices, ranks, layers", [([Matrix("a", (2, 2), 0)] * 2, 1, None), ([], 0, None), ([], 1, 0)])
def test_mistakes_are_refused(matrices, ranks, layers):
    with pytest.raises(ValueError):
        make_plan(matrices, ranks, layers_per_bucket=layers)
