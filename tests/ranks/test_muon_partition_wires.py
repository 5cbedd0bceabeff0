"""What the Muon partition sends, when, and in which order, seen at torch.distributed's own functions; and who computes.

Seen to fail with: hooks that launch whatever is complete, that stay armed for the next step, or that count gradients of
earlier micro-batches; three reductions in flight; a step that writes while gathers read, wait_for_layer() that waits
for all, state_shards() that waits for none; discard_gradients() that leaves launched reductions alone; a plan that
counts the reduction over the grid instead of the data axis.
"""

import pytest
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

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
    """Wraps torch.distributed's functions in this process and notes in `events` what is begun and waited for.

    An event: ("begin" or "wait", number of the collective, axis, function, dtype, bytes sent to other ranks).
    """

    def __init__(self, mesh):
        self.axes = {id(axis.group): axis for axis in (mesh.data, mesh.tensor, mesh.stage, mesh.world)}
        self.events, self.begun = [], 0
        for name in COLLECTIVES:
            setattr(dist, name, self._wrapped(name, getattr(dist, name)))

    def _wrapped(self, name, inner):
        def call(*args, group=None, async_op=False, **kwargs):
            axis = self.axes.get(id(group)) or self.axes[id(dist.group.WORLD)]
            self.begun += 1
            event = self.begun, axis.name, name, str(args[0].dtype), self._bytes(name, args, axis)
            self.events.append(("begin", *event))
            work = inner(*args, group=group, async_op=async_op, **kwargs)
            return _Waited(work, self, event) if async_op else work

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

    def taken(self, kind="begin"):
        """The events of a kind since the last call, without their kind and number."""
        events, self.events = self.events, []
        return [event[2:] for event in events if event[0] == kind]


class _Waited:
    """A work whose wait is noted."""

    def __init__(self, work, recorder, event):
        self._work, self._recorder, self._event = work, recorder, event

    def wait(self):
        self._recorder.events.append(("wait", *self._event))
        self._work.wait()


# ---- what the ranks run


def _measured(layout, settings):
    """One step each: calls, bytes by phase and by the plan, FLOPs counted and planned."""
    mesh, matrices = on_cpu(layout), small_matrices()
    recorder = _Recorder(mesh)
    answers = []
    for compute, wire, layers_per_bucket, armed in settings:
        parameters, partition = build(matrices, mesh, compute, wire, layers_per_bucket)
        recorder.taken()
        backward(
            parameters,
            matrices,
            mesh,
            0,
            1,
            last=partition.start_async_reduce if armed else lambda: None,
            shuffled=True,
        )
        partition.set_hyper(LR, WEIGHT_DECAY, MOMENTA[0])
        partition.start_reduce()
        partition.wait_for_reduce()
        reducing = recorder.taken()
        with FlopCounterMode(display=False) as flops:
            partition.step(1.0)
        partition.wait_for_gather()
        stepping = recorder.taken()
        found = {
            "reduce": sum(call[-1] for call in reducing),
            "exchange": sum(call[-1] for call in stepping if call[1] == "all_to_all_single"),
            "gather": sum(call[-1] for call in stepping if call[1] == "all_gather_into_tensor"),
        }
        sizes = {
            "gradient_bytes": wire.itemsize,
            "weight_bytes": weight_dtype(compute).itemsize,
            "direction_bytes": partition.direction_dtype.itemsize,
        }
        planned = partition.plan.wire_bytes(mesh.stage.rank, **sizes)
        counts = (
            flops.get_total_flops(),
            partition.plan.newton_schulz_flops(mesh.stage.rank),
            partition.matrices_updated,
        )
        calls = [call[:-1] for call in reducing + stepping]
        exchanges = sum(axis == "stage" for axis, *_ in calls), 2 * sum(map(bool, partition.plan.moves))
        elements = partition.plan.elements
        answers.append((found, planned, counts, calls, exchanges, elements))
    return answers


def _launched_while_backward_ran(layout, missing):
    """Step 0 (every gradient there) or 1 (one is missing): reductions begun in backward, all of them, most of them in
    flight at a time, and how many come before the bucket of the missing gradient.
    """
    mesh, matrices = on_cpu(layout), small_matrices()
    recorder = _Recorder(mesh)
    parameters, partition = build(matrices, mesh, BF16, layers_per_bucket=1)
    recorder.taken()
    step = int(missing)
    backward(parameters, matrices, mesh, step, 2, last=partition.start_async_reduce, shuffled=True)
    early = len([event for event in recorder.events if event[0] == "begin"])
    partition.start_reduce()
    partition.wait_for_reduce()
    flying = most = 0
    for kind, *_ in recorder.events:
        flying += 1 if kind == "begin" else -1
        most = max(most, flying)
    names = [[partition.plan.matrices[index].name for index in bucket.matrices] for bucket in partition.plan.buckets]
    first = next(number for number, members in enumerate(names) if "1.odd" in members)
    return early, len(names), most, first, recorder.taken()


def _armed_only_for_the_last(layout):
    """Reductions begun after each of three micro-batches, in two steps and in one after a dropped step."""
    mesh, matrices = on_cpu(layout), small_matrices()
    recorder = _Recorder(mesh)
    parameters, partition = build(matrices, mesh, BF16)
    counts = []
    for finish in (lambda: partition.step(1.0), partition.discard_gradients, lambda: None):
        recorder.taken()
        for micro in range(3):
            if micro == 2:
                partition.start_async_reduce()
            backward(parameters, matrices, mesh, 0, 1, shuffled=True)
            counts.append(len(recorder.taken()))
        partition.start_reduce()
        finish()
    return counts, len(partition.plan.buckets)


