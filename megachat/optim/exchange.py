"""The ragged exchange of one bucket over the data x tensor grid: fragments to their matrices' owners, and what the owners made of them back.

Both ways are lossless: fragments travel in the dtype that orthogonalization consumes and produces, scales in float32. A matrix whose only
holder is its owner is not sent, and a bucket of such matrices communicates nothing. An owner puts the shards of the tensor ranks together to the
whole matrix, so that what it computes knows no cut.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from megachat.optim.buckets import Fragment
from megachat.optim.matrix import touched_rows
from megachat.optim.partition_plan import Move, PartitionPlan
from megachat.parallel.collectives import Pending, all_to_all
from megachat.parallel.mesh import Axis

_ALIGNED_BYTES = 16
Result = tuple[
    torch.Tensor, torch.Tensor, torch.Tensor
]  # an owner's (direction [m, n], norm [1, 1], scale [m, 1] or [1, n])


@dataclass(frozen=True)
class Directed:
    """The update of one local fragment: its direction [stop - start], the matrix's norm [1, 1], and the scales of the rows it touches
    ([rows, 1], tall or square) or of all columns of its local shard ([1, columns], wide); float32 but for the direction."""

    matrix: int
    fragment: Fragment
    direction: torch.Tensor
    norm: torch.Tensor
    scale: torch.Tensor


class Exchange:
    """One bucket's exchange as seen by one place of the grid. grid: mesh.stage. dtype: of updates and directions, bfloat16 or float32."""

    def __init__(self, plan: PartitionPlan, bucket: int, grid: Axis, dtype: torch.dtype):
        self.plan, self.bucket, self.grid, self.dtype = plan, bucket, grid, dtype
        moves = plan.moves[bucket]
        self.needed = bool(moves)  # the same at every place
        places = range(grid.size)
        self.sent = [[move for move in moves if move.holder == grid.rank and move.owner == place] for place in places]
        self.received = [
            [move for move in moves if move.owner == grid.rank and move.holder == place] for place in places
        ]
        members = plan.buckets[bucket].matrices
        self.held = {index: piece for index in members for piece in plan.fragments[index] if piece.rank == grid.rank}
        self.owned = [index for index in members if plan.owners[index] == grid.rank]

    def to_owners(self, updates: torch.Tensor) -> Callable[[], dict[int, torch.Tensor]]:
        """Send this place's part of the bucket, flat. The returned function waits and gives the whole matrices [m, n] that this place owns, by
        index; some are views of `updates`."""
        pending, buffer = Pending(), updates[:0]
        if self.needed:
            parts = [[updates[self.held[move.matrix].in_shard] for move in moves] for moves in self.sent]
            counts = [sum(move.stop - move.start for move in moves) for moves in self.received]
            pending, buffer = self._all_to_all(parts, counts, updates, "updates to owners")

        def arrived() -> dict[int, torch.Tensor]:
            pending.wait()
            order = [move for moves in self.received for move in moves]
            pieces = buffer.split([move.stop - move.start for move in order]) if order else ()
            found = {(move.matrix, move.holder): piece for move, piece in zip(order, pieces, strict=True)}
            return {index: self._assemble(index, updates, found) for index in self.owned}

        return arrived

    def to_holders(self, results: dict[int, Result], like: torch.Tensor) -> Callable[[], list[Directed]]:
        """Send the results of the matrices that this place owns. The returned function waits and gives what this place applies to its own
        fragments. like: gives the device."""
        pending, buffer = Pending(), like[:0]
        if self.needed:
            local = {
                (index, rank): self._local(index, rank, result[0])
                for index, result in results.items()
                for rank in range(self.plan.tensor)
            }
            parts = [
                [part for move in moves for part in self._packed(move, local, *results[move.matrix][1:])]
                for moves in self.received
            ]
            counts = [sum(map(self._packed_count, moves)) for moves in self.sent]
            pending, buffer = self._all_to_all(parts, counts, like, "directions to holders")

        def arrived() -> list[Directed]:
            pending.wait()
            order = [move for moves in self.sent for move in moves]
            parts = buffer.split([self._packed_count(move) for move in order]) if order else ()
            returned = {move.matrix: self._unpacked(move, part) for move, part in zip(order, parts, strict=True)}
            return [
                Directed(index, piece, *(returned.get(index) or self._own(piece, index, *results[index])))
                for index, piece in self.held.items()
            ]

        return arrived

    def _all_to_all(
        self, parts: list[list[torch.Tensor]], receive_counts: list[int], like: torch.Tensor, what: str
    ) -> tuple[Pending, torch.Tensor]:
        send_counts = [sum(part.numel() for part in own) for own in parts]
        sent = torch.cat([part for own in parts for part in own] or [like.new_empty(0, dtype=self.dtype)])
        received = like.new_empty(sum(receive_counts), dtype=self.dtype)
        name = f"Muon bucket {self.bucket}, {what}"
        counts = {"receive_counts": receive_counts, "send_counts": send_counts}
        return all_to_all(received, sent, self.grid, **counts, name=name, asynchronous=True), received

    def _assemble(
        self, index: int, updates: torch.Tensor, arrived: dict[tuple[int, int], torch.Tensor]
    ) -> torch.Tensor:
        plan, matrix = self.plan, self.plan.matrices[index]
        parts = [
            updates[piece.in_shard] if piece.rank == self.grid.rank else arrived[index, piece.rank]
            for piece in plan.fragments[index]
        ]
        flat = parts[0] if len(parts) == 1 else torch.cat(parts)  # tensor rank after tensor rank
        if flat.data_ptr() % _ALIGNED_BYTES:  # a library may choose another kernel, with other bits
            flat = flat.clone()
        if plan.tensor == 1 or matrix.cut == "column":
            return flat.view(matrix.shape)
        return torch.cat(flat.view(plan.tensor, *matrix.local_shape(plan.tensor)).unbind(), dim=1)

    def _local(self, index: int, rank: int, direction: torch.Tensor) -> torch.Tensor:
        """Tensor rank `rank`'s part of a whole [m, n], flat."""
        matrix, tensor = self.plan.matrices[index], self.plan.tensor
        row, column = matrix.local_offset(tensor, rank)
        rows, columns = matrix.local_shape(tensor)
        return direction[row : row + rows, column : column + columns].reshape(-1)

    def _scales(self, index: int, piece: Fragment | Move, rank: int, scale: torch.Tensor) -> torch.Tensor:
        """What a fragment of tensor rank `rank` needs of the whole matrix's scales."""
        matrix, tensor = self.plan.matrices[index], self.plan.tensor
        row, column = matrix.local_offset(tensor, rank)
        columns = matrix.local_shape(tensor)[1]
        first, last = touched_rows(columns, piece.start, piece.stop)
        return scale[row + first : row + last] if matrix.scaled_by_row else scale[:, column : column + columns]

    def _own(
        self, piece: Fragment, index: int, direction: torch.Tensor, norm: torch.Tensor, scale: torch.Tensor
    ) -> Result:
        rank = self.grid.rank % self.plan.tensor
        return (
            self._local(index, rank, direction)[piece.start : piece.stop],
            norm,
            self._scales(index, piece, rank, scale),
        )

    def _packed(
        self, move: Move, local: dict[tuple[int, int], torch.Tensor], norm: torch.Tensor, scale: torch.Tensor
    ) -> list[torch.Tensor]:
        rank = move.holder % self.plan.tensor
        scales = torch.cat([norm.reshape(-1), self._scales(move.matrix, move, rank, scale).reshape(-1)])
        return [local[move.matrix, rank][move.start : move.stop], scales.view(self.dtype)]

    def _packed_count(self, move: Move) -> int:
        return move.stop - move.start + self.plan.returned_scales(move) * (4 // self.dtype.itemsize)

    def _unpacked(self, move: Move, part: torch.Tensor) -> Result:
        direction, scales = part.split([move.stop - move.start, part.numel() - (move.stop - move.start)])
        scales = scales.clone().view(torch.float32)  # a copy, because the part may begin in the middle of a float32
        return (
            direction,
            scales[:1].view(1, 1),
            scales[1:].view((-1, 1) if self.plan.matrices[move.matrix].scaled_by_row else (1, -1)),
        )
