"""Measures what a rank of a run on GPUs holds, on tensors without memory: live bytes, and the state of model and
optimizers by use. The kernels here keep what those of a GPU keep.
"""

import weakref
from collections.abc import Iterable

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from megachat.parallel.rectangles import MASTER
from megachat.train.build import TrainingModel


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages made inside the context: live `now`, `most` at a time, the `largest` tensor."""

    def __init__(self):
        super().__init__()
        self.now = self.most = self.largest = 0
        self._known: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func.is_view:  # makes no storage
            return result
        given = {tensor.untyped_storage()._cdata for tensor in filter(torch.is_tensor, tree_iter((args, kwargs)))}
        for tensor in filter(torch.is_tensor, tree_iter(result)):
            if tensor.untyped_storage()._cdata not in given:
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known and self._known[key]() is storage:
            return

        def gone(_):
            self.now -= size
            self._known.pop(key, None)

        self._known[key] = weakref.ref(storage, gone)
        self.now += size
        self.most, self.largest = max(self.most, self.now), max(self.largest, size)


class KeptByAttention(torch.autograd.Function):
    """Keeps what flash-attention keeps: queries, keys, values, result and float32 sums. Computes nothing."""

    @staticmethod
    def forward(ctx, q, k, v):
        result = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, result, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return result

    @staticmethod
    def backward(ctx, gradient):
        q, k, v, *_ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


class KeptByNorm(torch.autograd.Function):
    """Keeps what torch's fused norm keeps: its input and a float32 factor. Computes nothing."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, x.new_empty(x.shape[:-1], dtype=torch.float32), weight)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, gradient):
        *_, weight = ctx.saved_tensors
        return torch.empty_like(gradient), None if weight is None else torch.empty_like(weight)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
    """Stands for an attention kernel of a GPU."""
    return KeptByAttention.apply(q, k, v)


def rms_norm(x: torch.Tensor, shape: tuple[int, ...], weight: torch.Tensor | None = None, eps: float | None = None):
    """Stands for torch.nn.functional.rms_norm on a GPU."""
    return KeptByNorm.apply(x, weight)


def storages(tensors: Iterable[torch.Tensor]) -> dict[int, int]:
    """Returns the bytes of each storage that the tensors lie in, by its address."""
    return {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}


def state_bytes(training: TrainingModel) -> dict[str, int]:
    """Returns the bytes of a rank's weights, masters and moments."""
    muon = training.muon.state_tensors()  # with the padding of buckets
    masters, moments = muon[MASTER], muon["momentum"] + muon["second_moment"]
    for kind, _, _, rectangles in training.rows.state_shards() + training.engine.adamw.state_shards():
        (masters if kind == MASTER else moments).extend(tensor for *_, tensor in rectangles)
    weights = storages(training.layers.parameters())
    return {
        "weights": sum(weights.values()),
        "masters": sum(size for place, size in storages(masters).items() if place not in weights),
        "moments": sum(storages(moments).values()),
    }


def gradient_bytes(training: TrainingModel) -> int:
    """Returns the bytes of a rank's gradients after its backward passes, without those of rows of sparse tables."""
    gradients = training.muon.gradient_buffers() + [
        parameter.grad_accum for parameter in training.layers.parameters() if hasattr(parameter, "grad_accum")
    ]
    return sum(storages(tensor for tensor in gradients if tensor is not None).values())


class StepMemory(LiveBytes):
    """Measures in a training step what its rank holds. The context of the step; `bytes` is complete after it."""

    def __init__(self, training: TrainingModel):
        super().__init__()
        self.training, self.bytes = training, state_bytes(training)
        self._state = sum(self.bytes.values())

    def before_backward(self) -> None:
        """To be called before each backward pass. The first counts: then all micro-batches in flight are kept."""
        if "activations" in self.bytes:
            return
        received = storages(self.training.engine.received())  # the plan has it in its workspace
        self.bytes["activations"] = self.now - sum(received.values())

    def after_backward(self) -> None:
        """To be called after the last backward pass, before gradients are reduced."""
        self.bytes["gradients"] = gradient_bytes(self.training)

    def __exit__(self, *error):
        self.bytes["peak"] = self._state + self.most
        return super().__exit__(*error)
