"""Walks one training step of one rank of any world in this process, without its peers and without memory.

torch's fake process group stands for the other ranks, and FakeTensorMode for all numbers, so only shapes are computed.
Model, tensor axis, DeepSpeed's pipeline engine and ZeRO, the Muon partition and the optimizer step are those of a run.
Every collective is recorded with its group, kind, bytes and dtype. What a value decides is assumed: the gradient is
finite, so the step is not skipped, and no rank requests a stop. Tokens read as many rows of sparse tables as there are.
The attention of lookup layers has no groups.

torch offers the fake process group for its own tests (torch.testing._internal.distributed.fake_pg).
"""

import contextlib
import datetime
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from unittest import mock

import torch
import torch._dynamo  # FakeTensorMode needs it; imported here, before a process per rank is forked, it is once
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch._C._distributed_c10d import ProcessGroup
from torch._subclasses import fake_impls
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megachat.config import Config
from megachat.device import dtype_name
from megachat.kernels import lookup
from megachat.kernels.choice import choose_kernels
from megachat.optim.row_tables import RowRequest, RowTables
from megachat.parallel.build import start_collectives
from megachat.parallel.collectives import all_to_all
from megachat.parallel.engine import ZeroAdamW
from megachat.parallel.mesh import Mesh, build_mesh
from megachat.planning.call_order import Call
from megachat.planning.dimensions import passed_tensors
from megachat.planning.memory import head_chunk_bytes
from megachat.planning.plan import Plan, stream_tokens
from megachat.programs.walk_memory import StepMemory, attend, rms_norm
from megachat.train import build
from megachat.train import stage as stage_module
from megachat.train.step import update

_COLLECTIVE_KINDS = {  # operator of torch's namespace c10d -> kind
    "allreduce_": "all_reduce",
    "_allgather_base_": "all_gather",
    "allgather_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_": "reduce_scatter",
    "alltoall_base_": "all_to_all",
    "broadcast_": "broadcast",
    "send": "send",
    "recv_": "receive",
    "barrier": "barrier",
}
_PRODUCT_OPERATORS = {"mm": 0, "_scaled_mm": 0, "addmm": 1, "addmm_": 1}  # operator -> argument: its left factor


@dataclass(frozen=True)
class Walk:
    """What one rank does in a training step.

    calls: its collectives, in order. product_flops: of matrix products in forward and backward passes, 2 per
    multiplication. memory: bytes by use as in planning.memory.Memory: weights, masters, moments, gradients (without
    those of rows of sparse tables), and activations before the first backward pass; "peak": all at a time.
    """

    calls: tuple[Call, ...]
    product_flops: int
    memory: dict[str, int]


