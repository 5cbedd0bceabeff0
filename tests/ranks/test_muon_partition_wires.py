"""What the Muon partition sends, when and in which order, observed at torch.distributed's functions; and which rank
computes what.

Seen to fail with: hooks that start whatever is complete, that stay asynchronous in the next step, or that count
gradients of earlier micro-batches; three reduces in flight; a step that writes while gathers read; wait_for_block()
that waits for all, state_shards() that waits for none; discard_gradients() that leaves started reduces alone; a plan
that counts the reduce over the grid instead of the data axis.
"""

import pytest
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

from megachat.device import dtype_name
from megachat.optim.matrix import polar_products
from tests.harness import run_ranks
from tests.muon import (
    BF16,
    FP32,
    LR,
    MOMENTA,
    WEIGHT_DECAY,
    backward,
    build,
    on_cpu,
    small_matrices,
    take_step,
    weight_dtype,
)

LAYOUTS = ((1, 1), (2, 1), (3, 1), (4, 1), (1, 2), (1, 4), (2, 2))  # data, tensor
COLLECTIVES = ("all_to_all_single", "all_gather_into_tensor", "reduce_scatter_tensor", "all_reduce")


class _Recorder:
    """Wraps torch.distributed's functions in this process and records in `events` what starts and what is waited for.

    An event: ("start" or "wait", number of the collective, axis, function, dtype, bytes sent to other ranks).
    """

    def __init__(self, mesh):
        self.axes = {id(axis.group): axis for axis in (mesh.data, mesh.tensor, mesh.stage, mesh.world)}
        self.events, self.started = [], 0
        for name in COLLECTIVES:
            setattr(dist, name, self._recorded(name, getattr(dist, name)))

    def _recorded(self, name, collective):
        def call(*args, group=None, async_op=False, **kwargs):
            axis = self.axes.get(id(group)) or self.axes[id(dist.group.WORLD)]
            self.started += 1
            event = self.started, axis.name, name, str(args[0].dtype), self._bytes(name, args, axis)
            self.events.append(("start", *event))
            work = collective(*args, group=group, async_op=async_op, **kwargs)
            return _RecordedWork(work, self, event) if async_op else work

        return call

    def _bytes(self, name, args, axis):
        if name == "all_reduce":
            return 0
        sent = args[1]
        if name == "all_to_all_single" and args[3] is not None:
            elements = sum(count for rank, count in enumerate(args[3]) if rank != axis.rank)
        elif name == "all_gather_into_tensor":
            elements = sent.numel() * (axis.size - 1)
        else:
            elements = sent.numel() // axis.size * (axis.size - 1)
        return elements * sent.element_size()

    def take(self, kind="start"):
        """Returns the events of a kind since the last call, without their kind, and forgets all."""
        events, self.events = self.events, []
        return [event[1:] for event in events if event[0] == kind]


class _RecordedWork:
    """A work handle whose wait is recorded."""

    def __init__(self, work, recorder, event):
        self._work, self._recorder, self._event = work, recorder, event

    def wait(self):
        self._recorder.events.append(("wait", *self._event))
        self._work.wait()


# ---- what the ranks run


def _flops_on(plan, rank, dtype):
    """Returns the FLOPs of the products for the matrices that a rank owns."""
    owned = [matrix for matrix, owner in zip(plan.matrices, plan.owners, strict=True) if owner == rank]
    products = [product for matrix in owned for product in polar_products(*matrix.shape, dtype_name(dtype))]
    return sum(2 * m * n * k * count for (m, n, k), count in products)


