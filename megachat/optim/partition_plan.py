"""Who holds and who orthogonalizes which matrix: a pure function of names, shapes, cuts and ranks. No torch, no randomness.

The data x tensor grid of a pipeline stage has places data rank x tensor ranks + tensor rank. State lies in equal contiguous shards of flat
buckets over the data axis; each tensor rank's buckets hold its shards of the matrices, laid out alike. A matrix that more than one place holds
travels in fragments to one owner, anywhere in the grid, and back. Owners are balanced by the cost of orthogonalization.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

from megachat.optim.buckets import ALIGNMENT, Bucket, Fragment, cut_at_shards, lay_out
from megachat.optim.matrix import Matrix, touched_rows
from megachat.optim.owners import assign_owners

# The cost model behind layers_per_bucket=None. Rates are assumptions for H100-class machines; only their ratio matters.
_RANKS_A_NODE = 8
_NODE_BYTES_PER_SEC = 450e9
_NETWORK_BYTES_PER_SEC = 50e9
_BUCKET_SEC = 30e-6
_NO_EXCHANGE_WINS_WITHIN = 1.25


@dataclass(frozen=True)
class Move:
    """A fragment whose holder is not the matrix's owner: elements [start, stop) of the holder's local shard go to the owner, and their direction
    goes back. holder, owner: places of the grid."""

    matrix: int
    start: int
    stop: int
    holder: int
    owner: int


@dataclass(frozen=True)
class PartitionPlan:
    """The whole division. Buckets are in the order in which backward finishes them; `pieces`, `owners` are indexed like `matrices`.

    ranks, tensor: of the data and the tensor axis. pieces: what the data ranks hold of each matrix, the same on every tensor rank.
    owners: places of the grid. Every place computes the same plan; they compare `digest` once.
    """

    matrices: tuple[Matrix, ...]
    ranks: int
    tensor: int
    layers_per_bucket: int
    buckets: tuple[Bucket, ...]
    pieces: tuple[tuple[Fragment, ...], ...] = field(repr=False)
    owners: tuple[int, ...]

    @property
    def grid_size(self) -> int:
        """Of the grid."""
        return self.ranks * self.tensor

    @property
    def digest(self) -> str:
        """sha256 over everything that ranks must agree on."""
        content = [
            [[m.name, m.shape, m.layer, m.multiplier] for m in self.matrices],
            [self.ranks, self.layers_per_bucket],
            [[b.kind, b.shard, b.matrices, b.offsets] for b in self.buckets],
            self.owners,
        ]
        if self.tensor > 1:
            content += [self.tensor, [m.cut for m in self.matrices]]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    @cached_property
    def fragments(self) -> tuple[tuple[Fragment, ...], ...]:
        """By matrix, what each place of the grid holds of its local shard: tensor rank after tensor rank, each in the order of elements."""
        if self.tensor == 1:
            return self.pieces
        return tuple(
            tuple(
                Fragment(p.rank * self.tensor + rank, p.start, p.stop, p.offset)
                for rank in range(self.tensor)
                for p in own
            )
            for own in self.pieces
        )

    @cached_property
    def moves(self) -> tuple[tuple[Move, ...], ...]:
        """By bucket, what travels between places."""
        return tuple(
            tuple(
                Move(index, piece.start, piece.stop, piece.rank, self.owners[index])
                for index in bucket.matrices
                for piece in self.fragments[index]
                if piece.rank != self.owners[index]
            )
            for bucket in self.buckets
        )

    @property
    def elements(self) -> int:
        """Elements of all matrices, whole."""
        return sum(matrix.elements for matrix in self.matrices)

    @property
    def padding(self) -> int:
        """Elements of all buckets, over all places, that belong to no matrix."""
        return self.grid_size * sum(bucket.shard for bucket in self.buckets) - self.elements

    @property
    def moved(self) -> int:
        """Elements that go to an owner elsewhere, the tiny bucket's few kilobytes apart."""
        return sum(near + far for near, far in self._travels(tiny=False).values())

    def _travels(self, *, tiny: bool) -> dict[int, tuple[int, int]]:
        """Matrix -> (elements that its owner receives from its own data rank, and from others)."""
        found = {}
        for bucket in (bucket for bucket in self.buckets if tiny or bucket.kind != "tiny"):
            for index in bucket.matrices:
                home = self.owners[index] // self.tensor
                held = sum(piece.stop - piece.start for piece in self.pieces[index] if piece.rank == home)
                found[index] = (self.tensor - 1) * held, self.matrices[index].elements - self.tensor * held
        return found

    @property
    def crosses(self) -> bool:
        """True when a large matrix's owner receives from another data rank; from the other tensor ranks it must."""
        return any(far for _, far in self._travels(tiny=False).values())

    @property
    def exposed_sec(self) -> float:
        """What forward and backward cannot hide: one bucket's reduction and gather, the busiest owner's exchange, a start-up cost a bucket."""
        rate = _NODE_BYTES_PER_SEC if self.grid_size <= _RANKS_A_NODE else _NETWORK_BYTES_PER_SEC
        near_by, far_by = [0] * self.grid_size, [0] * self.grid_size
        for index, (near, far) in self._travels(tiny=True).items():
            near_by[self.owners[index]] += near
            far_by[self.owners[index]] += far
        wires = 2 * 2 * sum(bucket.shard for bucket in self.buckets) * (self.ranks - 1)
        exchange = max(
            2 * 2 * near / _NODE_BYTES_PER_SEC + 2 * 2 * far / rate for near, far in zip(near_by, far_by, strict=True)
        )
        return wires / rate / max(1, len(self.buckets)) + exchange + _BUCKET_SEC * len(self.buckets)

    def newton_schulz_flops(self, place: int) -> int:
        """What this place orthogonalizes in a step."""
        return sum(matrix.flops for matrix, owner in zip(self.matrices, self.owners, strict=True) if owner == place)

    def state_bytes(self, place: int) -> dict[str, int]:
        """float32 state this place keeps: master and momentum of its shards, second moments of the matrices it owns."""
        shard = 4 * sum(bucket.shard for bucket in self.buckets)
        owned = sum(matrix.scales for matrix, owner in zip(self.matrices, self.owners, strict=True) if owner == place)
        return {"master": shard, "momentum": shard, "second_moment": 4 * owned}

    def wire_bytes(self, place: int, *, gradient_bytes: int, weight_bytes: int, direction_bytes: int) -> dict[str, int]:
        """Bytes this place sends in a step; the arguments are the wire's bytes an element (2 or 4).

        reduce and gather: (data ranks - 1) x shard each. exchange: fragments to owners, and directions, norm and scales back.
        """
        shard = (self.ranks - 1) * sum(bucket.shard for bucket in self.buckets)
        elements, scales = self._exchanged[place]
        return {
            "reduce": gradient_bytes * shard,
            "exchange": direction_bytes * elements + 4 * scales,
            "gather": weight_bytes * shard,
        }

    @cached_property
    def _exchanged(self) -> list[tuple[int, int]]:
        """By place: elements sent, both ways, and float32 scales sent back."""
        elements, scales = [0] * self.grid_size, [0] * self.grid_size
        for move in (move for moves in self.moves for move in moves):
            elements[move.holder] += move.stop - move.start
            elements[move.owner] += move.stop - move.start
            scales[move.owner] += self.returned_scales(move)
        return list(zip(elements, scales, strict=True))

    def returned_scales(self, move: Move) -> int:
        """float32 values that go back with a fragment: the norm, and the scales of the rows it touches, or of all columns of a wide matrix's
        local shard."""
        matrix = self.matrices[move.matrix]
        columns = matrix.local_shape(self.tensor)[1]
        first, last = touched_rows(columns, move.start, move.stop)
        return 1 + (last - first if matrix.scaled_by_row else columns)


