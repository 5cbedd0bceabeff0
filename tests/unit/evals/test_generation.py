"""Generation with a cache against recomputing everything for each token. On ranks: tests/ranks/test_generation.py."""

import pytest
import torch

from megachat.errors import UserError
from megachat.evals.generation import LocalModel, generate
from megachat.evals.sampling import GREEDY, Sampling, choose_token
from megachat.model.gpt import ModelOptions, build_layers, logits, run_layers
from megachat.model.parameters import load_whole, placed_parameters, starting_value
from megachat.place import place_of
from megachat.planning.dimensions import Dimensions

DIMS = Dimensions(3, 64, 4, 2, 16, 48, 97, (6, 48, 48))
PROMPTS = [[5, 9, 2, 77, 3, 3, 8, 1, 60, 41], [11], [4, 8]]
SAMPLED = Sampling(1.1, top_k=40, top_p=0.95, seed=2)


@pytest.fixture(scope="module")
def model():
    layers = build_layers(DIMS, ModelOptions()).requires_grad_(False)
    for parameter in placed_parameters(layers):
        where = place_of(parameter)
        load_whole(parameter, starting_value(where.__class__(where.name, where.whole, 0, ("normal", 0.25)), seed=4))
    return LocalModel(layers, DIMS)


def recomputed(model, prompt, number, tokens, sampling):
    """The oracle: runs the uncached model on the whole text, or its last sequence_len tokens, for each token."""
    ids, stream = list(prompt), sampling.stream(number)
    for _ in range(tokens):
        last = logits(run_layers(model.layers, torch.tensor([ids[-DIMS.sequence_len :]])), DIMS)[0, -1]
        ids.append(choose_token(last, sampling, stream.random()) if sampling.temperature else int(last.argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED])
def test_several_prompts_at_once_equal_recomputation(model, sampling):
    rows = generate(model, PROMPTS, tokens=30, sampling=sampling)
    assert [row.tokens for row in rows] == [
        recomputed(model, prompt, number, 30, sampling) for number, prompt in enumerate(PROMPTS)
    ]
    assert {row.end_reason for row in rows} == {"tokens"} and len({tuple(row.tokens) for row in rows}) == 3
    assert generate(model, PROMPTS[1:], tokens=30, sampling=sampling, first=1) == rows[1:], (
        "a row must not depend on the others"
    )
    if sampling is SAMPLED:
        other = Sampling(1.1, top_k=40, top_p=0.95, seed=3)
        assert generate(model, PROMPTS, tokens=30, sampling=other) != rows


def test_a_stopped_row_ends_and_the_others_continue(model):
    whole, seen = generate(model, PROMPTS, tokens=20, sampling=SAMPLED), []
    rows = generate(
        model,
        PROMPTS,
        tokens=20,
        sampling=SAMPLED,
        stop=lambda number, new: (number, len(new)) in ((0, 1), (2, 7)),
        on_token=lambda *row: seen.append(row),
    )
    assert [(row.end_reason, row.tokens) for row in rows] == [
        ("stop", whole[0].tokens[:1]),
        ("tokens", whole[1].tokens),
        ("stop", whole[2].tokens[:7]),
    ]
    for number, row in enumerate(rows):
        assert [(token, reason) for n, token, reason in seen if n == number] == [
            *((token, "") for token in row.tokens[:-1]),
            (row.tokens[-1], row.end_reason),
        ]


def test_at_the_models_length_it_ends_or_slides(model):
    prompts = [list(range(1, 46)), [7]]
    rows = generate(model, prompts, tokens=12)
    assert [(row.end_reason, len(row.tokens)) for row in rows] == [
        ("length", 4),
        ("tokens", 12),
    ]  # its last token follows a full sequence
    slid = generate(model, [*prompts, list(range(60))], tokens=12, slide=True)
    assert [row.tokens for row in slid] == [
        recomputed(model, prompt, number, 12, GREEDY) for number, prompt in enumerate([*prompts, list(range(60))])
    ]
    assert rows[0].tokens == slid[0].tokens[:4] and {row.end_reason for row in slid} == {"tokens"}


def test_bad_prompts_are_refused_before_anything_is_computed(model):
    with pytest.raises(UserError, match="prompt 5 has 49 tokens.* 48.*shorten"):
        generate(model, [[1], [1] * 49], tokens=2, on_token=pytest.fail, first=3)
    with pytest.raises(UserError, match="prompt 1 has no tokens.*BOS"):
        generate(model, [[]], tokens=2)
    assert generate(model, [], tokens=2) == []
