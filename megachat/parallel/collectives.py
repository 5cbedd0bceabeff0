"""Communication along one axis, recorded for the failure monitor. An axis of size 1 skips it, here and nowhere else.

Every function takes a `name`, which the report of a stall shows for each rank that waits in it.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megachat.errors import UserError
from megachat.parallel.mesh import Axis
from megachat.parallel.progress import Entry

T = TypeVar("T")
_OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}


class FailedOnRank(Exception):
    """An action that all ranks take together has failed on `rank`. It is the same on every rank."""

    def __init__(self, rank: int, cause: BaseException):
        super().__init__(rank, cause)
        self.rank, self.cause = rank, cause


class Pending:
    """A collective in flight; `wait()` returns when its result may be read. `Pending()` is already finished."""

    def __init__(self, launched: tuple[Any, Axis, Entry] | None = None):
        self._launched = launched

    def wait(self) -> None:
        if self._launched is not None:
            work, axis, entry = self._launched
            axis.progress.wait(entry)
            work.wait()
            axis.progress.end()
            self._launched = None


def _launch_collective(
    name: str, axis: Axis, collective: Callable, *sent: torch.Tensor, asynchronous: bool = False
) -> Pending:
    """Calls a function of torch.distributed that has all arguments but these. sent: what this rank sends."""
    axis.progress.record_sent(name, sent)
    entry = axis.progress.begin(name, axis.name, axis.ranks)
    work = collective(group=axis.group, async_op=asynchronous)
    axis.progress.end()
    return Pending(None if work is None else (work, axis, entry))


def all_reduce(tensor: torch.Tensor, axis: Axis, op: str = "sum", *, name: str = "all_reduce") -> None:
    """Reduces `tensor` in place over the axis; op is "sum" or "max"."""
    if axis.size > 1:
        _launch_collective(name, axis, partial(dist.all_reduce, tensor, op=_OPS[op]), tensor)


def reduce_scatter(
    shard: torch.Tensor, whole: torch.Tensor, axis: Axis, *, name: str = "reduce_scatter", asynchronous: bool = False
) -> Pending:
    """Sums `whole` [size * n] over the axis into `shard` [n], this rank's n elements, which may be a view of `whole`.

    Both are one-dimensional and contiguous.
    """
    if axis.size == 1:
        if shard.data_ptr() != whole.data_ptr():
            shard.copy_(whole)
        return Pending()
    return _launch_collective(
        name, axis, partial(dist.reduce_scatter_tensor, shard, whole), whole, asynchronous=asynchronous
    )


def all_gather(
    whole: torch.Tensor, shard: torch.Tensor, axis: Axis, *, name: str = "all_gather", asynchronous: bool = False
) -> Pending:
    """Collects every rank's `shard` [n] into `whole` [size * n], in rank order; `shard` may be a view of `whole`."""
    if axis.size == 1:
        if whole.data_ptr() != shard.data_ptr():
            whole.copy_(shard)
        return Pending()
    return _launch_collective(
        name, axis, partial(dist.all_gather_into_tensor, whole, shard), shard, asynchronous=asynchronous
    )


def all_to_all(
    received: torch.Tensor,
    sent: torch.Tensor,
    axis: Axis,
    *,
    receive_counts: list[int] | None = None,
    send_counts: list[int] | None = None,
    name: str = "all_to_all",
    asynchronous: bool = False,
) -> Pending:
    """Sends part r of `sent` to rank r of the axis. Counts are in elements; None means equal parts."""
    if axis.size == 1:
        received.copy_(sent)
        return Pending()
    collective = partial(dist.all_to_all_single, received, sent, receive_counts, send_counts)
    return _launch_collective(name, axis, collective, sent, asynchronous=asynchronous)


def all_gather_objects(value, axis: Axis, *, name: str = "all_gather_objects") -> list:
    """Returns every rank's `value` (small and picklable), in rank order.

    For start-up and checkpoints, not for steps.
    """
    if axis.size == 1:
        return [value]
    values = [None] * axis.size
    axis.progress.begin(name, axis.name, axis.ranks)
    dist.all_gather_object(values, value, group=axis.group)
    axis.progress.end()
    return values


def barrier(axis: Axis, *, name: str = "barrier") -> None:
    """Waits until every rank of the axis arrives."""
    if axis.size > 1:
        _launch_collective(name, axis, dist.barrier)


def on_all_ranks_or_raise(action: Callable[[], T], world: Axis, sentence: Callable[[str], str] | None = None) -> T:
    """Runs the action on every rank, and returns this rank's result. If it fails on one, all raise UserError with
    sentence("rank R: what failed"), by default with what failed alone."""
    problem = None
    try:
        result = action()
    except FailedOnRank as error:
        problem = error.rank, _describe_error(error.cause)
    except Exception as error:  # of any kind: no rank may be left waiting for the others
        problem = world.rank, _describe_error(error)
    problems = [problem for problem in all_gather_objects(problem, world) if problem]
    if problems:
        rank, text = problems[0]
        raise UserError(sentence(f"rank {rank}: {text}") if sentence else text)
    return result


def _describe_error(error: BaseException) -> str:
    return str(error) if isinstance(error, OSError | UserError) else f"{type(error).__name__}: {error}"
