"""Greedy continuations: the most likely token of what came before, seen through a window."""

import numpy as np
import torch

from megachat.evals.sample import continue_greedily


class Counting:
    """Most likely after `n` is n + 1 of 10; notes what it was shown."""

    def __init__(self):
        self.shown = []

    def __call__(self, window: torch.Tensor) -> torch.Tensor:
        assert window.dtype == torch.int64 and window.shape[0] == 1
        self.shown.append(window[0].tolist())
        return torch.nn.functional.one_hot((window + 1) % 10, 10).float()


def test_the_most_likely_tokens_are_appended():
    ids = np.array([3, 7], dtype=np.uint16)
    assert continue_greedily(Counting(), ids, 5, 100, torch.device("cpu")) == [3, 7, 8, 9, 0, 1, 2]
    assert ids.tolist() == [3, 7]


def test_no_more_than_the_last_tokens_are_shown():
    counting = Counting()
    continue_greedily(counting, np.array([1, 2, 3]), 4, 4, torch.device("cpu"))
    assert counting.shown[0][:3] == [1, 2, 3]
    assert all(len(shown) <= 4 for shown in counting.shown)
    assert counting.shown[-1][-4:] == [3, 4, 5, 6]
