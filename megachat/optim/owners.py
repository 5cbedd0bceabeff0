"""Assigns every matrix an owner: the rank of a pipeline stage that orthogonalizes it. Balanced by cost. No torch."""

import heapq
import math
from collections.abc import Collection, Sequence
from typing import NamedTuple

from megachat.optim.buckets import Fragment
from megachat.optim.matrix import Matrix

# Of the busiest rank's load over the LPT load, for aligned matrices to stay on their data rank
_BALANCE_TOLERANCE = 1.02


class _Assignment(NamedTuple):
    owners: list[int]  # grid rank of each matrix
    heaviest: int  # FLOPs of the busiest rank
    kept: int  # elements that the data ranks of the owners store already


class _Loads:
    """flops: assigned to each grid rank so far. Of equally loaded ranks, the first counts as the lightest."""

    def __init__(self, data: int, tensor: int):
        self.tensor, self.flops = tensor, [0] * (data * tensor)
        self._heap = [(0, rank) for rank in range(data * tensor)]  # (load, rank); entries of lower loads are outdated

    def lightest(self) -> int:
        """Returns the least loaded rank of the grid."""
        while self._heap[0][0] != self.flops[self._heap[0][1]]:
            heapq.heappop(self._heap)
        return self._heap[0][1]

    def lightest_of(self, data_rank: int) -> int:
        """Returns the least loaded tensor rank of a data rank, as a grid rank."""
        first = data_rank * self.tensor
        return min(range(first, first + self.tensor), key=self.flops.__getitem__)

    def add(self, rank: int, flops: int) -> None:
        self.flops[rank] += flops
        heapq.heappush(self._heap, (self.flops[rank], rank))


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

    fragments: of each matrix, over the data ranks. aligned: indices of matrices that one data rank stores whole. These
    stay on their data rank, unless the balance suffers. The other matrices go where most of them is stored, as long as
    that rank's load is below a limit. Several limits are tried. Of the assignments that are equally balanced, to 0.1 %,
    the one that moves the fewest elements wins.
    """
    if not matrices:
        return []
    costs = [matrix.flops for matrix in matrices]
    makespan = lightest_makespan(costs, data * tensor)
    least = max(math.ceil(sum(costs) / (data * tensor)), max(costs))  # no assignment has a lower busiest load
    limits = dict.fromkeys((least, least * 1.05, max(least * 1.1, makespan), makespan, 0))
    largest_first = [sorted(parts, key=lambda part: (-part.size, part.rank)) for parts in fragments]

    def best_assignment(pinned: Collection[int]) -> _Assignment:
        order = sorted(range(len(costs)), key=lambda index: (index not in pinned, -costs[index], index))
        tried = [_assign_below(limit, order, costs, largest_first, pinned, _Loads(data, tensor)) for limit in limits]
        lightest = min(assignment.heaviest for assignment in tried)
        balanced = [assignment for assignment in tried if assignment.heaviest <= 1.001 * lightest]
        return max(balanced, key=lambda assignment: (assignment.kept, -assignment.heaviest))

    best = best_assignment(pinned=aligned)
    if aligned and best.heaviest > _BALANCE_TOLERANCE * makespan:
        best = min(best, best_assignment(pinned=()), key=lambda assignment: assignment.heaviest)
    return best.owners


def _assign_below(
    limit: float,
    order: list[int],
    costs: list[int],
    largest_first: list[list[Fragment]],
    pinned: Collection[int],
    loads: _Loads,
) -> _Assignment:
    """Assigns the matrices in `order`. A pinned one goes to the data rank with its largest fragment, whatever the load
    there. Any other one goes to the data rank with the largest fragment that stays within the limit; if there is none,
    to the least loaded rank of the grid.
    """
    owners, kept = [0] * len(costs), 0
    for index in order:
        cost, owner = costs[index], loads.lightest()
        candidates = (loads.lightest_of(fragment.rank) for fragment in largest_first[index])
        if index in pinned:
            owner = next(candidates)
        elif loads.flops[owner] + cost <= limit:  # else no rank has room
            owner = next((rank for rank in candidates if loads.flops[rank] + cost <= limit), owner)
        loads.add(owner, cost)
        owners[index] = owner
        kept += sum(fragment.size for fragment in largest_first[index] if fragment.rank == owner // loads.tensor)
    return _Assignment(owners, max(loads.flops), kept)
