"""The plan of the Muon partition: which rank stores and which rank orthogonalizes each matrix. A pure function of
names, shapes, cuts and rank counts. No torch.

The grid is the data x tensor ranks of a pipeline stage; grid rank = data rank x tensor ranks + tensor rank. State is
stored in equal shards of flat buckets, one per data rank. Each tensor rank has its own buckets, which hold its local
matrices in the same layout. A matrix that its owner does not store whole travels in fragments to the owner, which may
be any rank of the grid, and back.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field

from megachat.optim.buckets import Bucket, Fragment, cut_at_shards, lay_out
from megachat.optim.matrix import Matrix
from megachat.optim.owners import assign_owners

# The cost model that chooses blocks_per_bucket. Rates are assumed for H100-class machines; only their ratio matters.
_RANKS_PER_NODE = 8
_NODE_BYTES_PER_SEC = 450e9
_NETWORK_BYTES_PER_SEC = 50e9
_BUCKET_SEC = 30e-6
_LOCAL_WINS_WITHIN = 1.25


@dataclass(frozen=True)
class PartitionPlan:
    """The whole partition, equal on every rank of the grid.

    matrices: sorted by block and name. data, tensor: ranks of the axes. buckets: in the order in which the backward
    pass completes them. owners: grid rank that orthogonalizes each matrix. fragments: of each local matrix, over the
    data ranks; equal on all tensor ranks.
    """

    matrices: tuple[Matrix, ...]
    data: int
    tensor: int
    blocks_per_bucket: int
    buckets: tuple[Bucket, ...]
    owners: tuple[int, ...]
    fragments: tuple[tuple[Fragment, ...], ...] = field(repr=False)  # follows from the buckets

    @property
    def digest(self) -> str:
        """sha256 of the plan, which the ranks compare."""
        return hashlib.sha256(repr(self).encode()).hexdigest()

    @property
    def grid_size(self) -> int:
        """Number of ranks of the grid."""
        return self.data * self.tensor

    @property
    def shard_elements(self) -> int:
        """Elements of one rank's shards of all buckets, padding included."""
        return sum(bucket.shard_size for bucket in self.buckets)

    @property
    def elements(self) -> int:
        """Elements of all matrices."""
        return sum(matrix.elements for matrix in self.matrices)

    @property
    def padding(self) -> int:
        """Elements of all shards of all ranks that belong to no matrix."""
        return self.grid_size * self.shard_elements - self.elements

    def stored(self, index: int) -> list[tuple[int, Fragment]]:
        """Returns (grid rank, fragment) for every fragment of a matrix, those of tensor rank 0 first."""
        return [
            (fragment.rank * self.tensor + rank, fragment)
            for rank in range(self.tensor)
            for fragment in self.fragments[index]
        ]

    def transfers(self, bucket: Bucket) -> list[tuple[int, int, Fragment]]:
        """Returns (matrix index, grid rank, fragment) for fragments of the bucket that their owner does not store."""
        return [
            (index, rank, fragment)
            for index in bucket.matrices
            for rank, fragment in self.stored(index)
            if rank != self.owners[index]
        ]

    def returned_scales(self, index: int, fragment: Fragment) -> int:
        """Returns how many float32 values the owner sends back with the direction of a fragment. One is the norm. Tall
        and square matrices have one more for each row that the fragment touches, wide ones for each local column."""
        matrix = self.matrices[index]
        columns = matrix.local_shape(self.tensor)[1]
        first, last = fragment.rows(columns)
        return 1 + (last - first if matrix.scaled_by_row else columns)

    def flops(self) -> list[int]:
        """Returns the FLOPs that each grid rank spends on orthogonalization in a step."""
        flops = [0] * self.grid_size
        for matrix, owner in zip(self.matrices, self.owners, strict=True):
            flops[owner] += matrix.flops
        return flops

    def state_bytes(self, rank: int) -> dict[str, int]:
        """Returns the bytes of float32 state on a grid rank: of masters and momentum of its shards, and of the second
        moments of the matrices that it owns. A second moment has one value per row or column, whichever are more."""
        owned = [matrix for matrix, owner in zip(self.matrices, self.owners, strict=True) if owner == rank]
        shards = 4 * self.shard_elements
        return {"master": shards, "momentum": shards, "second_moment": 4 * sum(max(matrix.shape) for matrix in owned)}

    def wire_bytes(self, *, gradient_bytes: int, weight_bytes: int, direction_bytes: int) -> list[dict[str, int]]:
        """Returns the bytes that each grid rank sends in a step. The arguments are bytes per element (2 or 4).

        reduce and gather: (data ranks - 1) x shard each. exchange: fragments to owners; directions and scales back.
        """
        exchange = [0] * self.grid_size
        for bucket in self.buckets:
            for index, rank, fragment in self.transfers(bucket):
                exchange[rank] += direction_bytes * fragment.size
                returned = direction_bytes * fragment.size + 4 * self.returned_scales(index, fragment)
                exchange[self.owners[index]] += returned
        shards = (self.data - 1) * self.shard_elements
        fixed = {"reduce": gradient_bytes * shards, "gather": weight_bytes * shards}
        return [fixed | {"exchange": sent} for sent in exchange]

    @property
    def crosses_data_ranks(self) -> bool:
        """Whether the owner of a large matrix receives fragments of it from another data rank."""
        return any(
            fragment.rank != self.owners[index] // self.tensor
            for bucket in self.buckets
            if bucket.kind != "tiny"
            for index in bucket.matrices
            for fragment in self.fragments[index]
        )

    def exposed_sec(self) -> float:
        """Returns the modelled time per step that forward and backward passes cannot hide.

        It is the reduce and gather of one bucket, the exchange of the owner that receives most, and a start-up cost per
        bucket. Whatever is sent is bfloat16, and sent twice: gradients and weights, updates and directions.
        """
        across = _NODE_BYTES_PER_SEC if self.grid_size <= _RANKS_PER_NODE else _NETWORK_BYTES_PER_SEC
        near, far = [0] * self.grid_size, [0] * self.grid_size  # elements received from the same data rank, from others
        for matrix, owner, fragments in zip(self.matrices, self.owners, self.fragments, strict=True):
            stored = sum(fragment.size for fragment in fragments if fragment.rank == owner // self.tensor)
            near[owner] += (self.tensor - 1) * stored  # tensor ranks of a data rank store equally much
            far[owner] += matrix.elements - self.tensor * stored
        exchange = max(4 * a / _NODE_BYTES_PER_SEC + 4 * b / across for a, b in zip(near, far, strict=True))
        bucket = 4 * self.shard_elements * (self.data - 1) / across / max(1, len(self.buckets))
        return bucket + exchange + _BUCKET_SEC * len(self.buckets)


def make_plan(
    matrices: Iterable[Matrix], data: int, *, tensor: int = 1, blocks_per_bucket: int | None = None
) -> PartitionPlan:
    """Plans the partition of the matrices, given in any order, over `data` data ranks x `tensor` tensor ranks.

    blocks_per_bucket: number of blocks whose matrices share buckets. None tries the powers of two and the divisors of
    the depth and takes the plan with the least modelled exposed time. A plan in which owners of large matrices receive
    nothing from other data ranks wins if it is within 25 % of that.
    Raises ValueError for a duplicate name, a count below 1, and a matrix that the tensor axis does not cut evenly.
    """
    matrices = tuple(sorted(matrices, key=lambda matrix: (matrix.block, matrix.name)))
    if len({matrix.name for matrix in matrices}) != len(matrices):
        raise ValueError("two matrices of the Muon partition have the same name")
    if min(data, tensor, 1 if blocks_per_bucket is None else blocks_per_bucket) < 1:
        raise ValueError(f"{data=}, {tensor=} and {blocks_per_bucket=} must be at least 1")
    if blocks_per_bucket is not None:
        return _plan(matrices, data, tensor, blocks_per_bucket)
    depth = len({matrix.block for matrix in matrices}) or 1
    choices = {2**power for power in range(depth.bit_length())} | {n for n in range(1, depth + 1) if depth % n == 0}
    plans = [_plan(matrices, data, tensor, choice) for choice in sorted(choices)]
    ranked = sorted(((plan.exposed_sec(), plan) for plan in plans), key=lambda pair: pair[0])
    best_sec, best = ranked[0]
    fast = [plan for sec, plan in ranked if sec <= _LOCAL_WINS_WITHIN * best_sec]
    return next((plan for plan in fast if not plan.crosses_data_ranks), best)


def _plan(matrices: tuple[Matrix, ...], data: int, tensor: int, blocks_per_bucket: int) -> PartitionPlan:
    shapes = [matrix.local_shape(tensor) for matrix in matrices]
    sizes = [rows * columns for rows, columns in shapes]
    buckets = lay_out(matrices, sizes, data, blocks_per_bucket)
    fragments: list[tuple[Fragment, ...]] = [()] * len(matrices)
    for bucket in buckets:
        for index, offset in zip(bucket.matrices, bucket.offsets, strict=True):
            fragments[index] = cut_at_shards(offset, sizes[index], bucket.shard_size)
    aligned = {index for bucket in buckets if bucket.kind == "aligned" for index in bucket.matrices}
    owners = assign_owners(matrices, fragments, aligned, data, tensor)
    return PartitionPlan(matrices, data, tensor, blocks_per_bucket, tuple(buckets), tuple(owners), tuple(fragments))
