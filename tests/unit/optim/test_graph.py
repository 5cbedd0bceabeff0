"""Muon's update as a CUDA graph, emulated on a CPU: a replay repeats the recorded operations on the recorded memory.
tests/ranks/test_no_sync.py does so with the whole update.
"""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megachat.errors import UserError
from megachat.kernels.choice import choose_kernels
from megachat.optim.graph import EAGER_CALLS, StepGraph, UpdateGraph
from megachat.optim.muon import Functions, momentum_update
from megachat.parallel.mesh import Axis
from megachat.planning.plan import resolve_plan
from tests.training import small_config
from tests.unit.optim.test_partition import ALONE, MATRICES, _backward, _build

STEPS = 7


class FakeCuda:
    """torch.cuda as far as StepGraph uses it. The first replay is what the recording has already done."""

    def __init__(self):
        self.captures = self.replays = 0

    def CUDAGraph(self):
        return Recording(self)

    @contextmanager
    def graph(self, graph, capture_error_mode):
        assert capture_error_mode == "thread_local"
        self.captures += 1
        with graph:
            yield


class Recording(TorchDispatchMode):
    def __init__(self, cuda):
        super().__init__()
        self.cuda, self.operations, self.done = cuda, [], True

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.operations.append((function, args, kwargs or {}, out))
        return out

    def replay(self):
        self.cuda.replays += 1
        if self.done:
            self.done = False
            return
        for function, args, kwargs, recorded in self.operations:
            new = function(*args, **kwargs)
            for old, one in zip(tree_leaves(recorded), tree_leaves(new), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != one.data_ptr():
                    old.copy_(one)  # in CUDA the kernel itself writes there


def trained(compute, cuda=None, functions=None):
    """Weights, momentum and second moments after steps whose gradients, rates, momentum and scale all change."""
    graph, gradient_scale = StepGraph(cuda), torch.ones(())
    parameters, partition = _build(compute, functions=functions)
    for step in range(STEPS):
        _backward(parameters, 1.0 + step)
        partition.set_hyper(0.02 / (1 + step), 0.1 * step, 0.8 + 0.02 * step)
        partition.start_reduce()
        partition.wait_for_reduce()
        if step == 4:
            partition.discard_gradients()
            continue
        if cuda is None:
            partition.step(torch.tensor(0.5**step) if step % 2 else 0.5**step)
            continue
        partition.begin_update()
        gradient_scale.fill_(0.5**step)
        graph.run(lambda: partition.update(gradient_scale))
        partition.end_update()
    assert partition.matrices_updated == len(MATRICES)
    partition.wait_for_gather()
    state = [view for shard in partition.state_shards() for _, _, view in shard.rectangles]
    return [*(parameter.detach() for parameter in parameters.values()), *state]


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_a_replayed_update_is_equal_to_the_bit(compute):
    cuda = FakeCuda()
    plain, replayed = trained(compute), trained(compute, cuda)
    assert (cuda.captures, cuda.replays) == (1, STEPS - 1 - EAGER_CALLS)
    assert len(plain) == 4 * len(MATRICES) and all(map(torch.equal, plain, replayed))


def test_the_emulation_finds_a_number_that_is_not_in_a_tensor():
    def frozen(momentum, gradient, factor):
        return momentum_update(momentum, gradient, torch.tensor(float(factor)))

    broken = Functions(momentum_update=frozen)
    assert all(map(torch.equal, trained(torch.float32), trained(torch.float32, functions=broken)))
    assert not all(map(torch.equal, trained(torch.float32), trained(torch.float32, FakeCuda(), broken)))


def test_what_cannot_be_captured_is_refused():
    graph = small_config(precision={"optimizer_graph": True})
    with pytest.raises(UserError, match="the 2 data x tensor ranks of a pipeline stage exchange Muon's updates"):
        resolve_plan(graph, 2, 97)
    pipeline = small_config(precision={"optimizer_graph": True}, parallel={"pipeline": 2})
    with pytest.raises(UserError, match="a CPU has no CUDA graphs: set precision.optimizer_graph=false"):
        choose_kernels(pipeline, resolve_plan(pipeline, 2, 97), torch.device("cpu"))
    two = ALONE.__class__(**vars(ALONE) | {"stage": Axis("stage", 2, 0, None, (0, 1))})
    with pytest.raises(ValueError, match="2 ranks of a stage cannot be captured"):
        UpdateGraph(None, SimpleNamespace(mesh=two))
