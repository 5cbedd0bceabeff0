"""How matrices lie in flat buckets that are cut into equal shards, one a data rank: the pure layout, without owners. No torch.

The order inside a bucket puts the cuts between matrices where counts allow. On a tensor axis every rank lays out its own shards of the
matrices, all in the same way, because these shards are equal.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megachat.optim.matrix import Matrix

TINY_ELEMENTS = 16384  # matrices below this cost nothing to orthogonalize, but would spoil the alignment of the others
ALIGNMENT = 64  # elements; a shard is a multiple of it, so padding stays below 64 x ranks in each bucket


@dataclass(frozen=True)
class Fragment:
    """Elements [start, stop) of a matrix's local shard, row-major, held by `rank` from element `offset` of its part of the bucket on."""

    rank: int
    start: int
    stop: int
    offset: int

    @property
    def in_shard(self) -> slice:
        """Where it lies in its rank's part of the bucket."""
        return slice(self.offset, self.offset + self.stop - self.start)


@dataclass(frozen=True)
class Bucket:
    """A flat buffer of data ranks x shard elements. matrices: indices into the plan's; offsets: where each local shard begins in the buffer."""

    kind: str  # "aligned", "flat" or "tiny"
    shard: int
    matrices: tuple[int, ...]
    offsets: tuple[int, ...]


def lay_out(
    matrices: Sequence[Matrix], sizes: Sequence[int], ranks: int, layers_per_bucket: int, align: int
) -> list[Bucket]:
    """Layer groups in the order of backward, each an aligned and a flat bucket (either may be missing), then the tiny matrices.

    sizes: local elements of each matrix. ranks: of the data axis.
    """
    large = [index for index, matrix in enumerate(matrices) if matrix.elements >= TINY_ELEMENTS]
    tiny = [index for index, matrix in enumerate(matrices) if matrix.elements < TINY_ELEMENTS]
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


def _aligned_bucket(dealt: list[list[int]], sizes: Sequence[int], align: int) -> Bucket:
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


def _flat_bucket(kind: str, members: list[int], sizes: Sequence[int], ranks: int, align: int) -> Bucket:
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


def cut_at_shards(offset: int, size: int, shard: int) -> tuple[Fragment, ...]:
    """Elements [offset, offset + size) of a bucket as the fragments that the data ranks hold."""
    pieces, position = [], offset
    while position < offset + size:
        rank = position // shard
        end = min(offset + size, (rank + 1) * shard)
        pieces.append(Fragment(rank, position - offset, end - offset, position - rank * shard))
        position = end
    return tuple(pieces)
