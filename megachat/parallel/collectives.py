"""Communication along one axis. An axis of size 1 costs nothing: the skip is here and nowhere else."""

import torch
import torch.distributed as dist

from megachat.parallel.mesh import Axis

_OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}


class Pending:
    """A collective under way; `wait()` returns when its result may be read. `Pending(None)` is already finished."""

    def __init__(self, work=None):
        self._work = work

    def wait(self) -> None:
        if self._work is not None:
            self._work.wait()
            self._work = None


def all_reduce(tensor: torch.Tensor, axis: Axis, op: str = "sum", *, asynchronous: bool = False) -> Pending:
    """Reduce `tensor` in place over the axis; op is "sum", "max" or "min"."""
    if axis.size == 1:
        return Pending()
    return Pending(dist.all_reduce(tensor, op=_OPS[op], group=axis.group, async_op=asynchronous))


def reduce_scatter(shard: torch.Tensor, whole: torch.Tensor, axis: Axis, *, asynchronous: bool = False) -> Pending:
    """Sum `whole` [size * n] over the axis; this rank's n elements land in `shard` [n], which may be its part of `whole`.

    Both one-dimensional and contiguous.
    """
    if axis.size == 1:
        if shard.data_ptr() != whole.data_ptr():
            shard.copy_(whole)
        return Pending()
    return Pending(dist.reduce_scatter_tensor(shard, whole, group=axis.group, async_op=asynchronous))


def all_gather(whole: torch.Tensor, shard: torch.Tensor, axis: Axis, *, asynchronous: bool = False) -> Pending:
    """Collect every rank's `shard` [n] into `whole` [size * n], in rank order; `shard` may be this rank's part of `whole`."""
    if axis.size == 1:
        if whole.data_ptr() != shard.data_ptr():
            whole.copy_(shard)
        return Pending()
    return Pending(dist.all_gather_into_tensor(whole, shard, group=axis.group, async_op=asynchronous))


def all_to_all(
    received: torch.Tensor,
    sent: torch.Tensor,
    axis: Axis,
    *,
    receive_counts: list[int] | None = None,
    send_counts: list[int] | None = None,
    asynchronous: bool = False,
) -> Pending:
    """Send part r of `sent` to rank r of the axis; counts are in elements, equal parts when they are None."""
    if axis.size == 1:
        received.copy_(sent)
        return Pending()
    return Pending(dist.all_to_all_single(received, sent, receive_counts, send_counts, group=axis.group, async_op=asynchronous))


def all_gather_objects(value, axis: Axis) -> list:
    """Every rank's `value` (anything that pickles; small), in rank order. For start-up and checkpoints, not for the step."""
    if axis.size == 1:
        return [value]
    values = [None] * axis.size
    dist.all_gather_object(values, value, group=axis.group)
    return values


def barrier(axis: Axis) -> None:
    """Wait until every rank of the axis is here."""
    if axis.size > 1:
        dist.barrier(group=axis.group)
