"""Bits per byte on validation text: comparable between tokenizers, equal on every layout."""

import math
from collections.abc import Iterable

import torch

from megachat.parallel.collectives import all_reduce
from megachat.parallel.engine import Engine
from megachat.parallel.mesh import Mesh


class ValidationRows:
    """The first `rows` rows of the validation stream, this rank's share, packed once and kept.

    batches: tensors [micro_rows, tokens + 1] int64 of consecutive micro-batches; slot k of batch b is global row (b * micro_rows + k) * ranks + rank.
    """

    def __init__(self, batches: Iterable[torch.Tensor], rows: int, micro_rows: int, mesh: Mesh):
        self.micro_batches = []
        each = iter(batches)
        ranks, rank = mesh.data.size, mesh.data.rank
        for number in range(-(-rows // (micro_rows * ranks))):
            batch = next(each)
            ids, targets = batch[:, :-1].contiguous(), batch[:, 1:].clone()
            for slot in range(micro_rows):
                if (number * micro_rows + slot) * ranks + rank >= rows:
                    targets[slot] = -1  # beyond the asked rows: computed to keep shapes, never counted
            self.micro_batches.append((ids, targets))


def bits_per_byte(engine: Engine, rows: ValidationRows, mesh: Mesh) -> float:
    """Total nats / (ln 2 * total bytes) over the rows of all ranks; all ranks call it and get the same number."""
    total = torch.zeros(2, dtype=torch.float64, device=mesh.device)
    for nats_and_bytes in engine.evaluate(rows.micro_batches):
        total += nats_and_bytes  # on every rank of the tensor axis alike, which leaves the quotient as it is
    all_reduce(total, mesh.world)
    nats, size = total.tolist()
    return nats / (math.log(2) * size) if size else math.inf
