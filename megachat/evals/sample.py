"""Continuations of prompts, greedy, recomputed from the start for each token, through the engine and so on every layout."""

import numpy as np
import torch

from megachat.parallel.collectives import all_reduce
from megachat.parallel.engine import Engine
from megachat.parallel.mesh import Mesh


def continue_greedily(
    engine: Engine, most_likely: torch.nn.Module, prompts: list[np.ndarray], tokens: int, longest: int, mesh: Mesh, *, multiple: int = 1
) -> list[list[int]]:
    """Each prompt's ids [length] int64 with the most likely `tokens` more; all ranks call it and get the same.

    most_likely: the head's output and positions [batch] int64 to token ids [batch] (megachat.model.gpt.GreedyToken). The model sees at most the
    last `longest` tokens. Rows are padded at the end, where a causal model's earlier positions do not see it, to one length for all, a
    multiple of `multiple`.
    """
    rows = [[int(token) for token in ids] for ids in prompts]
    width = min(longest, max(map(len, rows)) + tokens - 1)
    width = -(-width // multiple) * multiple
    for _ in range(tokens):
        windows = [row[-width:] for row in rows]
        ids = torch.zeros(len(rows), width, dtype=torch.int64)
        for slot, window in enumerate(windows):
            ids[slot, : len(window)] = torch.tensor(window)
        found = torch.zeros(len(rows), dtype=torch.int64, device=mesh.device)
        for output in engine.evaluate([(ids, torch.tensor([len(window) - 1 for window in windows]))], most_likely):
            found += output
        all_reduce(found, mesh.pipeline, name="sampled tokens from the last stage")  # the other stages add zeros
        for row, token in zip(rows, found.tolist(), strict=True):
            row.append(token)
    return rows
