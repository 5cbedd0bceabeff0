"""The exchange of one bucket over the data x tensor grid: updates travel to the owners of the matrices, directions and
scales back to the ranks that store them.

Both ways are lossless: fragments are sent in the dtype that the orthogonalization reads and writes, scales in float32.
A matrix that its owner alone stores is not sent; a bucket of such matrices does not communicate. The owner assembles
the whole matrix from the fragments of all data and tensor ranks, so its results do not depend on the cuts.
"""

import itertools
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch

from megachat.optim.buckets import Fragment
from megachat.optim.partition_plan import PartitionPlan
from megachat.parallel.collectives import all_to_all
from megachat.parallel.mesh import Axis

_ALIGNED_BYTES = 16


class Result(NamedTuple):
    """The owner's result for a whole matrix, or the part of it that one fragment needs.

    direction: [m, n] of a whole matrix, flat of a fragment. norm: float32 [1, 1]. scale: float32, one value per row
    ([rows, 1], tall or square matrices) or per column ([1, columns], wide matrices). For a fragment: the rows that it
    touches, or all columns of the local matrix.
    """

    direction: torch.Tensor
    norm: torch.Tensor
    scale: torch.Tensor


class Exchange:
    """One rank's part in the exchange of a bucket. grid: mesh.stage. dtype: of updates and directions.

    fragments: those that this rank stores, by matrix index. owned: indices of the matrices that this rank owns.
    """

    def __init__(self, plan: PartitionPlan, number: int, grid: Axis, dtype: torch.dtype, device: torch.device):
        self.plan, self.number, self.grid, self.dtype, self.device = plan, number, grid, dtype, device
        bucket = plan.buckets[number]
        self.fragments = {
            index: fragment for index in bucket.matrices for rank, fragment in plan.stored(index) if rank == grid.rank
        }
        self.owned = [index for index in bucket.matrices if plan.owners[index] == grid.rank]
        transfers = plan.transfers(bucket)
        self.needed = bool(transfers)  # equal on every rank
        # (matrix index, fragment) by the other rank: whom this rank sends its updates to, and from whom it gets updates
        self._sent: list[list[tuple[int, Fragment]]] = [[] for _ in range(grid.size)]
        self._received: list[list[tuple[int, Fragment]]] = [[] for _ in range(grid.size)]
        for index, rank, fragment in transfers:
            if rank == grid.rank:
                self._sent[plan.owners[index]].append((index, fragment))
            if plan.owners[index] == grid.rank:
                self._received[rank].append((index, fragment))

    def send_to_owners(self, updates: torch.Tensor) -> Callable[[], dict[int, torch.Tensor]]:
        """Starts to send this rank's shard of the updates, a flat tensor, to the owners.

        Returns a function that waits and returns the whole updates [m, n] of the matrices that this rank owns, by
        index. Some of them are views of `updates`.
        """
        parts = [[updates[fragment.in_shard] for _, fragment in fragments] for fragments in self._sent]
        sizes = [[fragment.size for _, fragment in fragments] for fragments in self._received]
        wait = self._all_to_all(parts, sizes, "updates to owners")

        def receive() -> dict[int, torch.Tensor]:
            stored = {(index, self.grid.rank): updates[fragment.in_shard] for index, fragment in self.fragments.items()}
            for rank, (fragments, received) in enumerate(zip(self._received, wait(), strict=True)):
                stored |= {(index, rank): flat for (index, _), flat in zip(fragments, received, strict=True)}
            return {
                index: self._assemble(index, [stored[index, rank] for rank, _ in self.plan.stored(index)])
                for index in self.owned
            }

        return receive

    def send_back(self, results: dict[int, Result]) -> Callable[[], dict[int, Result]]:
        """Starts to send the results of the matrices that this rank owns to the ranks that store their fragments.

        Returns a function that waits and returns the results for this rank's fragments, by matrix index.
        """
        parts = [self._pack(rank, results) for rank in range(self.grid.size)]
        sizes = [[self._packed_size(index, fragment) for index, fragment in fragments] for fragments in self._sent]
        wait = self._all_to_all(parts, sizes, "directions from owners")
        local = {
            index: self._cut(results[index], index, self.grid.rank, fragment)
            for index, fragment in self.fragments.items()
            if index in results
        }

        def receive() -> dict[int, Result]:
            for fragments, received in zip(self._sent, wait(), strict=True):
                for (index, fragment), packed in zip(fragments, received, strict=True):
                    local[index] = self._unpack(index, fragment, packed)
            return local

        return receive

    def _all_to_all(
        self, parts: list[list[torch.Tensor]], sizes: list[list[int]], content: str
    ) -> Callable[[], list[Iterable[torch.Tensor]]]:
        """Starts to send parts[r] to grid rank r and to receive flat tensors of sizes[r] elements from it.

        Returns a function that waits and returns the received tensors by rank.
        """
        if not self.needed:
            return lambda: [()] * self.grid.size
        nothing = torch.empty(0, dtype=self.dtype, device=self.device)
        sent = torch.cat([nothing, *(part for to_rank in parts for part in to_rank)])
        send_counts = [sum(part.numel() for part in to_rank) for to_rank in parts]
        receive_counts = [sum(from_rank) for from_rank in sizes]
        received = nothing.new_empty(sum(receive_counts))
        counts = {"receive_counts": receive_counts, "send_counts": send_counts}
        name = f"Muon bucket {self.number}, {content}"
        pending = all_to_all(received, sent, self.grid, **counts, name=name, asynchronous=True)

        def wait() -> list[Iterable[torch.Tensor]]:
            pending.wait()
            # one call: most of many ranks send nothing, and each of them would take its own
            tensors = iter(received.split([size for from_rank in sizes for size in from_rank]))
            return [list(itertools.islice(tensors, len(from_rank))) for from_rank in sizes]

        return wait

    def _assemble(self, index: int, fragments: list[torch.Tensor]) -> torch.Tensor:
        """Returns the whole matrix [m, n]. fragments: flat, in the order of plan.stored()."""
        matrix, tensor = self.plan.matrices[index], self.plan.tensor
        flat = fragments[0] if len(fragments) == 1 else torch.cat(fragments)
        if flat.data_ptr() % _ALIGNED_BYTES:  # a library may choose another kernel, with other bits
            flat = flat.clone()
        if tensor == 1 or matrix.cut == "column":
            return flat.view(matrix.shape)
        return torch.cat(flat.view(tensor, *matrix.local_shape(tensor)).unbind(), dim=1)

    def _cut(self, result: Result, index: int, rank: int, fragment: Fragment) -> Result:
        """Returns the part of a whole matrix's result that its fragment on a grid rank needs."""
        matrix, tensor = self.plan.matrices[index], self.plan.tensor
        row, column = matrix.local_offset(tensor, rank % tensor)
        columns = matrix.local_shape(tensor)[1]
        first, last = fragment.rows(columns)  # of the local matrix
        touched_rows, local_columns = slice(row + first, row + last), slice(column, column + columns)
        start = fragment.start - first * columns  # in these rows
        direction = result.direction[touched_rows, local_columns].reshape(-1)[start : start + fragment.size]
        scale = result.scale[touched_rows] if matrix.scaled_by_row else result.scale[:, local_columns]
        return Result(direction, result.norm, scale)

    def _pack(self, rank: int, results: dict[int, Result]) -> list[torch.Tensor]:
        """Returns what goes back to a grid rank as flat tensors of the wire's dtype: for each fragment that came from
        it, the direction, and the bytes of norm and scale."""
        packed = []
        for index, fragment in self._received[rank]:
            part = self._cut(results[index], index, rank, fragment)
            scales = torch.cat([part.norm.reshape(-1), part.scale.reshape(-1)])
            packed += [part.direction, scales.view(self.dtype)]
        return packed

    def _packed_size(self, index: int, fragment: Fragment) -> int:
        return fragment.size + self.plan.returned_scales(index, fragment) * (4 // self.dtype.itemsize)

    def _unpack(self, index: int, fragment: Fragment, packed: torch.Tensor) -> Result:
        direction, scales = packed.split([fragment.size, packed.numel() - fragment.size])
        scales = scales.clone().view(torch.float32)  # a copy, because the view must start at a multiple of four bytes
        shape = (-1, 1) if self.plan.matrices[index].scaled_by_row else (1, -1)
        return Result(direction, scales[:1].view(1, 1), scales[1:].view(shape))
