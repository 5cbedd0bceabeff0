"""Generation with the cache in one process against computing everything anew for each token. On ranks: tests/ranks/test_generation.py."""

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


def anew(model, prompt, number, tokens, sampling):
    """The oracle: the whole text through the uncached model for each token, at most the last that it can take."""
    ids, stream = list(prompt), sampling.stream(number)
    for _ in range(tokens):
        last = logits(run_layers(model.layers, torch.tensor([ids[-DIMS.sequence_len :]])), DIMS)[0, -1]
        ids.append(choose_token(last, sampling, stream.random()) if sampling.temperature else int(last.argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED])
def test_several_prompts_at_once_are_what_computing_anew_gives(model, sampling):
    found = generate(model, PROMPTS, tokens=30, sampling=sampling)
    assert [row.new for row in found] == [
        anew(model, prompt, number, 30, sampling) for number, prompt in enumerate(PROMPTS)
    ]
    assert {row.why for row in found} == {"tokens"} and len({tuple(row.new) for row in found}) == 3
    assert generate(model, PROMPTS[1:], tokens=30, sampling=sampling, first=1) == found[1:], (
        "a row depends on the others"
    )
    if sampling is SAMPLED:
        other = Sampling(1.1, top_k=40, top_p=0.95, seed=3)
        assert generate(model, PROMPTS, tokens=30, sampling=other) != found


def test_a_row_ends_where_it_is_told_to_and_the_others_go_on(model):
    whole, told = generate(model, PROMPTS, tokens=20, sampling=SAMPLED), []
    found = generate(
        model,
        PROMPTS,
        tokens=20,
        sampling=SAMPLED,
        ends=lambda number, new: (number, len(new)) in ((0, 1), (2, 7)),
        told=lambda *row: told.append(row),
    )
    assert [(row.why, row.new) for row in found] == [
        ("stop", whole[0].new[:1]),
        ("tokens", whole[1].new),
        ("stop", whole[2].new[:7]),
    ]
    for number, row in enumerate(found):
        assert [(token, why) for n, token, why in told if n == number] == [
            *((token, "") for token in row.new[:-1]),
            (row.new[-1], row.why),
        ]


def test_at_the_models_length_it_ends_or_slides(model):
    prompts = [list(range(1, 46)), [7]]
    found = generate(model, prompts, tokens=12)
    assert [(row.why, len(row.new)) for row in found] == [
        ("length", 4),
        ("tokens", 12),
    ]  # the last token was chosen after all that it can take
    slid = generate(model, [*prompts, list(range(60))], tokens=12, slide=True)
    assert [row.new for row in slid] == [
        anew(model, prompt, number, 12, GREEDY) for number, prompt in enumerate([*prompts, list(range(60))])
    ]
    assert found[0].new == slid[0].new[:4] and {row.why for row in slid} == {"tokens"}


def test_prompts_that_cannot_be_continued_are_refused_before_anything_is_computed(model):
    with pytest.raises(UserError, match="prompt 5 has 49 tokens and the model can take 48: shorten it"):
        generate(model, [[1], [1] * 49], tokens=2, told=pytest.fail, first=3)
    with pytest.raises(UserError, match="prompt 1 has no tokens: begin it with the tokenizer's BOS"):
        generate(model, [[]], tokens=2)
    assert generate(model, [], tokens=2) == []
