"""The collectives of all ranks in a step: do the ranks of each group agree, does every call meet its partners, and are
their bytes those of the plan? Pure.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from megachat.config import Config
from megachat.device import DTYPES
from megachat.planning.dimensions import passed_tensors
from megachat.planning.plan import Plan, stream_tokens
from megachat.planning.stage_state import stage_state
from megachat.planning.step_time import planned_dtype
from megachat.planning.step_work import ITEMSIZE, muon_dtype, optimizer_work, stage_work

PURPOSES = (
    "tensor axis",
    "between stages",
    "Muon gradients",
    "Muon weights",
    "AdamW gradients",
    "AdamW weights",
    "other",
)


class Call(NamedTuple):
    """One collective of one rank. ranks: of its group, world ranks. bytes: of the whole tensor; of an all-to-all, what
    this rank sends. name: as the failure monitor shows it. peer: of "send" and "receive", a world rank. received and
    sent: elements by rank of the group, of an all-to-all.
    """

    kind: str
    axis: str
    ranks: tuple[int, ...]
    bytes: int
    dtype: str
    name: str
    peer: int | None = None
    received: tuple[int, ...] = ()
    sent: tuple[int, ...] = ()


def find_mismatch(calls: Mapping[int, Sequence[Call]]) -> str | None:
    """Returns one sentence on the first place where ranks do not meet, None where the step runs to its end.

    calls: by world rank, of all ranks of every group that occurs. Each call is taken to wait until all its partners are
    there, which is stricter than the backends are: what passes cannot deadlock.
    """
    at = dict.fromkeys(calls, 0)
    ready, waiting = list(calls), defaultdict[tuple, set[int]](set)
    while ready:
        rank = ready.pop()
        if at[rank] == len(calls[rank]):
            continue
        call = calls[rank][at[rank]]
        meeting = _meeting(rank, call)
        waiting[meeting].add(rank)
        if len(waiting[meeting]) < len(meeting[1]):
            continue
        members = sorted(waiting.pop(meeting))
        together = {member: calls[member][at[member]] for member in members}
        if problem := _difference(together):
            return problem
        for member in members:
            at[member] += 1
        ready += members
    stuck = [rank for rank in calls if at[rank] < len(calls[rank])]
    if not stuck:
        return None
    rank = min(stuck, key=lambda rank: at[rank])
    call = calls[rank][at[rank]]
    absent = sorted(set(_meeting(rank, call)[1]) - waiting[_meeting(rank, call)])
    other = absent[0]
    theirs = calls[other][at[other]] if at[other] < len(calls[other]) else None
    doing = f'is in "{theirs.name}" ({theirs.kind}, {theirs.axis})' if theirs else "has finished its step"
    return (
        f'deadlock: rank {rank} waits in "{call.name}" ({call.kind}, {call.axis}, its call {at[rank]}) for '
        f"rank {other}, which {doing}"
    )


def _meeting(rank: int, call: Call) -> tuple[str, tuple[int, ...]]:
    """Returns what identifies the place where a call meets its partners, and their ranks."""
    if call.kind == "send":
        return f"from {rank}", tuple(sorted((rank, call.peer or 0)))
    if call.kind == "receive":
        return f"from {call.peer}", tuple(sorted((rank, call.peer or 0)))
    return call.axis, call.ranks


def _difference(together: Mapping[int, Call]) -> str | None:
    (first, call), *others = together.items()
    for rank, other in others:
        for field in ("dtype", "bytes") if call.peer is not None else ("kind", "dtype", "bytes"):
            if field == "bytes" and call.kind == "all_to_all":
                continue
            if getattr(call, field) != getattr(other, field):
                return (
                    f'ranks {first} and {rank} meet in "{call.name}" ({call.axis}) with different {field}: '
                    f"{getattr(call, field)} and {getattr(other, field)}"
                )
    if call.sent:
        for here, (rank, each) in enumerate(together.items()):
            for there, (peer, other) in enumerate(together.items()):
                if each.sent[there] != other.received[here]:
                    return (
                        f'in "{call.name}" rank {rank} sends {each.sent[there]} elements to rank {peer}, which expects '
                        f"{other.received[here]}"
                    )
    return None


def sums(calls: Sequence[Call]) -> dict[tuple[str, str], tuple[int, int]]:
    """Returns (axis, kind) -> (number of calls, bytes) of one rank."""
    totals: dict[tuple[str, str], tuple[int, int]] = {}
    for call in calls:
        count, size = totals.get((call.axis, call.kind), (0, 0))
        totals[call.axis, call.kind] = count + 1, size + call.bytes
    return totals


def planned_flops(config: Config, plan: Plan, stage: int) -> float:
    """Returns the FLOPs of a rank's matrix products in forward and backward passes of a step, as the planner counts."""
    products = [product for work in stage_work(config, plan, stage, planned_dtype(config)) for product in work.products]
    return plan.accumulation * sum(2.0 * each.count * each.rows * each.columns * each.inner for each in products)


def planned_bytes(config: Config, plan: Plan, stage: int) -> dict[str, float]:
    """Returns the bytes of a rank's collectives in a step, as the planner counts them, by purpose; what is in
    PURPOSES but not here is not planned."""
    dtype, layout, dims = planned_dtype(config), plan.layout, plan.dims
    body, head = stage_work(config, plan, stage, dtype)
    optimizer, size = optimizer_work(plan, stage, dtype), ITEMSIZE[dtype]
    collectives = [*body.collectives, *head.collectives]
    stream = stream_tokens(config, plan) * dims.width * size
    first, last = plan.stages[stage]
    passed = sum(passed_tensors(dims, layer) for layer in (first, last) if 0 < layer < dims.depth + 2)
    planned = {
        "tensor axis": plan.accumulation * sum(each.size * each.count for each in collectives if each.axis == "tensor"),
        "between stages": 2.0 * plan.accumulation * passed * stream,
    }
    if layout.data > 1:
        # the shards with their padding, which is 4 % of a small model on 512 ranks
        shards = layout.data * stage_state(config, plan, stage, DTYPES[dtype]).shards
        planned["Muon gradients"] = planned["Muon weights"] = ITEMSIZE[muon_dtype(dtype)] * shards
        planned["AdamW gradients"] = 4.0 * sum(optimizer.adamw.values())
        planned["AdamW weights"] = float(sum(size * count for size, count in optimizer.adamw.items()))
    return planned


def walked_bytes(calls: Sequence[Call]) -> dict[str, int]:
    """Returns the bytes of a rank's collectives by PURPOSES."""
    totals = dict.fromkeys(PURPOSES, 0)
    for call in calls:
        if call.axis == "tensor":
            purpose = "tensor axis"
        elif call.kind in ("send", "receive"):
            purpose = "between stages"
        elif call.axis != "data":
            purpose = "other"
        else:
            owner = "Muon" if call.name.startswith("Muon") else "AdamW"
            purpose = f"{owner} {'weights' if call.kind == 'all_gather' else 'gradients'}"
        totals[purpose] += call.bytes
    return totals