def _measured(layout, settings):
    """Takes one step per setting. Returns measured and planned bytes, FLOPs and number of exchanges, and the calls."""
    mesh, matrices = on_cpu(layout), small_matrices()
    recorder = _Recorder(mesh)
    answers = []
    for compute, wire, blocks_per_bucket, asynchronous in settings:
        parameters, partition = build(matrices, mesh, compute, wire, blocks_per_bucket)
        plan, rank = partition.plan, mesh.stage.rank
        recorder.take()
        before_last = partition.start_async_reduce if asynchronous else lambda: None
        backward(parameters, matrices, mesh, 0, before_last=before_last)
        partition.set_hyper(LR, WEIGHT_DECAY, MOMENTA[0])
        partition.start_reduce()
        partition.wait_for_reduce()
        reduces = recorder.take()
        with FlopCounterMode(display=False) as flops:
            partition.step(1.0)
        partition.wait_for_gather()
        others = recorder.take()
        sent = {
            "reduce": sum(call[-1] for call in reduces),
            "exchange": sum(call[-1] for call in others if call[2] == "all_to_all_single"),
            "gather": sum(call[-1] for call in others if call[2] == "all_gather_into_tensor"),
        }
        planned = plan.wire_bytes(
            gradient_bytes=wire.itemsize,
            weight_bytes=weight_dtype(compute).itemsize,
            direction_bytes=partition.direction_dtype.itemsize,
        )[rank]
        calls = [call[1:-1] for call in reduces + others]
        answers.append(
            {
                "bytes": (sent, planned),
                "flops": (flops.get_total_flops(), _flops_on(plan, rank, partition.direction_dtype)),
                "exchanges": (
                    sum(axis == "stage" for axis, *_ in calls),
                    2 * sum(bool(plan.transfers(bucket)) for bucket in plan.buckets),
                ),
                "calls": calls,
                "matrices": partition.matrices_updated,
            }
        )
    return answers


def _started_during_backward(layout, missing):
    """Takes step 0 (all gradients) or step 1 (one is missing). Returns the number of reduces that start in backward, of
    buckets, of reduces in flight at most, of buckets before the missing gradient's, and the calls."""
    mesh, matrices = on_cpu(layout), small_matrices()
    recorder = _Recorder(mesh)
    parameters, partition = build(matrices, mesh, BF16, blocks_per_bucket=1)
    recorder.take()
    backward(parameters, matrices, mesh, int(missing), 2, before_last=partition.start_async_reduce)
    early = len([event for event in recorder.events if event[0] == "start"])
    partition.start_reduce()
    partition.wait_for_reduce()
    in_flight = most = 0
    for kind, *_ in recorder.events:
        in_flight += 1 if kind == "start" else -1
        most = max(most, in_flight)
    names = [[partition.plan.matrices[index].name for index in bucket.matrices] for bucket in partition.plan.buckets]
    first = next(number for number, members in enumerate(names) if "1.odd" in members)
    return early, len(names), most, first, [call[1:] for call in recorder.take()]


def _started_by_micro_batch(layout):
    """Returns the number of reduces that start in each of three micro-batches, in two steps and after a discarded one,
    and the number of buckets."""
    mesh, matrices = on_cpu(layout), small_matrices()
    recorder = _Recorder(mesh)
    parameters, partition = build(matrices, mesh, BF16)
    counts = []
    for finish in (lambda: partition.step(1.0), partition.discard_gradients, lambda: None):
        recorder.take()
        for micro in range(3):
            if micro == 2:
                partition.start_async_reduce()
            backward(parameters, matrices, mesh, 0)
            counts.append(len(recorder.take()))
        partition.start_reduce()
        partition.wait_for_reduce()
        finish()
    return counts, len(partition.plan.buckets)


def _gathers_waited_for(layout, compute):
    """Takes two steps without wait_for_gather(). Returns the buckets whose gather each wait_for_block() waits for, the
    buckets with matrices of each block, the buckets that step() waits for, whether step() waits before anything else,
    how many gathers state_shards() waits for, and the number of buckets."""
    mesh, matrices = on_cpu(layout), small_matrices()
    recorder = _Recorder(mesh)
    parameters, partition = build(matrices, mesh, compute, blocks_per_bucket=1)
    plan = partition.plan
    take_step(parameters, partition, matrices, mesh, 0, wait=False)
    gathers = [number for number, _, name, *_ in recorder.take() if name == "all_gather_into_tensor"]
    order = sorted(reversed(range(len(plan.buckets))), key=lambda number: bool(plan.transfers(plan.buckets[number])))
    bucket_of = dict(zip(gathers, order, strict=True))  # buckets without exchange come first
    by_block = {}
    for block in (-1, 0, 1, 3):
        partition.wait_for_block(block)
        by_block[block] = [bucket_of[number] for number, *_ in recorder.take("wait")]
    buckets_of = {
        block: [n for n, b in enumerate(plan.buckets) if block in {plan.matrices[i].block for i in b.matrices}]
        for block in (0, 1, 2)
    }
    backward(parameters, matrices, mesh, 2, before_last=partition.start_async_reduce)
    partition.start_reduce()
    partition.wait_for_reduce()
    recorder.take()
    partition.step(1.0)
    waits_first = recorder.events[0][0] == "wait"
    by_step = [bucket_of[number] for number, *_ in recorder.take("wait") if number in bucket_of]
    partition.state_shards()
    return by_block, buckets_of, by_step, waits_first, len(recorder.take("wait")), len(plan.buckets)