def make_plan(
    matrices: Iterable[Matrix],
    ranks: int,
    *,
    tensor: int = 1,
    layers_per_bucket: int | None = None,
    align: int = ALIGNMENT,
) -> PartitionPlan:
    """Divide the matrices over `ranks` data ranks x `tensor` tensor ranks; the order in which they are given does not matter.

    layers_per_bucket: blocks whose matrices share buckets. None tries the powers of two and the divisors of the depth and takes the one with
    the least modelled exposed time; one whose owners need nothing from other data ranks wins already when it is within 25 % of that.
    align: shards are multiples of it, in elements. Raises ValueError for a name given twice, for no rank, and for a matrix that the tensor
    axis does not cut into equal parts.
    """
    matrices = tuple(sorted(matrices, key=lambda matrix: (matrix.layer, matrix.name)))
    if len({matrix.name for matrix in matrices}) != len(matrices):
        raise ValueError("two matrices of the Muon partition have the same name")
    if min(ranks, tensor) < 1 or (layers_per_bucket is not None and layers_per_bucket < 1):
        raise ValueError(
            f"{ranks} ranks, {tensor} tensor ranks and {layers_per_bucket} layers a bucket: all must be at least 1"
        )
    if layers_per_bucket is not None:
        return _plan(matrices, ranks, tensor, layers_per_bucket, align)
    depth = len({matrix.layer for matrix in matrices}) or 1
    powers, divisors = (
        {2**power for power in range(depth.bit_length())},
        {count for count in range(1, depth + 1) if depth % count == 0},
    )
    plans = [_plan(matrices, ranks, tensor, choice, align) for choice in sorted(powers | divisors)]
    costs = [plan.exposed_sec for plan in plans]
    best = min(costs)
    free = min((cost for cost, plan in zip(costs, plans, strict=True) if not plan.crosses), default=None)
    return plans[costs.index(best if free is None or free > _NO_EXCHANGE_WINS_WITHIN * best else free)]


def _plan(matrices: tuple[Matrix, ...], ranks: int, tensor: int, layers_per_bucket: int, align: int) -> PartitionPlan:
    shapes = [matrix.local_shape(tensor) for matrix in matrices]
    sizes = [rows * columns for rows, columns in shapes]
    buckets = lay_out(matrices, sizes, ranks, layers_per_bucket, align)
    pieces: list[tuple[Fragment, ...]] = [()] * len(matrices)
    for bucket in buckets:
        for index, offset in zip(bucket.matrices, bucket.offsets, strict=True):
            pieces[index] = cut_at_shards(offset, sizes[index], bucket.shard)
    pinned = {index for bucket in buckets if bucket.kind == "aligned" for index in bucket.matrices}
    owners = assign_owners(matrices, pieces, pinned, ranks, tensor)
    return PartitionPlan(matrices, ranks, tensor, layers_per_bucket, tuple(buckets), tuple(pieces), tuple(owners))
