"""Temperature, top-k and top-p on known probabilities."""

import collections

import numpy as np
import pytest
import torch

from megachat.errors import UserError
from megachat.evals.sampling import Sampling, candidates, choose_token

PROBABILITIES = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15])  # the order of likelihood: 1, 3, 4, 0, 2
LOGITS = PROBABILITIES.log() + 2.5


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(1.0), {1: 0.4, 3: 0.3, 4: 0.15, 0: 0.1, 2: 0.05}),
        (
            Sampling(0.5),
            {
                token: probability**2 / 0.285
                for token, probability in ((1, 0.4), (3, 0.3), (4, 0.15), (0, 0.1), (2, 0.05))
            },
        ),
        (Sampling(1.0, top_k=1), {1: 1.0}),
        (Sampling(1.0, top_k=3), {1: 0.4 / 0.85, 3: 0.3 / 0.85, 4: 0.15 / 0.85}),
        (Sampling(1.0, top_k=9), {1: 0.4, 3: 0.3, 4: 0.15, 0: 0.1, 2: 0.05}),
        (Sampling(1.0, top_p=0.39), {1: 1.0}),
        (Sampling(1.0, top_p=0.41), {1: 4 / 7, 3: 3 / 7}),  # the fewest tokens that reach it together
        (Sampling(1.0, top_p=0.9), {1: 0.4 / 0.95, 3: 0.3 / 0.95, 4: 0.15 / 0.95, 0: 0.1 / 0.95}),
        (Sampling(1.0, top_p=1e-9), {1: 1.0}),
        (Sampling(1.0, top_k=2, top_p=0.5), {1: 1.0}),  # the first of the two has 4 / 7
        (Sampling(1.0, top_k=2, top_p=0.6), {1: 4 / 7, 3: 3 / 7}),
        (Sampling(1e-6), {1: 1.0, 3: 0.0, 4: 0.0, 0: 0.0, 2: 0.0}),
    ],
)
def test_candidates_and_how_often_they_are_chosen(sampling, expected):
    tokens, probabilities = candidates(LOGITS, sampling)
    assert tokens.tolist() == list(expected)
    assert probabilities.tolist() == pytest.approx(list(expected.values()), rel=1e-5)
    drawn = collections.Counter(choose_token(LOGITS, sampling, (i + 0.5) / 2000) for i in range(2000))
    for token, probability in expected.items():
        assert abs(drawn[token] / 2000 - probability) <= 1 / 2000, token
    assert sum(drawn.values()) == 2000 and choose_token(LOGITS, sampling, np.nextafter(1.0, 0.0)) in expected


def test_lower_tokens_are_kept_among_equally_likely_ones():
    tokens, probabilities = candidates(torch.tensor([1.0, 3.0, 3.0, 0.0, 3.0, 3.0]), Sampling(1.0, top_k=3))
    assert tokens.tolist() == [1, 2, 4] and probabilities.tolist() == pytest.approx([1 / 3] * 3)


def test_random_streams_depend_on_seed_and_row():
    def drawn(seed, row):
        return Sampling(1.0, seed=seed).stream(row).random(4).tolist()

    assert drawn(3, 1) == drawn(3, 1)
    assert len({tuple(drawn(seed, row)) for seed in range(3) for row in range(3)}) == 9


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -0.1}, "the temperature is -0.1.*give 0"),
        ({"temperature": float("nan")}, "the temperature is nan.*give 0"),
        ({"temperature": float("inf")}, "the temperature is inf.*give 0"),
        ({"top_k": -1}, "top-k is -1.*give 0"),
        ({"top_p": 0.0}, "top-p is 0.0.*above 0 and up to 1"),
        ({"top_p": 1.1}, "top-p is 1.1.*above 0 and up to 1"),
        ({"seed": -1}, "seed is -1.*0 or more"),
    ],
)
def test_values_out_of_range_are_refused(values, message):
    with pytest.raises(UserError, match=message):
        Sampling(**values)
