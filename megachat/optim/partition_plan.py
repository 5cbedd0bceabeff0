"""Who holds and who orthogonalizes which matrix: a pure function of names, shapes and the number of ranks. No torch, no randomness.

State lies in equal contiguous shards of flat buckets. The order inside a bucket puts the cuts between matrices where counts allow;
where a matrix is cut nevertheless, its fragments travel to one lead and back. Leads are balanced by the cost of orthogonalization.
"""

import hashlib
import heapq
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field

TINY_ELEMENTS = 16384  # matrices below this cost nothing to orthogonalize, but would spoil the alignment of the others
ALIGNMENT = 64  # elements; a shard is a multiple of it, so padding stays below 64 x ranks in each bucket
NEWTON_SCHULZ_STEPS = 5
_BALANCE_TOLERANCE = 1.02  # leads leave aligned matrices only when that lightens the heaviest rank by more

# The cost model behind layers_per_bucket=None. Rates are assumptions for H100-class machines; only their ratio matters.
_RANKS_A_NODE = 8
_NODE_BYTES_PER_SEC = 450e9
_NETWORK_BYTES_PER_SEC = 50e9
_BUCKET_SEC = 30e-6
_NO_EXCHANGE_WINS_WITHIN = 1.25


@dataclass(frozen=True)
class Matrix:
    """One weight matrix. layer: its block, 0 is the first of the forward pass. multiplier: of the learning rate."""

    name: str
    shape: tuple[int, int]
    layer: int
    multiplier: float = 1.0

    @property
    def elements(self) -> int:
        """rows x columns."""
        return self.shape[0] * self.shape[1]

    @property
    def flops(self) -> int:
        """Orthogonalization in five steps with the Gram matrix on the smaller side."""
        short, long = min(self.shape), max(self.shape)
        return NEWTON_SCHULZ_STEPS * (4 * short * short * long + 2 * short**3)

    @property
    def scales(self) -> int:
        """Values in the second moment: one a row when tall or square, else one a column, so the longer side."""
        return max(self.shape)


@dataclass(frozen=True)
class Fragment:
    """Elements [start, stop) of a matrix, row-major, held by `rank` from element `offset` of its shard on."""

    rank: int
    start: int
    stop: int
    offset: int

    @property
    def in_shard(self) -> slice:
        """Where it lies in its rank's shard."""
        return slice(self.offset, self.offset + self.stop - self.start)


@dataclass(frozen=True)
class Bucket:
    """A flat buffer of ranks x shard elements. matrices: indices into the plan's; offsets: where each begins in the buffer."""

    kind: str  # "aligned", "flat" or "tiny"
    shard: int
    matrices: tuple[int, ...]
    offsets: tuple[int, ...]


@dataclass(frozen=True)
class Move:
    """A fragment whose holder is not the matrix's lead: elements [start, stop) go from holder to lead, and their direction goes back."""

    matrix: int
    start: int
    stop: int
    holder: int
    lead: int


