"""Greedy continuations: the most likely token of what came before, seen through a window. With a real engine: tests/ranks/test_pipeline.py."""

import numpy as np
import torch

from megachat.evals.sample import continue_greedily
from megachat.parallel.mesh import Axis, Mesh

ALONE = Axis("world", 1, 0, None, (0,))
MESH = Mesh(world=ALONE, data=ALONE, tensor=ALONE, pipeline=ALONE, stage=ALONE, saving=ALONE, device=torch.device("cpu"), topology=None)


class Counting:
    """In an engine's place: most likely after `n` is n + 1 of 10; notes the rows it was shown, without padding."""

    def __init__(self):
        self.shown, self.widths = [], set()

    def evaluate(self, micro_batches, most_likely):
        ((ids, positions),) = micro_batches
        assert ids.dtype == torch.int64
        self.widths.add(ids.size(1))
        self.shown.append([row[: position + 1].tolist() for row, position in zip(ids, positions, strict=True)])
        return [(ids[torch.arange(len(ids)), positions] + 1) % 10]


def continued(engine, prompts, tokens, longest, multiple=1):
    ids = [np.array(prompt, dtype=np.uint16) for prompt in prompts]
    rows = continue_greedily(engine, torch.nn.Identity(), ids, tokens, longest, MESH, multiple=multiple)
    assert [row.tolist() for row in ids] == prompts
    return rows


def test_the_most_likely_tokens_are_appended():
    engine = Counting()
    assert continued(engine, [[3, 7], [4]], 5, 100) == [[3, 7, 8, 9, 0, 1, 2], [4, 5, 6, 7, 8, 9]]
    assert engine.widths == {6}, "one shape for all tokens, no longer than needed"


def test_no_more_than_the_last_tokens_are_shown():
    engine = Counting()
    continued(engine, [[1, 2, 3], [5]], 4, 4)
    assert engine.shown[0] == [[1, 2, 3], [5]] and engine.shown[-1] == [[3, 4, 5, 6], [5, 6, 7, 8]]


def test_rows_are_padded_to_a_multiple():
    engine = Counting()
    continued(engine, [[1, 2, 3]], 3, 8, multiple=4)
    assert engine.widths == {8}
