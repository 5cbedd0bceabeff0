"""Continuations of prompts, greedy, recomputed from the start for each token."""

from collections.abc import Callable

import numpy as np
import torch


@torch.no_grad()
def continue_greedily(
    next_logits: Callable[[torch.Tensor], torch.Tensor], ids: np.ndarray, tokens: int, longest: int, device: torch.device
) -> list[int]:
    """`ids` with the most likely `tokens` more, as a list.

    next_logits: ids [1, length] int64 -> logits [1, length, vocabulary]; it sees at most the last `longest` tokens.
    """
    row = [int(token) for token in ids]
    for _ in range(tokens):
        window = torch.tensor([row[-longest:]], device=device)
        row.append(int(next_logits(window)[0, -1].argmax()))
    return row