@dataclass(frozen=True)
class PartitionPlan:
    """The whole division. Buckets are in the order in which backward finishes them; `fragments`, `leads` are indexed like `matrices`.

    Every rank computes the same plan; ranks compare `digest` once.
    """

    matrices: tuple[Matrix, ...]
    ranks: int
    layers_per_bucket: int
    buckets: tuple[Bucket, ...]
    fragments: tuple[tuple[Fragment, ...], ...]
    leads: tuple[int, ...]
    moves: tuple[tuple[Move, ...], ...] = field(repr=False)  # by bucket

    @property
    def digest(self) -> str:
        """sha256 over everything that ranks must agree on."""
        text = json.dumps(
            [
                [[m.name, m.shape, m.layer, m.multiplier] for m in self.matrices],
                [self.ranks, self.layers_per_bucket],
                [[b.kind, b.shard, b.matrices, b.offsets] for b in self.buckets],
                self.leads,
            ]
        )
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def elements(self) -> int:
        """Elements of all matrices."""
        return sum(matrix.elements for matrix in self.matrices)

    @property
    def padding(self) -> int:
        """Elements of all buckets, over all ranks, that belong to no matrix."""
        return self.ranks * sum(bucket.shard for bucket in self.buckets) - self.elements

    @property
    def moved(self) -> int:
        """Elements that go to a lead elsewhere, the tiny bucket's few kilobytes apart."""
        return sum(move.stop - move.start for bucket, moves in zip(self.buckets, self.moves, strict=True) if bucket.kind != "tiny" for move in moves)

    def newton_schulz_flops(self, rank: int) -> int:
        """What this rank orthogonalizes in a step."""
        return sum(matrix.flops for matrix, lead in zip(self.matrices, self.leads, strict=True) if lead == rank)

    def state_bytes(self, rank: int) -> dict[str, int]:
        """float32 state this rank keeps: master and momentum of its shards, second moments of the matrices it leads."""
        shard = 4 * sum(bucket.shard for bucket in self.buckets)
        led = sum(matrix.scales for matrix, lead in zip(self.matrices, self.leads, strict=True) if lead == rank)
        return {"master": shard, "momentum": shard, "second_moment": 4 * led}

    def wire_bytes(self, rank: int, *, gradient_bytes: int, weight_bytes: int, direction_bytes: int) -> dict[str, int]:
        """Bytes this rank sends in a step; the arguments are the wire's bytes an element (2 or 4).

        reduce and gather: (ranks - 1) x shard each. exchange: fragments to leads, and directions, norm and scales back.
        """
        shard = (self.ranks - 1) * sum(bucket.shard for bucket in self.buckets)
        exchange = 0
        for move in (move for moves in self.moves for move in moves):
            if move.holder == rank:
                exchange += direction_bytes * (move.stop - move.start)
            if move.lead == rank:
                exchange += direction_bytes * (move.stop - move.start) + 4 * self.returned_scales(move)
        return {"reduce": gradient_bytes * shard, "exchange": exchange, "gather": weight_bytes * shard}

    def returned_scales(self, move: Move) -> int:
        """float32 values that go back with a fragment: the norm, and the scales of the rows it touches, or of all columns of a wide matrix."""
        rows, columns = self.matrices[move.matrix].shape
        first, last = touched_rows(columns, move.start, move.stop)
        return 1 + (last - first if rows >= columns else columns)


def touched_rows(columns: int, start: int, stop: int) -> tuple[int, int]:
    """The rows [first, last) that elements [start, stop) of a row-major matrix lie in."""
    return start // columns, -(-stop // columns)


def make_plan(matrices: Iterable[Matrix], ranks: int, *, layers_per_bucket: int | None = None, align: int = ALIGNMENT) -> PartitionPlan:
    """Divide the matrices over `ranks`; the order in which they are given does not matter.

    layers_per_bucket: blocks whose matrices share buckets. None tries the powers of two and the divisors of the depth and takes the one with
    the least modelled exposed time (`_exposed_sec`); one that cuts no matrix wins already when it is within 25 % of that.
    align: shards are multiples of it, in elements. Raises ValueError for a name given twice or for no rank.
    """
    matrices = tuple(sorted(matrices, key=lambda matrix: (matrix.layer, matrix.name)))
    if len({matrix.name for matrix in matrices}) != len(matrices):
        raise ValueError("two matrices of the Muon partition have the same name")
    if ranks < 1 or (layers_per_bucket is not None and layers_per_bucket < 1):
        raise ValueError(f"{ranks} ranks and {layers_per_bucket} layers a bucket: both must be at least 1")
    if layers_per_bucket is not None:
        return _plan(matrices, ranks, layers_per_bucket, align)
    depth = len({matrix.layer for matrix in matrices}) or 1
    powers, divisors = {2**power for power in range(depth.bit_length())}, {count for count in range(1, depth + 1) if depth % count == 0}
    choices = sorted(powers | divisors)
    plans = [_plan(matrices, ranks, choice, align) for choice in choices]
    best = min(plans, key=_exposed_sec)
    free = min((plan for plan in plans if not plan.moved), key=_exposed_sec, default=None)
    return free if free and _exposed_sec(free) <= _NO_EXCHANGE_WINS_WITHIN * _exposed_sec(best) else best


