"""Checks types on the tensor axis: one step of the real code on all tensor ranks, compared with that of one process.

The ranks are threads of this process, and collectives are sums and copies between them. The model's modules, the
functions of megachat/parallel/tensor.py, the kernels' sums over ranks, sparse tables, and the gradients that the
optimizers get are recorded in the order of their execution. The first one that is not of its declared type is named.

check() raises TypeFault. A module whose output has no declared type must have some type: undeclared values may be
replicated, partial or cut along a dim, but nothing else.
"""

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from unittest.mock import patch

import torch

from megachat.config import Config
from megachat.kernels.channel_norm import ChannelNorm
from megachat.model.gpt import Head
from megachat.model.parameters import load_whole, placed_parameters, starting_value
from megachat.optim.joint import Optimizers, optimizer_step
from megachat.optim.row_tables import RowTables
from megachat.parallel import collectives, tensor
from megachat.parallel.engine import ZeroAdamW
from megachat.parallel.mesh import Axis, Mesh, local_mesh
from megachat.parallel.progress import Progress
from megachat.parallel.tensor import CUT_TYPES, INVARIANT, TOKEN_SLICES, Type
from megachat.place import is_partial_over_tensor, is_tensor_shard, place_of
from megachat.planning.plan import resolve_without_text
from megachat.settings import ParallelConfig
from megachat.train import build, stage
from tests.limits import limit_s
from tests.training import SMALL_VOCAB, random_rows

TOLERANCE = 1e-3  # of a tensor's norm; faults are off by much more, float32's rounding by less
SHARD = "shard"  # the expected type of a parameter's gradient: this rank's part of the weight, as its place says
_local = threading.local()  # .recorder: of the thread's rank


class TypeFault(AssertionError):
    """A value or gradient is not spread over the tensor axis as declared."""


@dataclasses.dataclass(frozen=True)
class Event:
    """A tensor at one point of a step. key: of the same tensor in the step of one process. expected: its type, None if
    it is not declared. part: of a shard, where it lies in the whole.
    """

    key: tuple
    label: str
    expected: str | int | None
    tensor: torch.Tensor
    part: tuple[slice, ...] = ()


class Recorder:
    """The events of one rank. modules: those that are running, as [name, number of the call, whether it has begun]."""

    def __init__(self):
        self.events: list[Event] = []
        self.modules: list[list] = []
        self.calls: dict[str, int] = {}

    def add(self, key: tuple, label: str, expected, value: torch.Tensor, part: tuple = ()) -> None:
        self.events.append(Event(key, label, expected, value.detach().clone(), part))

    def with_gradient(self, key: tuple, label: str, expected: Type | None, value: torch.Tensor) -> None:
        """Records the value now and its gradient when it arrives."""
        forward, backward = expected or (None, None)
        self.add(key, label, forward, value)
        if value.requires_grad:
            value.register_hook(lambda g: self.add((*key, "gradient"), f"the gradient of {label}", backward, g))

    def number(self, name: str) -> int:
        self.calls[name] = self.calls.get(name, 0) + 1
        return self.calls[name]


class Group:
    """Stands for a process group whose ranks are threads: a collective returns when all ranks have called it."""

    def __init__(self, size: int):
        self.size, self._values = size, [None] * size
        self._barrier = threading.Barrier(size, timeout=limit_s())
        self.abort = self._barrier.abort

    def exchange(self, what: str, value) -> list:
        """Returns the values of all ranks."""
        self._values[_local.rank] = what, value
        self._barrier.wait()
        everyone = list(self._values)
        self._barrier.wait()
        if len({name for name, _ in everyone}) > 1:
            raise TypeFault(f"the ranks call different collectives: {', '.join(name for name, _ in everyone)}")
        return [value for _, value in everyone]