def _gathers_waited_for(layout, compute):
    """Two steps without wait(): gathers begun; which were waited for by wait_layer of each block, by wait, and before
    the second step wrote.
    """
    mesh, matrices = on_cpu(layout), small_matrices()
    recorder = _Recorder(mesh)
    parameters, partition = build(matrices, mesh, compute, layers_per_bucket=1)
    plan = partition.plan
    take_step(parameters, partition, matrices, mesh, 0, wait=False)
    begun = [event[1] for event in recorder.events if event[0] == "begin" and event[3] == "all_gather_into_tensor"]
    launched = sorted(
        reversed(range(len(plan.buckets))), key=lambda number: bool(plan.moves[number])
    )  # what needs no exchange is done first
    bucket_of = dict(zip(begun, launched, strict=True))
    recorder.taken()
    by_layer = {}
    for layer in (-1, 0, 1, 3):
        partition.wait_for_layer(layer)
        by_layer[layer] = [bucket_of[event[1]] for event in recorder.events if event[0] == "wait"]
        recorder.taken()
    holding = {
        layer: [n for n, b in enumerate(plan.buckets) if layer in {plan.matrices[i].layer for i in b.matrices}]
        for layer in (0, 1, 2)
    }
    backward(parameters, matrices, mesh, 2, 1, last=partition.start_async_reduce)
    partition.start_reduce()
    partition.wait_for_reduce()
    recorder.taken()
    partition.step(1.0)
    waited = [bucket_of[event[1]] for event in recorder.events if event[0] == "wait" and event[1] in bucket_of]
    before_writing = recorder.events and recorder.events[0][0] == "wait"
    recorder.taken()
    partition.state_shards()
    return by_layer, holding, waited, before_writing, len(recorder.taken("wait")), len(plan.buckets)


def _dropped_before_reduce(layout):
    """A step given up between backward and reduce(), after hooks of some ranks had launched reductions; then a good
    one.
    """
    mesh, matrices = on_cpu(layout), small_matrices()
    parameters, partition = build(matrices, mesh, FP32, layers_per_bucket=1)
    partition.start_async_reduce()
    if mesh.data.rank == 0:
        backward(parameters, matrices, mesh, 0, 1)
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
    for index, setting in enumerate(settings):
        for found, planned, (flops, planned_flops, _), calls, (exchanges, planned_exchanges), _ in (
            answer[index] for answer in answers
        ):
            assert found == planned, setting
            assert flops == planned_flops, setting
            assert calls == answers[0][index][3], setting  # on every axis, and between axes too
            assert exchanges == planned_exchanges, setting
            assert bool(exchanges) == bool(calls) == (len(answers) > 1), (
                setting
            )  # some matrices are cut, so the exchange is tested
        assert sum(answer[index][2][2] for answer in answers) == len(small_matrices())
        _check_bound(layout, setting, [answer[index] for answer in answers])


def _check_bound(layout, setting, answers):
    """The grid's mean stays within 1/(data ranks - 1) of what any scheme must send that updates each element once, over
    the same wires.
    """
    data, tensor = layout
    if data == 1:
        return
    compute, wire = setting[:2]
    bound = (data - 1) / data * (wire.itemsize + weight_dtype(compute).itemsize) * answers[0][5] / tensor
    mean = sum(sum(found.values()) for found, *_ in answers) / len(answers)
    if wire == weight_dtype(compute):  # the directions have the dtype of the weights
        assert bound <= mean <= bound * (1 + 1 / (data - 1)), setting


@pytest.mark.parametrize("layout", [(2, 1), (4, 1), (2, 2)])
def test_armed_hooks_launch_in_the_order_of_the_plan_as_far_as_gradients_go(layout):
    for missing in (False, True):
        answers = run_ranks(_launched_while_backward_ran, layout[0] * layout[1], layout, missing)
        for early, buckets, most, first, calls in answers:
            assert 0 < first < buckets - 1
            assert early == (first if missing else buckets)
            assert most == 2, "one on the wire while the next is packed"
            assert calls == answers[0][4] and len(calls) == buckets


def test_only_the_armed_micro_batch_launches():
    for counts, buckets in run_ranks(_armed_only_for_the_last, 2, (2, 1)):
        assert counts == 3 * [0, 0, buckets]


@pytest.mark.parametrize("compute, layout", [(BF16, (2, 1)), (FP32, (2, 2))])
def test_gathers_go_on_until_their_layer_is_read_or_written(compute, layout):
    for by_layer, holding, waited, before_writing, at_the_end, buckets in run_ranks(
        _gathers_waited_for, layout[0] * layout[1], layout, compute
    ):
        assert by_layer[-1] == by_layer[3] == []
        assert sorted(by_layer[0]) == holding[0] and sorted(by_layer[1]) == [
            number for number in holding[1] if number not in holding[0]
        ]
        assert sorted(waited) == [number for number in holding[2] if number not in holding[0] + holding[1]] and waited
        assert before_writing
        assert at_the_end == buckets, "state_shards() waits for the gathers under way"


@pytest.mark.parametrize("layout", [(2, 1), (2, 2)])
def test_a_step_can_be_dropped_when_hooks_of_some_ranks_have_launched(layout):
    squares = run_ranks(_dropped_before_reduce, layout[0] * layout[1], layout)
    assert len(set(squares)) == 1 and squares[0] > 0