def _exposed_sec(plan: PartitionPlan) -> float:
    """What forward and backward cannot hide: one bucket's reduction and gather, the busiest lead's exchange, a start-up cost a bucket."""
    rate = _NODE_BYTES_PER_SEC if plan.ranks <= _RANKS_A_NODE else _NETWORK_BYTES_PER_SEC
    received = [0] * plan.ranks
    for move in (move for moves in plan.moves for move in moves):
        received[move.lead] += move.stop - move.start
    wires = 2 * 2 * sum(bucket.shard for bucket in plan.buckets) * (plan.ranks - 1)
    return wires / rate / max(1, len(plan.buckets)) + 2 * 2 * max(received) / rate + _BUCKET_SEC * len(plan.buckets)


def _plan(matrices: tuple[Matrix, ...], ranks: int, layers_per_bucket: int, align: int) -> PartitionPlan:
    buckets = _buckets(matrices, ranks, layers_per_bucket, align)
    fragments: list[tuple[Fragment, ...]] = [()] * len(matrices)
    for bucket in buckets:
        for index, offset in zip(bucket.matrices, bucket.offsets, strict=True):
            fragments[index] = _fragments(offset, matrices[index].elements, bucket.shard)
    pinned = {index for bucket in buckets if bucket.kind == "aligned" for index in bucket.matrices}
    leads = _leads(matrices, fragments, pinned, ranks)
    moves = tuple(
        tuple(
            Move(index, piece.start, piece.stop, piece.rank, leads[index])
            for index in bucket.matrices
            for piece in fragments[index]
            if piece.rank != leads[index]
        )
        for bucket in buckets
    )
    return PartitionPlan(matrices, ranks, layers_per_bucket, tuple(buckets), tuple(fragments), tuple(leads), moves)


def _buckets(matrices: tuple[Matrix, ...], ranks: int, layers_per_bucket: int, align: int) -> list[Bucket]:
    """Layer groups in the order of backward, each an aligned and a flat bucket (either may be missing), then the tiny matrices."""
    sizes = [matrix.elements for matrix in matrices]
    large = [index for index, size in enumerate(sizes) if size >= TINY_ELEMENTS]
    tiny = [index for index, size in enumerate(sizes) if size < TINY_ELEMENTS]
    layers = sorted({matrices[index].layer for index in large}, reverse=True)
    buckets = []
    for first in range(0, len(layers), layers_per_bucket):
        group = set(layers[first : first + layers_per_bucket])
        classes: dict[tuple[int, int], list[int]] = {}
        for index in (index for index in large if matrices[index].layer in group):
            classes.setdefault((sizes[index], min(matrices[index].shape)), []).append(index)
        dealt: list[list[int]] = [[] for _ in range(ranks)]
        rest = []
        for _, members in sorted(classes.items()):
            whole = len(members) // ranks * ranks
            for place, index in enumerate(members[:whole]):
                dealt[place % ranks].append(index)
            rest += members[whole:]
        if dealt[0]:
            buckets.append(_aligned_bucket(dealt, sizes, align))
        if rest:
            buckets.append(_flat_bucket("flat", rest, sizes, ranks, align))
    if tiny:
        buckets.append(_flat_bucket("tiny", tiny, sizes, ranks, align))
    return buckets


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _aligned_bucket(dealt: list[list[int]], sizes: list[int], align: int) -> Bucket:
    """Every rank gets the same size classes, hence the same bytes and the same cost, and no matrix is cut."""
    shard = _up(sum(sizes[index] for index in dealt[0]), align)
    members, offsets = [], []
    for rank, own in enumerate(dealt):
        position = rank * shard
        for index in own:
            members.append(index)
            offsets.append(position)
            position += sizes[index]
    return Bucket("aligned", shard, tuple(members), tuple(offsets))