def _collectives() -> SimpleNamespace:
    """Returns the functions of torch.distributed that megachat.parallel.collectives calls."""

    def all_reduce(value, *, op, group, async_op):
        ranks = torch.stack(group.exchange("all_reduce", value.clone()))
        value.copy_(ranks.sum(0) if op == torch.distributed.ReduceOp.SUM else ranks.amax(0))

    def reduce_scatter_tensor(shard, whole, *, group, async_op):
        total = torch.stack(group.exchange("reduce_scatter", whole.clone())).sum(0)
        shard.copy_(total.chunk(group.size)[_local.rank])

    def all_gather_into_tensor(whole, shard, *, group, async_op):
        whole.copy_(torch.cat(group.exchange("all_gather", shard.clone())))

    def all_to_all_single(received, sent, receive_counts, send_counts, *, group, async_op):
        parts = group.exchange("all_to_all", sent.clone().split(send_counts or len(sent) // group.size))
        received.copy_(torch.cat([part[_local.rank] for part in parts]))

    def all_gather_object(values, value, *, group):
        values[:] = group.exchange("all_gather_object", value)

    def with_work(collective):
        def call(*arguments, **options):
            collective(*arguments, **options)
            return SimpleNamespace(wait=lambda: None) if options["async_op"] else None

        return call

    reductions = all_reduce, reduce_scatter_tensor, all_gather_into_tensor, all_to_all_single
    return SimpleNamespace(all_gather_object=all_gather_object, **{one.__name__: with_work(one) for one in reductions})


def _mesh(rank: int, size: int, group: Group) -> Mesh:
    progress = Progress()
    whole = {name: Axis(name, size, rank, group, tuple(range(size)), progress) for name in ("world", "tensor", "stage")}
    single = {name: Axis(name, 1, 0, None, (rank,), progress) for name in ("data", "pipeline", "saving")}
    return Mesh(device=torch.device("cpu"), topology=None, **whole, **single)


class AdamW:
    """Stands for DeepSpeed's optimizer: the two methods under test are those of ZeroAdamW."""

    loss_scale = 1.0

    def __init__(self, groups: list[dict], mesh: Mesh):
        self.mesh, self.params_in_partition = mesh, [group["params"] for group in groups]
        self.parameters = [parameter for group in self.params_in_partition for parameter in group]
        self.partial_over_tensor = [one for one in self.parameters if is_partial_over_tensor(one)]
        self.set_gradient_accumulation_boundary = self.setup_buckets = lambda *_: None
        self.reduce_gradients = self.apply = lambda *_, **__: None

    @property
    def averaged_gradients(self) -> list[list[torch.Tensor]]:
        return [[parameter.grad for parameter in group] for group in self.params_in_partition]

    def get_gradient_for_reduction(self, parameter: torch.nn.Parameter) -> torch.Tensor | None:
        return parameter.grad

    def reduce(self) -> None:
        ZeroAdamW.reduce(self)

    def local_gradients(self) -> list[torch.Tensor]:
        return ZeroAdamW.local_gradients(self)


def _build(config: Config, mesh: Mesh) -> SimpleNamespace:
    """Returns the model and optimizers of a rank, as a training builds them, with values without zeros."""
    plan = resolve_without_text(config, mesh.world.size, SMALL_VOCAB)
    training = build.build_training_model(config, plan, mesh, torch.ones(SMALL_VOCAB, dtype=torch.int64))
    for parameter in placed_parameters(training.layers) + stage.row_parameters(training.rows):
        load_whole(parameter, starting_value(dataclasses.replace(place_of(parameter), start=("normal", 0.1)), seed=3))
    loss, adamw = training.engine
    return SimpleNamespace(layers=training.layers, loss=loss, adamw=adamw, muon=training.muon, rows=training.rows)


def _name(number: int, name: str, layers: int) -> str:
    layer = "embed" if number == 0 else "head" if number == layers - 1 else f"block {number - 1}"
    return f"{layer} {name}".rstrip()


def _observe(model: SimpleNamespace, config: Config) -> None:
    """Adds hooks to all modules that record what they take and return."""
    stream = TOKEN_SLICES if config.parallel.sequence else INVARIANT
    for number, layer in enumerate(model.layers):
        for path, module in layer.named_modules():
            name = _name(number, path, len(model.layers))
            cut = CUT_TYPES.get(_cut(module), (None, None)) if config.parallel.tensor > 1 else (None, None)
            whole = stream if module is layer and not isinstance(module, Head) else None
            _observe_module(module, name, cut[0], cut[1] or whole)
            if isinstance(module, ChannelNorm):
                module.add = _recorded_sum(name, module.add or (lambda tensor: None))
    for parameter in placed_parameters(model.layers):
        _observe_parameter(parameter)
    model.loss.part = dataclasses.replace(model.loss.part, add=_recorded_sum("loss", model.loss.part.add))


def _cut(module: torch.nn.Module) -> str:
    weight = getattr(module, "weight", None)
    return place_of(weight).cut if isinstance(weight, torch.nn.Parameter) else "whole"


def _tensors(values) -> list[torch.Tensor]:
    values = values if isinstance(values, tuple) else (values,)
    return [
        one
        for one in values
        if isinstance(one, torch.Tensor) and one.is_floating_point() and not isinstance(one, torch.nn.Parameter)
    ]


def _observe_module(module: torch.nn.Module, name: str, takes: Type | None, returns: Type | None) -> None:
    recorder = _local.recorder

    def enter(_, inputs):
        recorder.modules.append([name, recorder.number(name), False])

    def begin(_, inputs):
        running = recorder.modules[-1]
        running[2] = True
        for index, value in enumerate(_tensors(inputs)):
            recorder.with_gradient((*running[:2], "input", index), f"the input of {name}", takes, value)

    def end(_, inputs, outputs):
        running = recorder.modules.pop()
        for index, value in enumerate(_tensors(outputs)):
            recorder.with_gradient((*running[:2], "output", index), f"the output of {name}", returns, value)

    module.register_forward_pre_hook(enter, prepend=True)
    module.register_forward_pre_hook(begin)
    module.register_forward_hook(end)


def _observe_parameter(parameter: torch.nn.Parameter) -> None:
    recorder, place = _local.recorder, place_of(parameter)
    key, label = ("parameter", place.name, place.block), f"the gradient of {place.name}"
    if is_tensor_shard(parameter):
        part = tuple(slice(o, o + s) for o, s in zip(place.offset, parameter.shape, strict=True))
        parameter.register_hook(lambda gradient: recorder.add(key, label, SHARD, gradient, part))
    else:
        expected = "partial" if is_partial_over_tensor(parameter) else "replicated"
        parameter.register_hook(lambda gradient: recorder.add(key, label, expected, gradient))


def _recorded_sum(name: str, add: Callable) -> Callable:
    recorder = _local.recorder

    def recorded(value: torch.Tensor) -> None:
        key = f"sum of {name}", recorder.number(f"sum of {name}")
        recorder.add(key, f"what {name} sums over the ranks", "partial", value)
        add(value)
        recorder.add(key, f"the sum over the ranks in {name}", "replicated", value)

    return recorded


def _apply(border, value: torch.Tensor, axis: Axis) -> torch.Tensor:
    """Crosses a border of megachat.parallel.tensor and records what it takes and returns."""
    recorder = _local.recorder
    (name, call, begun), (before, after) = recorder.modules[-1], border.types
    key = name, call, "output" if begun else "input", 0
    label = f"{border.name} on the {key[2]} of {name}"
    recorder.with_gradient(key, f"what {label} takes", before, value)
    result = border.apply(value, axis)
    recorder.with_gradient(key, f"what {label} returns", after, result)
    return result


def _read(tables: RowTables, name: str, index: torch.Tensor) -> torch.Tensor:
    recorder = _local.recorder
    rows = _READ(tables, name, index)
    key = "rows", name, recorder.number(name)
    recorder.with_gradient(key, f"rows read from {name}", tables.tables[name].type, rows)
    return rows


_READ = RowTables.read


def _step(config: Config, mesh: Mesh, recorder: Recorder) -> None:
    """Takes a step without its updates and records what happens in it."""
    _local.recorder, model = recorder, _build(config, mesh)
    _observe(model, config)
    tokens = config.model.sequence_len
    rows = random_rows(0, 2, tokens + 1, SMALL_VOCAB)
    stream = rows[:, :-1]
    for layer in model.layers:
        stream = layer(stream)
    loss = model.loss(stream, rows[:, 1:])
    recorder.with_gradient(("loss",), "the loss", INVARIANT, loss)
    loss.backward()
    model.adamw.reduce()
    for parameter in model.adamw.parameters:
        if not is_tensor_shard(parameter):
            place = place_of(parameter)
            label = f"the reduced gradient of {place.name}"
            recorder.add(("parameter", place.name, place.block), label, "replicated", parameter.grad)
    model.muon.start_reduce()
    with patch.object(model.muon, "step"), patch.object(model.rows, "step"):
        optimizers = Optimizers(model.adamw, model.muon, model.rows, mesh, _sum_of_squares, clip_norm=0.0)
        outcome = optimizer_step(optimizers, inspect_gradients=lambda: _inspect(model))
    recorder.add(("norm",), "the norm of the whole gradient", "replicated", torch.tensor(outcome.norm))


def _sum_of_squares(tensors: list[torch.Tensor], first: torch.Tensor) -> torch.Tensor:
    return sum((one.float().square().sum() for one in tensors), first)


def _inspect(model: SimpleNamespace) -> None:
    """Records the reduced gradients as the norm counts them."""
    for shard in model.rows.gradient_shards():
        dense = torch.zeros(shard.shape)
        for offset, sizes, values in shard.rectangles:
            dense[tuple(slice(o, o + s) for o, s in zip(offset, sizes, strict=True))] = values
        _local.recorder.add(("table", shard.name), f"the gradient of {shard.name}", "partial", dense)
    zero, adamw, rows = torch.zeros(()), model.adamw.local_gradients(), model.rows.gradients()
    squares = {"AdamW": _sum_of_squares(adamw, zero), "the sparse tables": _sum_of_squares(rows, zero)}
    for name, value in (squares | {"Muon": model.muon.sum_of_squares()}).items():
        _local.recorder.add(("squares", name), f"the squares of {name}'s gradients in the norm", "partial", value)


@contextlib.contextmanager
def _patched() -> Iterator[None]:
    with (
        patch.object(collectives, "dist", _collectives()),
        patch.object(tensor, "_apply", _apply),
        patch.object(RowTables, "read", _read),
        patch.object(build, "build_module", lambda layers, loss, mesh: loss),
        patch.object(build, "build_engine", lambda loss, groups, muon, mesh, **_: (loss, AdamW(groups, mesh))),
    ):
        yield


def _on_ranks(config: Config) -> tuple[list[list[Event]], list[BaseException]]:
    """Returns the events of each rank of the tensor axis, and what ranks raised after them."""
    size = config.parallel.tensor
    group, recorders, errors = Group(size), [Recorder() for _ in range(size)], []

    def run(rank: int) -> None:
        _local.rank = rank
        try:
            _step(config, _mesh(rank, size, group), recorders[rank])
        except BaseException as error:
            errors.append(error)
            group.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    errors.sort(key=lambda error: isinstance(error, threading.BrokenBarrierError))  # those of the other ranks
    return [recorder.events for recorder in recorders], errors


def one_process(config: Config) -> list[Event]:
    """Returns the events of a step of one process."""
    recorder = Recorder()
    with _patched():
        alone = config.model_copy(update={"parallel": ParallelConfig()})
        _step(alone, local_mesh(torch.device("cpu")), recorder)
    return recorder.events


def check(config: Config, whole: list[Event] | None = None) -> int:
    """Compares a step of all tensor ranks of the config with one of one process. Returns how many tensors have a
    declared type. whole: what `one_process` returned.

    Raises TypeFault for the first tensor that is not of its type, and what the step raises if there is none before.
    """
    whole = whole or one_process(config)
    with _patched():
        ranks, errors = _on_ranks(config)
    expected = {event.key: event.tensor for event in whole}
    for events in zip(*ranks, strict=False):
        labels = {event.label for event in events}
        if len(labels) > 1:
            raise TypeFault(f"the ranks differ in what they compute: {'; '.join(sorted(labels))}")
        _check_event(events, expected)
    for error in errors:
        raise error
    keys = {event.key for event in ranks[0]}
    if missing := sorted({event.label for event in whole if event.key not in keys}):
        raise TypeFault(f"the ranks do not compute what one process does: {', '.join(missing)}")
    return sum(event.expected is not None for event in ranks[0])


def _check_event(events: tuple[Event, ...], whole: dict[tuple, torch.Tensor]) -> None:
    one = events[0]
    if one.key not in whole:
        raise TypeFault(f"{one.label} is not in the step of one process")
    reference = whole[one.key]
    if one.expected == SHARD:
        if not all(_near(event.tensor, reference[event.part]) for event in events):
            raise TypeFault(f"{one.label} is not this rank's part of that of one process")
        return
    possible = types_of([event.tensor for event in events], reference)
    expected = one.expected
    if isinstance(expected, int):
        expected %= reference.ndim
    if not possible or (expected is not None and expected not in possible):
        wanted = "of any type" if expected is None else describe(expected)
        observed = " or ".join(map(describe, possible)) or describe_untyped([e.tensor for e in events], reference)
        raise TypeFault(f"{one.label} should be {wanted}, but is {observed}")


def types_of(ranks: list[torch.Tensor], whole: torch.Tensor) -> list[str | int]:
    """Returns the types that the ranks' tensors have, given that of one process."""
    types: list[str | int] = []
    if all(_near(value, whole) for value in ranks):
        types.append("replicated")
    if len({value.shape for value in ranks}) == 1 and _near(torch.stack(ranks).sum(0), whole):
        types.append("partial")
    if len({value.ndim for value in ranks} | {whole.ndim}) == 1:
        for dim in range(whole.ndim):
            if sum(value.size(dim) for value in ranks) == whole.size(dim):
                with contextlib.suppress(RuntimeError):  # of other sizes in another dim
                    if _near(torch.cat(ranks, dim), whole):
                        types.append(dim)
    return types


def describe(type_: str | int) -> str:
    return f"cut along dim {type_}" if isinstance(type_, int) else str(type_)


def describe_untyped(ranks: list[torch.Tensor], whole: torch.Tensor) -> str:
    """Says how the ranks' tensors relate to that of one process if they have no type."""
    first = ranks[0]
    if any(sum(value.size(dim) for value in ranks) == whole.size(dim) != first.size(dim) for dim in range(whole.ndim)):
        return "cut into parts that are not those of the value of one process"
    if any(value.shape != first.shape for value in ranks) or first.shape != whole.shape:
        return f"of shape {' and '.join(str(tuple(value.shape)) for value in ranks)}, not {tuple(whole.shape)}"
    times = (first.double() * whole.double()).sum() / whole.double().square().sum()
    if all(_near(value, first) for value in ranks):
        scaled = _near(first, whole * times)
        return f"equal on all ranks, but {f'{times:.3g} times the' if scaled else 'not the'} value of one process"
    total = torch.stack(ranks).sum(0)
    times = (total.double() * whole.double()).sum() / whole.double().square().sum()
    if _near(total, whole * times):
        return f"different on each rank, and the sum is {times:.3g} times the value of one process"
    return "different on each rank, and neither the sum nor the parts are the value of one process"


def _near(value: torch.Tensor, expected: torch.Tensor) -> bool:
    if value.shape != expected.shape:
        return False
    return bool((value.double() - expected.double()).norm() <= TOLERANCE * expected.double().norm() + 1e-12)
