"""Chooses the next token: temperature, top-k and top-p, with random numbers that are the same on every layout."""

import math
from dataclasses import dataclass

import numpy as np
import torch

from megachat.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """Sampling settings. Raises UserError for values out of range.

    temperature: 0 takes the most likely token. top_k: choose among this many most likely tokens, 0 for all. top_p: of
    these, choose among the fewest most likely tokens that together have this probability (nucleus sampling, arXiv
    1904.09751).
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"the temperature is {self.temperature}: give 0 (the most likely token) or more")
        if self.top_k < 0:
            raise UserError(f"top-k is {self.top_k}: give 0 (all tokens) or the number of most likely tokens")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top-p is {self.top_p}: give a probability above 0 and up to 1")
        if self.seed < 0:
            raise UserError(f"the seed is {self.seed}: give 0 or more")

    def stream(self, row: int) -> np.random.Generator:
        """Returns the random stream of one row."""
        return np.random.Generator(np.random.PCG64([self.seed, row]))


GREEDY = Sampling()


def candidates(logits: torch.Tensor, sampling: Sampling) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the tokens [n] int64 to choose from and their probabilities [n] float64, the most likely first.

    Equally likely tokens are in increasing order. logits: [vocab_size] on the CPU. The temperature must be above 0.
    """
    scaled = logits.double().nan_to_num()
    scaled = (scaled - scaled.max()) / sampling.temperature
    if 0 < sampling.top_k < len(scaled):
        tokens = (scaled >= scaled.topk(sampling.top_k).values[-1]).nonzero().flatten()
        tokens = tokens[scaled[tokens].sort(descending=True, stable=True).indices][: sampling.top_k]
    else:
        tokens = scaled.sort(descending=True, stable=True).indices
    probabilities = scaled[tokens].softmax(0)
    if sampling.top_p < 1:
        kept = 1 + int((probabilities.cumsum(0)[:-1] < sampling.top_p).sum())
        tokens, probabilities = tokens[:kept], probabilities[:kept] / probabilities[:kept].sum()
    return tokens, probabilities


def choose_token(logits: torch.Tensor, sampling: Sampling, drawn: float) -> int:
    """Returns the candidate into whose part of [0, 1) the random number `drawn` falls."""
    tokens, probabilities = candidates(logits, sampling)
    index = int(torch.searchsorted(probabilities.cumsum(0), drawn, right=True))
    return int(tokens[min(index, len(tokens) - 1)])
