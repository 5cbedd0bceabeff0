"""Bits per byte on validation text: comparable between tokenizers, equal on every layout."""

import math
from collections.abc import Iterable

import torch

from megachat.evals.local_engine import EvaluationEngine
from megachat.parallel.collectives import all_reduce
from megachat.parallel.mesh import Mesh

IGNORED = -1  # as a target: not counted


class ValidationRows:
    """This rank's share of the first `rows` rows of the validation stream, packed once and kept.

    batches: this rank's consecutive micro-batches [micro_rows, tokens + 1] int64; slot k of batch b is global row
    (b * micro_rows + k) * ranks + rank. All ranks have the same number of them: rows past the end are not counted.
    """

    def __init__(self, batches: Iterable[torch.Tensor], rows: int, micro_rows: int, mesh: Mesh):
        ranks, rank = mesh.data.size, mesh.data.rank
        self.micro_batches: list[tuple[torch.Tensor, torch.Tensor]] = []
        stream = iter(batches)
        for number in range(-(-rows // (micro_rows * ranks))):
            batch = next(stream)
            ids, targets = batch[:, :-1].clamp(min=0), batch[:, 1:].clone()
            for slot in range(micro_rows):
                if (number * micro_rows + slot) * ranks + rank >= rows:
                    targets[slot] = IGNORED
            self.micro_batches.append((ids, targets))


def bits_per_byte(engine: EvaluationEngine, rows: ValidationRows, mesh: Mesh) -> float:
    """Returns total nats / (ln 2 * total bytes) over the rows of all ranks, which all call it and get the same."""
    total = torch.zeros(2, dtype=torch.float64, device=mesh.device)
    for nats_and_bytes in engine.evaluate(rows.micro_batches):
        total += nats_and_bytes  # all ranks of the tensor axis add the same, which does not change the quotient
    all_reduce(total, mesh.world)
    nats, size = total.tolist()
    return nats / (math.log(2) * size) if size else math.inf