class _Recorder(TorchDispatchMode):
    """Records collectives, and the FLOPs of matrix products until the gradients are reduced. `mesh` is set once it is
    built: only then is anything recorded.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.mesh: Mesh | None = None
        self.product_flops, self._counts = 0, True

    def end_of_backward(self) -> None:
        self._counts = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d" and self.mesh is not None:
            self._record(func._opname, args)
        elif func._opname in _PRODUCT_OPERATORS and self._counts:
            left, right = args[_PRODUCT_OPERATORS[func._opname] :][:2]
            self.product_flops += 2 * left.shape[0] * left.shape[1] * right.shape[1]
        return func(*args, **(kwargs or {}))

    def _record(self, operator: str, args: tuple) -> None:
        kind, mesh = _COLLECTIVE_KINDS[operator], self.mesh
        assert mesh is not None
        boxes = [value for value in args if isinstance(value, torch.ScriptObject)]
        (group,) = [ProcessGroup.unbox(box) for box in boxes if "ProcessGroup" in str(box._type())]
        ranks = tuple(dist.get_process_group_ranks(group))
        now = mesh.world.progress.now
        # of DeepSpeed's, only the ranks are known
        axes = mesh.data, mesh.tensor, mesh.pipeline, mesh.stage, mesh.world
        named = now.axis if now.ranks == ranks else ""
        axis = named or next((axis.name for axis in axes if axis.ranks == ranks), "world")
        tensors = [value for value in tree_leaves(args) if isinstance(value, torch.Tensor)]
        if len(ranks) == 1 or not tensors:
            return
        whole = max(tensors, key=lambda tensor: tensor.nbytes)
        peers = [value for value in args if type(value) is int]
        splits = [tuple(value) for value in args if isinstance(value, list | tuple) and value and type(value[0]) is int]
        size, dtype = whole.nbytes, dtype_name(whole.dtype)
        if kind == "all_to_all":  # (output, input, group, output splits, input splits, ...)
            received, sent = tensors[:2]
            size = sent.nbytes
            equal = [(tensor.numel() // len(ranks),) * len(ranks) for tensor in (received, sent)]
            splits = splits if len(splits) == 2 else equal
        self.calls.append(
            Call(
                kind=kind,
                axis=axis,
                ranks=ranks,
                bytes=size,
                dtype=dtype,
                name=now.text,
                peer=peers[0] if kind in ("send", "receive") else None,
                received=splits[0] if kind == "all_to_all" else (),
                sent=splits[1] if kind == "all_to_all" else (),
            )
        )


@contextlib.contextmanager
def _assumed_values() -> Iterator[None]:
    """A fake tensor has no value. Where the host reads one: flags are as of a finite step, numbers are 1."""
    read = torch.ops.aten._local_scalar_dense.default
    table = fake_impls.op_implementations_dict
    before = table[read]
    table[read] = lambda mode, func, tensor: tensor.dtype == torch.bool or (1.0 if tensor.is_floating_point() else 1)
    try:
        yield
    finally:
        table[read] = before


def walk(config: Config, plan: Plan, rank: int) -> Walk:
    """Walks a step of world rank `rank`. To be called once in a process, whose launch variables are those of the rank.

    torch.compile is left out: it changes no collective. Raises what the step raises.
    """
    config = config.model_copy(update={"precision": config.precision.model_copy(update={"compile": False})})
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=plan.layout.world)
    recorder, device = _Recorder(), torch.device("cpu")
    warnings.filterwarnings("ignore", message=r"Accessing the data pointer of FakeTensor", category=UserWarning)
    with contextlib.ExitStack() as stack:
        for (owner, name), function in _replacements().items():
            stack.enter_context(mock.patch.object(owner, name, function))
        start_collectives(device, "fake", datetime.timedelta(seconds=60))
        mesh = build_mesh(device, tensor=config.parallel.tensor, pipeline=config.parallel.pipeline)
        kernels = choose_kernels(config, plan, device)
        # the kernels of a GPU, and the products in _PRODUCT_OPERATORS
        kernels = replace(kernels, attention=replace(kernels.attention, attend=attend), onednn=False)
        stack.enter_context(_assumed_values())
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        token_bytes = torch.empty(plan.dims.vocab_size, dtype=torch.int64)
        training = build.build_training_model(config, plan, mesh, token_bytes, kernels)
        rows = torch.empty(plan.micro_rows * plan.accumulation, plan.dims.sequence_len + 1, dtype=torch.int64)
        memory = StepMemory(training)
        for owner, name, before in (
            (torch.autograd, "backward", memory.before_backward),
            (ZeroAdamW, "reduce", memory.after_backward),
        ):
            stack.enter_context(mock.patch.object(owner, name, _calling_first(before, getattr(owner, name))))
        recorder.mesh = mesh
        stack.enter_context(recorder)
        stack.enter_context(memory)
        training.engine.prepare_walk(_received_buffers(training))
        update(training, rows, inspect_gradients=recorder.end_of_backward)
    return Walk(tuple(recorder.calls), recorder.product_flops, memory.bytes)


def _replacements() -> dict[tuple[object, str], Callable]:
    """Returns what a walk has in place of a run's functions, by owner and name."""
    new_group = dist.new_group
    return {
        (dist, "new_group"): lambda ranks=None, **options: new_group(ranks),  # the saving group asks for gloo
        (dist, "all_gather_object"): _gather_object,
        (nn.Module, "to"): lambda module, *args, **options: module,  # fake tensors cannot be swapped
        (stage_module, "require_whole_model"): lambda *args: None,
        (build, "agreed_head_chunk"): lambda config, plan, mesh, dtype: head_chunk_bytes(config, plan, dtype),
        (stage_module, "RowTables"): _EvenRowTables,
        # a number, because any comparison with a fake norm is true
        (ZeroAdamW, "apply"): lambda adamw, norm, apply=ZeroAdamW.apply: apply(adamw, 1.0),
        (F, "rms_norm"): rms_norm,
        (lookup, "token_groups"): lambda *args: [],
    }


def _calling_first(before: Callable[[], object], function: Callable) -> Callable:
    def both(*args, **options):
        before()
        return function(*args, **options)

    return both


class _EvenRowTables(RowTables):
    """Assumes that every token reads another row, if there are so many, and that each rank owns as many of them."""

    def exchange_requests(self, name: str, rows: int, index: torch.Tensor) -> RowRequest:
        stage = self.mesh.stage
        each = min(index.numel(), rows) // stage.size
        counts = [each] * stage.size
        numbers, wanted = index.new_empty((2, stage.size)), index.new_empty((2, each * stage.size))
        all_to_all(numbers[0], numbers[1], stage, name=f"numbers of rows of {name}")
        name = f"requests for rows of {name}"
        all_to_all(wanted[0], wanted[1], stage, receive_counts=counts, send_counts=counts, name=name)
        return RowRequest(torch.empty_like(index), each * stage.size, counts, counts, wanted[0], wanted[1])

    def add_pending(self, name: str) -> None:
        pass


def _gather_object(values: list, value: object, group=None) -> None:
    values[:] = [value] * len(values)


def _received_buffers(training: build.TrainingModel) -> tuple[torch.Tensor, ...]:
    """Returns tensors like those that the stage before sends; none on the first stage."""
    plan, first = training.plan, training.plan.stages[training.mesh.pipeline.rank][0]
    if first == 0:
        return ()
    tokens = stream_tokens(training.config, plan)
    shape = plan.micro_rows, tokens // plan.micro_rows, plan.dims.width
    ids = torch.empty(plan.micro_rows, plan.dims.sequence_len, dtype=torch.int64)
    streams = [torch.empty(shape, dtype=training.compute_dtype) for _ in range(passed_tensors(plan.dims, first))]
    return (*streams, ids)