def _flat_bucket(kind: str, members: list[int], sizes: list[int], ranks: int, align: int) -> Bucket:
    """Equal cuts through a greedy order: the largest matrix that still fits into the shard, else the largest left straddles the cut."""
    shard = _up(-(-sum(sizes[index] for index in members) // ranks), align)
    by_size: dict[int, list[int]] = {}
    for index in sorted(members, reverse=True):
        by_size.setdefault(sizes[index], []).append(index)
    order, offsets, position = [], [], 0
    while by_size:
        room = shard - position % shard
        size = max((size for size in by_size if size <= room), default=max(by_size))
        order.append(by_size[size].pop())
        offsets.append(position)
        position += size
        if not by_size[size]:
            del by_size[size]
    return Bucket(kind, shard, tuple(order), tuple(offsets))


def _fragments(offset: int, size: int, shard: int) -> tuple[Fragment, ...]:
    pieces, position = [], offset
    while position < offset + size:
        rank = position // shard
        end = min(offset + size, (rank + 1) * shard)
        pieces.append(Fragment(rank, position - offset, end - offset, position - rank * shard))
        position = end
    return tuple(pieces)


def lightest_makespan(costs: list[int], ranks: int) -> int:
    """The heaviest rank's load when the costs are dealt in decreasing order to the lightest rank (LPT)."""
    heap = [0] * ranks
    for cost in sorted(costs, reverse=True):
        heapq.heapreplace(heap, heap[0] + cost)
    return max(heap)


def _leads(matrices: tuple[Matrix, ...], fragments: list[tuple[Fragment, ...]], pinned: set[int], ranks: int) -> list[int]:
    """One lead a matrix. Aligned matrices stay at home; others go, in decreasing cost, to the holder of the largest piece that is not full yet.

    Several limits for "full" are tried: between equally balanced outcomes the one that moves fewer elements wins.
    """
    if not matrices:
        return []
    makespan = lightest_makespan([matrix.flops for matrix in matrices], ranks)
    leads, heaviest = _best_leads(matrices, fragments, pinned, ranks, makespan)
    if heaviest > _BALANCE_TOLERANCE * makespan and pinned:
        unpinned, lighter = _best_leads(matrices, fragments, set(), ranks, makespan)
        if lighter < heaviest:
            return unpinned
    return leads


def _best_leads(
    matrices: tuple[Matrix, ...], fragments: list[tuple[Fragment, ...]], pinned: set[int], ranks: int, makespan: int
) -> tuple[list[int], int]:
    costs = [matrix.flops for matrix in matrices]
    least = max(math.ceil(sum(costs) / ranks), max(costs))
    order = sorted(range(len(costs)), key=lambda index: (index not in pinned, -costs[index], index))
    tried = []
    for limit in dict.fromkeys((least, least * 1.05, max(least * 1.1, makespan), makespan, 0)):
        tried.append(_leads_under(limit, order, costs, fragments, pinned, ranks))
    lightest = min(heaviest for _, heaviest, _ in tried)
    leads, heaviest, _ = min((attempt for attempt in tried if attempt[1] <= 1.001 * lightest), key=lambda attempt: (attempt[2], attempt[1]))
    return leads, heaviest


def _leads_under(
    limit: float, order: list[int], costs: list[int], fragments: list[tuple[Fragment, ...]], pinned: set[int], ranks: int
) -> tuple[list[int], int, int]:
    """(leads, heaviest load, elements moved) when no holder takes a matrix that would lift it over the limit."""
    loads = [0] * ranks
    heap = [(0, rank) for rank in range(ranks)]  # entries may be out of date; the true load decides
    leads, moved = [0] * len(costs), 0
    for index in order:
        by_piece = sorted(fragments[index], key=lambda piece: (piece.start - piece.stop, piece.rank))
        home = (piece.rank for piece in by_piece if index in pinned or loads[piece.rank] + costs[index] <= limit)
        lead = next(home, None)
        if lead is None:
            while loads[heap[0][1]] != heap[0][0]:
                heapq.heappop(heap)
            lead = heap[0][1]
        loads[lead] += costs[index]
        heapq.heappush(heap, (loads[lead], lead))
        leads[index] = lead
        moved += sum(piece.stop - piece.start for piece in fragments[index] if piece.rank != lead)
    return leads, max(loads), moved
