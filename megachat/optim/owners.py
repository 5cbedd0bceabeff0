"""Assigns every matrix an owner: the rank of a pipeline stage that orthogonalizes it. Balanced by cost. No torch."""

import heapq
import math
from collections.abc import Collection, Sequence
from typing import NamedTuple

from megachat.optim.buckets import Fragment
from megachat.optim.matrix import Matrix

_BALANCE_TOLERANCE = (
    1.02  # of the busiest rank's load over the LPT load, for aligned matrices to stay on their data rank
)


class _Assignment(NamedTuple):
    owners: list[int]  # grid rank of each matrix
    heaviest: int  # FLOPs of the busiest rank
    kept: int  # elements that the data ranks of the owners store already


def lightest_makespan(costs: list[int], ranks: int) -> int:
    """Returns the busiest rank's load if every cost, in decreasing order, goes to the least loaded rank (LPT)."""
    heap = [0] * ranks
    for cost in sorted(costs, reverse=True):
        heapq.heapreplace(heap, heap[0] + cost)
    return max(heap)


def assign_owners(
    matrices: Sequence[Matrix],
    fragments: Sequence[Sequence[Fragment]],
    aligned: Collection[int],
    data: int,
    tensor: int,
) -> list[int]:
    """Returns the owner of each matrix as a grid rank: data rank x tensor ranks + tensor rank.

    fragments: of each matrix, over the data ranks. aligned: indices of matrices that one data rank stores whole. Their
    owner is the least loaded tensor rank of that data rank, unless the balance suffers. Several load limits are tried.
    Among assignments that are equally balanced, to 0.1 %, the one that moves the fewest elements wins.
    """
    if not matrices:
        return []
    costs = [matrix.flops for matrix in matrices]
    makespan = lightest_makespan(costs, data * tensor)
    least = max(math.ceil(sum(costs) / (data * tensor)), max(costs))
    limits = dict.fromkeys((least, least * 1.05, max(least * 1.1, makespan), makespan, 0))
    largest_first = [sorted(parts, key=lambda part: (-part.size, part.rank)) for parts in fragments]

    def best_assignment(pinned: Collection[int]) -> _Assignment:
        order = sorted(range(len(costs)), key=lambda index: (index not in pinned, -costs[index], index))
        tried = [_assign_below(limit, order, costs, largest_first, pinned, data, tensor) for limit in limits]
        lightest = min(assignment.heaviest for assignment in tried)
        balanced = [assignment for assignment in tried if assignment.heaviest <= 1.001 * lightest]
        return max(balanced, key=lambda assignment: (assignment.kept, -assignment.heaviest))

    best = best_assignment(aligned)
    if aligned and best.heaviest > _BALANCE_TOLERANCE * makespan:
        best = min(best, best_assignment(()), key=lambda assignment: assignment.heaviest)
    return best.owners


def _assign_below(
    limit: float,
    order: list[int],
    costs: list[int],
    largest_first: list[list[Fragment]],
    pinned: Collection[int],
    data: int,
    tensor: int,
) -> _Assignment:
    """Assigns the matrices in `order`.

    The owner is the rank that stores the largest fragment and whose load stays within the limit. If there is none, it
    is the least loaded rank of the grid. A pinned matrix stays on its data rank.
    """
    loads = [0] * (data * tensor)
    heap = [(0, rank) for rank in range(data * tensor)]  # (load, grid rank); an entry may be outdated, `loads` decides
    least_loaded = [rank * tensor for rank in range(data)]  # by data rank: the grid rank with the smallest load
    owners, kept = [0] * len(costs), 0
    for index in order:
        while loads[heap[0][1]] != heap[0][0]:
            heapq.heappop(heap)
        cost, owner = costs[index], heap[0][1]
        candidates = [least_loaded[fragment.rank] for fragment in largest_first[index]]
        if index in pinned:
            owner = candidates[0]
        elif loads[owner] + cost <= limit:  # else every candidate is full, too
            owner = next((rank for rank in candidates if loads[rank] + cost <= limit), owner)
        loads[owner] += cost
        heapq.heappush(heap, (loads[owner], owner))
        owners[index] = owner
        data_rank = owner // tensor
        kept += next((fragment.size for fragment in largest_first[index] if fragment.rank == data_rank), 0)
        if tensor > 1 and owner == least_loaded[data_rank]:
            of_data_rank = range(data_rank * tensor, (data_rank + 1) * tensor)
            least_loaded[data_rank] = min(of_data_rank, key=lambda rank: (loads[rank], rank))
    return _Assignment(owners, max(loads), kept)
