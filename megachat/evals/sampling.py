"""Which token comes next: temperature, top-k and top-p, and a random stream that is the same everywhere."""

import math
from dataclasses import dataclass

import numpy as np
import torch

from megachat.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """temperature: 0 takes the most likely token. top_k: of how many most likely tokens to choose, 0 all. top_p: of the fewest most likely tokens
    that together have this probability (nucleus sampling, arXiv 1904.09751), after top_k. Raises UserError for values that mean nothing."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"the temperature is {self.temperature}: give 0, for the most likely token, or more")
        if self.top_k < 0:
            raise UserError(
                f"top-k is {self.top_k}: give 0, for all tokens, or how many of the most likely ones to choose from"
            )
        if not 0 < self.top_p <= 1:
            raise UserError(f"top-p is {self.top_p}: give a probability above 0 and up to 1")
        if self.seed < 0:
            raise UserError(f"the seed is {self.seed}: give 0 or more")

    def stream(self, row: int) -> np.random.Generator:
        """The random numbers of a row."""
        return np.random.Generator(np.random.PCG64([self.seed, row]))


GREEDY = Sampling()


def candidates(logits: torch.Tensor, sampling: Sampling) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens [n] int64, their probabilities [n] float64) from which to choose, the most likely first, of equal ones the lower token.

    logits [vocab_size] on the CPU; the temperature is above 0.
    """
    scaled = logits.double().nan_to_num()
    scaled = (scaled - scaled.max()) / sampling.temperature
    if 0 < sampling.top_k < len(scaled):
        tokens = (scaled >= scaled.topk(sampling.top_k).values[-1]).nonzero().flatten()
        tokens = tokens[scaled[tokens].sort(descending=True, stable=True).indices][: sampling.top_k]
    else:
        tokens = scaled.sort(descending=True, stable=True).indices
    shares = scaled[tokens].softmax(0)
    if sampling.top_p < 1:
        kept = 1 + int((shares.cumsum(0)[:-1] < sampling.top_p).sum())
        tokens, shares = tokens[:kept], shares[:kept] / shares[:kept].sum()
    return tokens, shares


def choose_token(logits: torch.Tensor, sampling: Sampling, drawn: float) -> int:
    """The candidate into whose share of [0, 1) the number `drawn` falls."""
    tokens, shares = candidates(logits, sampling)
    return int(tokens[min(int(torch.searchsorted(shares.cumsum(0), drawn, right=True)), len(tokens) - 1)])
