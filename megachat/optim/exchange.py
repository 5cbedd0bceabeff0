"""The ragged exchange of one bucket: fragments of cut matrices to their leads, and what the leads made of them back to the holders.

Both ways are lossless: fragments travel in the dtype that orthogonalization consumes and produces, scales in float32. A matrix whose only
holder is its lead is not copied, and a bucket without cut matrices communicates nothing.
"""

from dataclasses import dataclass

import torch

from megachat.optim.partition_plan import Fragment, Move, PartitionPlan, touched_rows
from megachat.parallel.collectives import all_to_all
from megachat.parallel.mesh import Axis


@dataclass(frozen=True)
class Directed:
    """The update of one local fragment: its direction [stop - start], the matrix's norm [1, 1], and the scales of the rows it touches
    ([rows, 1], tall or square) or of all columns ([1, columns], wide); float32 but for the direction."""

    matrix: int
    fragment: Fragment
    direction: torch.Tensor
    norm: torch.Tensor
    scale: torch.Tensor


class Exchange:
    """One bucket's exchange as seen by one rank of the axis. dtype: of updates and directions, bfloat16 or float32."""

    def __init__(self, plan: PartitionPlan, bucket: int, axis: Axis, dtype: torch.dtype):
        self.plan, self.axis, self.dtype = plan, axis, dtype
        moves = plan.moves[bucket]
        self.needed = bool(moves)  # the same on every rank
        ranks = range(axis.size)
        self.sent = [[move for move in moves if move.holder == axis.rank and move.lead == rank] for rank in ranks]
        self.received = [[move for move in moves if move.lead == axis.rank and move.holder == rank] for rank in ranks]
        members = plan.buckets[bucket].matrices
        self.held = {index: piece for index in members for piece in plan.fragments[index] if piece.rank == axis.rank}
        self.led = [index for index in members if plan.leads[index] == axis.rank]

    def to_leads(self, updates: torch.Tensor) -> dict[int, torch.Tensor]:
        """This rank's shard of updates, flat, to the whole matrices [m, n] that it leads, by index; some are views of `updates`."""
        arrived = {}
        if self.needed:
            parts = [[updates[self.held[move.matrix].in_shard] for move in moves] for moves in self.sent]
            counts = [sum(move.stop - move.start for move in moves) for moves in self.received]
            buffer = self._all_to_all(parts, counts, updates)
            order = [move for moves in self.received for move in moves]
            pieces = buffer.split([move.stop - move.start for move in order])
            arrived = {(move.matrix, move.start): piece for move, piece in zip(order, pieces, strict=True)}
        return {index: self._assemble(index, updates, arrived) for index in self.led}

    def to_holders(self, results: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]], like: torch.Tensor) -> list[Directed]:
        """The leads' (direction, norm, scale) by matrix to what this rank applies to its own fragments. like: gives the device."""
        returned = {}
        if self.needed:
            parts = [[part for move in moves for part in self._packed(move, *results[move.matrix])] for moves in self.received]
            order = [move for moves in self.sent for move in moves]
            buffer = self._all_to_all(parts, [sum(map(self._packed_count, moves)) for moves in self.sent], like)
            for move, part in zip(order, buffer.split([self._packed_count(move) for move in order]), strict=True):
                returned[move.matrix] = self._unpacked(move, part)
        directed = []
        for index, piece in self.held.items():
            if index in results:
                direction, norm, scale = results[index]
                own = direction.reshape(-1)[piece.start : piece.stop], norm, self._scale_part(index, piece, scale)
            else:
                own = returned[index]
            directed.append(Directed(index, piece, *own))
        return directed

    def _all_to_all(self, parts: list[list[torch.Tensor]], receive_counts: list[int], like: torch.Tensor) -> torch.Tensor:
        send_counts = [sum(part.numel() for part in own) for own in parts]
        sent = torch.cat([part for own in parts for part in own] or [like.new_empty(0, dtype=self.dtype)])
        received = like.new_empty(sum(receive_counts), dtype=self.dtype)
        all_to_all(received, sent, self.axis, receive_counts=receive_counts, send_counts=send_counts).wait()
        return received

    def _assemble(self, index: int, updates: torch.Tensor, arrived: dict[tuple[int, int], torch.Tensor]) -> torch.Tensor:
        parts = [updates[piece.in_shard] if piece.rank == self.axis.rank else arrived[index, piece.start] for piece in self.plan.fragments[index]]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).view(self.plan.matrices[index].shape)

    def _scale_part(self, index: int, piece: Fragment | Move, scale: torch.Tensor) -> torch.Tensor:
        rows, columns = self.plan.matrices[index].shape
        first, last = touched_rows(columns, piece.start, piece.stop)
        return scale[first:last] if rows >= columns else scale

    def _packed(self, move: Move, direction: torch.Tensor, norm: torch.Tensor, scale: torch.Tensor) -> list[torch.Tensor]:
        scales = torch.cat([norm.reshape(-1), self._scale_part(move.matrix, move, scale).reshape(-1)])
        return [direction.reshape(-1)[move.start : move.stop], scales.view(self.dtype)]

    def _packed_count(self, move: Move) -> int:
        return move.stop - move.start + self.plan.returned_scales(move) * (4 // self.dtype.itemsize)

    def _unpacked(self, move: Move, part: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        direction, scales = part.split([move.stop - move.start, part.numel() - (move.stop - move.start)])
        scales = scales.clone().view(torch.float32)  # a copy, because the part may begin in the middle of a float32
        rows, columns = self.plan.matrices[move.matrix].shape
        return direction, scales[:1].view(1, 1), scales[1:].view((-1, 1) if rows >= columns else (1, -1))
