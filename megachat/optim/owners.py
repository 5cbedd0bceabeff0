"""Who orthogonalizes which matrix: one owner a matrix, balanced by cost over the whole data x tensor grid of a pipeline stage. No torch."""

import heapq
import math
from collections.abc import Sequence

from megachat.optim.buckets import Fragment
from megachat.optim.matrix import Matrix

_BALANCE_TOLERANCE = 1.02  # owners leave aligned matrices only when that lightens the heaviest rank by more


def lightest_makespan(costs: list[int], ranks: int) -> int:
    """The heaviest rank's load when the costs are dealt in decreasing order to the lightest rank (LPT)."""
    heap = [0] * ranks
    for cost in sorted(costs, reverse=True):
        heapq.heapreplace(heap, heap[0] + cost)
    return max(heap)


def assign_owners(
    matrices: Sequence[Matrix], pieces: Sequence[tuple[Fragment, ...]], pinned: set[int], ranks: int, tensor: int
) -> list[int]:
    """Each matrix's owner, a place (data rank x tensor + tensor rank) of the grid.

    pieces: what the data ranks hold of each matrix, the same on every tensor rank. pinned: aligned matrices, which stay with the tensor ranks
    of their holder, on the least loaded of them; others go, in decreasing cost, to the holder of the largest piece that is not full yet.
    Several limits for "full" are tried: between equally balanced outcomes the one that moves fewer elements wins.
    """
    if not matrices:
        return []
    makespan = lightest_makespan([matrix.flops for matrix in matrices], ranks * tensor)
    owners, heaviest = _best_owners(matrices, pieces, pinned, ranks, tensor, makespan)
    if heaviest > _BALANCE_TOLERANCE * makespan and pinned:
        unpinned, lighter = _best_owners(matrices, pieces, set(), ranks, tensor, makespan)
        if lighter < heaviest:
            return unpinned
    return owners


def _best_owners(
    matrices: Sequence[Matrix],
    pieces: Sequence[tuple[Fragment, ...]],
    pinned: set[int],
    ranks: int,
    tensor: int,
    makespan: int,
) -> tuple[list[int], int]:
    costs = [matrix.flops for matrix in matrices]
    least = max(math.ceil(sum(costs) / (ranks * tensor)), max(costs))
    order = sorted(range(len(costs)), key=lambda index: (index not in pinned, -costs[index], index))
    homes = [  # (elements held, data rank), the largest piece first
        [
            (piece.stop - piece.start, piece.rank)
            for piece in sorted(own, key=lambda piece: (piece.start - piece.stop, piece.rank))
        ]
        for own in pieces
    ]
    tried = []
    for limit in dict.fromkeys((least, least * 1.05, max(least * 1.1, makespan), makespan, 0)):
        tried.append(_owners_under(limit, order, costs, homes, pinned, ranks, tensor))
    lightest = min(heaviest for _, heaviest, _ in tried)
    owners, heaviest, _ = max(
        (attempt for attempt in tried if attempt[1] <= 1.001 * lightest), key=lambda attempt: (attempt[2], -attempt[1])
    )
    return owners, heaviest


def _owners_under(
    limit: float,
    order: list[int],
    costs: list[int],
    homes: list[list[tuple[int, int]]],
    pinned: set[int],
    ranks: int,
    tensor: int,
) -> tuple[list[int], int, int]:
    """(owners, heaviest load, elements that need not move) when no holder takes a matrix that would lift it over the limit."""
    loads = [0] * (ranks * tensor)
    heap = [(0, place) for place in range(ranks * tensor)]  # entries may be out of date; the true load decides
    lightest = [rank * tensor for rank in range(ranks)]  # of each data rank's places
    owners, kept = [0] * len(costs), 0
    for index in order:
        while loads[heap[0][1]] != heap[0][0]:
            heapq.heappop(heap)
        cost, owner = costs[index], heap[0][1]
        if index in pinned:
            owner = lightest[homes[index][0][1]]
        elif loads[owner] + cost <= limit:  # else every holder is full, too
            owner = next((lightest[rank] for _, rank in homes[index] if loads[lightest[rank]] + cost <= limit), owner)
        loads[owner] += cost
        heapq.heappush(heap, (loads[owner], owner))
        owners[index] = owner
        rank = owner // tensor
        kept += next((held for held, holder in homes[index] if holder == rank), 0)
        if tensor > 1 and owner == lightest[rank]:
            lightest[rank] = min(range(rank * tensor, (rank + 1) * tensor), key=lambda place: (loads[place], place))
    return owners, max(loads), kept
