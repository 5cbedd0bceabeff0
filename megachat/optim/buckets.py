"""The layout of the Muon partition: matrices in flat buckets, which are cut into equal shards, one per data rank.
No torch.

The order of the matrices in a bucket makes the cuts fall between matrices where their number allows it. Local matrices
have the same size on every tensor rank, so all tensor ranks use the same layout.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megachat.optim.matrix import Matrix

TINY_ELEMENTS = 16384  # smaller matrices cost nothing to orthogonalize but would spoil the alignment of the others
ALIGNMENT = 64  # elements; shard sizes are multiples of it, so a bucket has less than 64 x data ranks of padding


@dataclass(frozen=True)
class Fragment:
    """Elements [start, stop) of a local matrix, row-major. Data rank `rank` stores them from element `offset` of its
    shard on."""

    rank: int
    start: int
    stop: int
    offset: int

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.stop - self.start

    @property
    def in_shard(self) -> slice:
        """The range of the fragment in its data rank's shard."""
        return slice(self.offset, self.offset + self.size)

    def rows(self, columns: int) -> tuple[int, int]:
        """Returns the range [first, last) of rows that the fragment touches. columns: of the local matrix."""
        return self.start // columns, -(-self.stop // columns)


@dataclass(frozen=True)
class Bucket:
    """A flat buffer with one shard of `shard_size` elements per data rank.

    kind: "aligned" buckets cut no matrix, "flat" buckets may, the "tiny" bucket holds the tiny matrices. matrices:
    indices into PartitionPlan.matrices. offsets: the element of the buffer at which each of these matrices starts.
    """

    kind: str
    shard_size: int
    matrices: tuple[int, ...]
    offsets: tuple[int, ...]


def lay_out(matrices: Sequence[Matrix], sizes: Sequence[int], data: int, blocks_per_bucket: int) -> list[Bucket]:
    """Returns the buckets in the order in which the backward pass completes them.

    Every group of blocks has an aligned and a flat bucket, either of which may be missing. The tiny bucket is last.
    sizes: elements of each local matrix. data: number of data ranks.
    """
    large = [index for index, matrix in enumerate(matrices) if matrix.elements >= TINY_ELEMENTS]
    tiny = [index for index, matrix in enumerate(matrices) if matrix.elements < TINY_ELEMENTS]
    blocks = sorted({matrices[index].block for index in large}, reverse=True)
    buckets = []
    for first in range(0, len(blocks), blocks_per_bucket):
        group = blocks[first : first + blocks_per_bucket]
        classes: dict[tuple[int, int], list[int]] = {}  # matrices of the same bytes and cost
        for index in large:
            if matrices[index].block in group:
                classes.setdefault((sizes[index], min(matrices[index].shape)), []).append(index)
        by_rank: list[list[int]] = [[] for _ in range(data)]
        remainder = []
        for _, members in sorted(classes.items()):
            dealt = len(members) // data * data
            for rank in range(data):
                by_rank[rank] += members[rank:dealt:data]
            remainder += members[dealt:]
        if by_rank[0]:
            buckets.append(_aligned_bucket(by_rank, sizes))
        if remainder:
            buckets.append(_flat_bucket("flat", remainder, sizes, data))
    if tiny:
        buckets.append(_flat_bucket("tiny", tiny, sizes, data))
    return buckets


def _shard_size(elements: int) -> int:
    return -(-elements // ALIGNMENT) * ALIGNMENT


def _aligned_bucket(by_rank: list[list[int]], sizes: Sequence[int]) -> Bucket:
    """Returns the bucket in which every data rank stores its matrices of `by_rank`; their sizes are equal on all."""
    shard_size = _shard_size(sum(sizes[index] for index in by_rank[0]))
    offsets = []
    for rank, members in enumerate(by_rank):
        position = rank * shard_size
        for index in members:
            offsets.append(position)
            position += sizes[index]
    return Bucket("aligned", shard_size, tuple(index for members in by_rank for index in members), tuple(offsets))


def _flat_bucket(kind: str, members: list[int], sizes: Sequence[int], data: int) -> Bucket:
    """Returns a bucket without gaps. The largest matrix that fits into the rest of the shard comes next. If none fits,
    the largest one does and is cut."""
    shard_size = _shard_size(-(-sum(sizes[index] for index in members) // data))
    by_size: dict[int, list[int]] = {}
    for index in sorted(members, reverse=True):
        by_size.setdefault(sizes[index], []).append(index)
    order, offsets, position = [], [], 0
    while by_size:
        room = shard_size - position % shard_size
        size = max((size for size in by_size if size <= room), default=max(by_size))
        order.append(by_size[size].pop())
        offsets.append(position)
        position += size
        if not by_size[size]:
            del by_size[size]
    return Bucket(kind, shard_size, tuple(order), tuple(offsets))


def cut_at_shards(offset: int, size: int, shard_size: int) -> tuple[Fragment, ...]:
    """Returns the fragments of a local matrix of `size` elements that starts at element `offset` of a bucket."""
    ranks = range(offset // shard_size, (offset + size - 1) // shard_size + 1)
    cuts = [offset, *(rank * shard_size for rank in ranks[1:]), offset + size]
    return tuple(
        Fragment(rank, start - offset, stop - offset, start - rank * shard_size)
        for rank, start, stop in zip(ranks, cuts, cuts[1:], strict=False)
    )