def _discarded_before_start_reduce(layout):
    """Discards a step after the hooks of some ranks have started reduces, then takes a good one."""
    mesh, matrices = on_cpu(layout), small_matrices()
    parameters, partition = build(matrices, mesh, FP32, blocks_per_bucket=1)
    partition.start_async_reduce()
    if mesh.data.rank == 0:
        backward(parameters, matrices, mesh, 0)
    partition.discard_gradients()
    return take_step(parameters, partition, matrices, mesh, 0)


# ---- the tests


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bytes_work_and_order_are_those_of_the_plan(layout):
    settings = [
        (BF16, BF16, 1, True),
        (BF16, BF16, None, False),
        (BF16, FP32, 2, True),
        (FP32, BF16, 2, False),
        (FP32, FP32, 3, True),
    ]
    answers = run_ranks(_measured, layout[0] * layout[1], layout, settings)
    for setting, *by_rank in zip(settings, *answers, strict=True):
        for answer in by_rank:
            for key in ("bytes", "flops", "exchanges"):
                measured, planned = answer[key]
                assert measured == planned, (key, setting)
            assert answer["calls"] == by_rank[0]["calls"], setting  # on each axis and across axes
            # some matrices are cut in every layout, so more than one rank always exchanges
            assert bool(answer["exchanges"][0]) == bool(answer["calls"]) == (len(answers) > 1), setting
        assert sum(answer["matrices"] for answer in by_rank) == len(small_matrices())
        _check_bound(layout, setting, by_rank)


def _check_bound(layout, setting, answers):
    """Every scheme that updates each element once sends a minimum of bytes over the same wires. Checks that the mean of
    the grid exceeds it by a factor of at most 1 + 1 / (data ranks - 1)."""
    data, tensor = layout
    compute, wire = setting[:2]
    if data == 1 or wire != weight_dtype(compute):  # the directions have the dtype of the weights
        return
    elements = sum(matrix.elements for matrix in small_matrices())
    bound = (data - 1) / data * (wire.itemsize + weight_dtype(compute).itemsize) * elements / tensor
    mean = sum(sum(answer["bytes"][0].values()) for answer in answers) / len(answers)
    assert bound <= mean <= bound * (1 + 1 / (data - 1)), setting


@pytest.mark.parametrize("layout", [(2, 1), (4, 1), (2, 2)])
def test_hooks_start_reduces_in_the_order_of_the_plan_until_a_gradient_is_missing(layout):
    for missing in (False, True):
        answers = run_ranks(_started_during_backward, layout[0] * layout[1], layout, missing)
        for early, buckets, most, first, calls in answers:
            assert 0 < first < buckets - 1
            assert early == (first if missing else buckets)
            assert most == 2, "one is sent while the next is packed"
            assert calls == answers[0][4] and len(calls) == buckets


def test_only_the_last_micro_batch_starts_reduces():
    for counts, buckets in run_ranks(_started_by_micro_batch, 2, (2, 1)):
        assert counts == 3 * [0, 0, buckets]


@pytest.mark.parametrize("compute, layout", [(BF16, (2, 1)), (FP32, (2, 2))])
def test_gathers_are_waited_for_when_their_layer_is_read_or_written(compute, layout):
    answers = run_ranks(_gathers_waited_for, layout[0] * layout[1], layout, compute)
    for by_block, buckets_of, by_step, waits_first, by_state_shards, buckets in answers:
        assert by_block[-1] == by_block[3] == []
        assert sorted(by_block[0]) == buckets_of[0]
        assert sorted(by_block[1]) == [number for number in buckets_of[1] if number not in buckets_of[0]]
        assert by_step and waits_first
        assert sorted(by_step) == [number for number in buckets_of[2] if number not in buckets_of[0] + buckets_of[1]]
        assert by_state_shards == buckets, "state_shards() waits for the gathers in progress"


@pytest.mark.parametrize("layout", [(2, 1), (2, 2)])
def test_a_step_can_be_discarded_after_hooks_of_some_ranks_have_started_reduces(layout):
    squares = run_ranks(_discarded_before_start_reduce, layout[0] * layout[1], layout)
    assert len(set(squares)) == 1 and squares[0] > 0
