"""Communication along one axis, recorded for the failure monitor. An axis of size 1 costs nothing: the skip is here and nowhere else.

Every function takes a `name`, by which a standing job tells where its ranks wait; without one, the operation is told.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from megachat.errors import UserError
from megachat.parallel.mesh import Axis

_OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}


class Pending:
    """A collective under way; `wait()` returns when its result may be read. `Pending()` is already finished."""

    def __init__(self, work=None, axis: Axis | None = None, entry=None):
        self._work, self._axis, self._entry = work, axis, entry

    def wait(self) -> None:
        if self._work is not None:
            self._axis.progress.wait(self._entry)
            self._work.wait()
            self._axis.progress.end()
            self._work = None


def _recorded(name: str, axis: Axis, collective, *args, asynchronous: bool = False, **options) -> Pending:
    entry = axis.progress.begin(name, axis.name, axis.ranks)
    work = collective(*args, group=axis.group, async_op=asynchronous, **options)
    axis.progress.end()
    return Pending(work, axis, entry)


def all_reduce(
    tensor: torch.Tensor, axis: Axis, op: str = "sum", *, name: str = "", asynchronous: bool = False
) -> Pending:
    """Reduce `tensor` in place over the axis; op is "sum", "max" or "min"."""
    if axis.size == 1:
        return Pending()
    return _recorded(name or "all_reduce", axis, dist.all_reduce, tensor, op=_OPS[op], asynchronous=asynchronous)


def reduce_scatter(
    shard: torch.Tensor, whole: torch.Tensor, axis: Axis, *, name: str = "", asynchronous: bool = False
) -> Pending:
    """Sum `whole` [size * n] over the axis; this rank's n elements land in `shard` [n], which may be its part of `whole`.

    Both one-dimensional and contiguous.
    """
    if axis.size == 1:
        if shard.data_ptr() != whole.data_ptr():
            shard.copy_(whole)
        return Pending()
    return _recorded(
        name or "reduce_scatter", axis, dist.reduce_scatter_tensor, shard, whole, asynchronous=asynchronous
    )


def all_gather(
    whole: torch.Tensor, shard: torch.Tensor, axis: Axis, *, name: str = "", asynchronous: bool = False
) -> Pending:
    """Collect every rank's `shard` [n] into `whole` [size * n], in rank order; `shard` may be this rank's part of `whole`."""
    if axis.size == 1:
        if whole.data_ptr() != shard.data_ptr():
            whole.copy_(shard)
        return Pending()
    return _recorded(name or "all_gather", axis, dist.all_gather_into_tensor, whole, shard, asynchronous=asynchronous)


def all_to_all(
    received: torch.Tensor,
    sent: torch.Tensor,
    axis: Axis,
    *,
    receive_counts: list[int] | None = None,
    send_counts: list[int] | None = None,
    name: str = "",
    asynchronous: bool = False,
) -> Pending:
    """Send part r of `sent` to rank r of the axis; counts are in elements, equal parts when they are None."""
    if axis.size == 1:
        received.copy_(sent)
        return Pending()
    arguments = (received, sent, receive_counts, send_counts)
    return _recorded(name or "all_to_all", axis, dist.all_to_all_single, *arguments, asynchronous=asynchronous)


def all_gather_objects(value, axis: Axis, *, name: str = "") -> list:
    """Every rank's `value` (anything that pickles; small), in rank order. For start-up and checkpoints, not for the step."""
    if axis.size == 1:
        return [value]
    values = [None] * axis.size
    axis.progress.begin(name or "all_gather_objects", axis.name, axis.ranks)
    dist.all_gather_object(values, value, group=axis.group)
    axis.progress.end()
    return values


def barrier(axis: Axis, *, name: str = "") -> None:
    """Wait until every rank of the axis is here."""
    if axis.size > 1:
        _recorded(name or "barrier", axis, dist.barrier)


def on_all_ranks_or_raise(action: Callable[[], object], world: Axis, sentence: Callable[[str], str]) -> None:
    """Run on every rank; when it fails on one, all raise UserError with sentence("rank R: what failed")."""
    problem = None
    try:
        action()
    except CheckpointException as error:  # torch's, the same on every rank, with one error a rank; it is no Exception
        rank, (cause, _) = min(error.failures.items(), key=lambda failure: failure[0])
        problem = rank, _in_words(cause)
    except Exception as error:  # whatever it was, no rank may wait for the others alone
        problem = world.rank, _in_words(error)
    problems = [told for told in all_gather_objects(problem, world) if told]
    if problems:
        rank, text = problems[0]
        raise UserError(sentence(f"rank {rank}: {text}"))


def _in_words(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if not isinstance(error, (OSError, UserError)) else str(error)
