"""The cached model against the uncached one: any cutting of texts into chunks gives the logits of the whole text."""

import itertools

import pytest
import torch

from megachat.model.cache import Cache, cache_bytes, set_past
from megachat.model.gpt import ModelOptions, build_layers, logits, run_layers
from megachat.model.parameters import load_whole, placed_parameters, starting_value
from megachat.place import place_of
from megachat.planning.dimensions import NORMS, Dimensions, NgramDimensions

NGRAM = NgramDimensions((0, 2), (2, 5), 300, 24, True, 0, 12)  # the BOS is in the texts
# two windows much shorter than the texts, and shared heads
DIMS = Dimensions(4, 64, 4, 2, 16, 64, 97, (7, 20, 64, 64), ngram=NGRAM, norm_scales=NORMS)
LENGTHS = [1, 3, 40, 64, 17, 9, 200]  # the last is longer than sequence_len, and than all windows


@pytest.fixture(scope="module")
def layers():
    built = build_layers(DIMS, ModelOptions())
    for parameter in placed_parameters(built):  # none is zero, smear's among them
        place = place_of(parameter)
        load_whole(parameter, starting_value(place.__class__(place.name, place.whole, 0, ("normal", 0.3)), seed=3))
    return built.requires_grad_(False)


@pytest.fixture(scope="module")
def texts():
    return [
        torch.randint(0, DIMS.vocab_size, (length,), generator=torch.Generator().manual_seed(length))
        for length in LENGTHS
    ]


@pytest.fixture(scope="module")
def expected(layers, texts):
    return [computed(layers, text[None])[0] for text in texts]


def computed(layers, ids, chunk=None):
    set_past(layers, chunk)
    try:
        return logits(run_layers(layers, ids), DIMS)
    finally:
        set_past(layers, None)


def close(result, right):
    assert (result - right).abs().max() <= 1e-5 * right.abs().max()
    assert torch.equal(result.argmax(-1), right.argmax(-1))


def padded(parts, width, garbage=5):
    ids = torch.full((len(parts), width), garbage)
    for row, part in zip(ids, parts, strict=True):
        row[: len(part)] = part
    return ids


@pytest.mark.parametrize("chosen", [[0, 1, 2, 3, 4, 5], [3, 3]])  # of several lengths, and alike to the end
@pytest.mark.parametrize("extra", [0, 3])
@pytest.mark.parametrize("sizes", [[1], [2], [5], [64], [30, 1], [7, 8, 1, 1, 1, 9, 2], [1, 20, 3]])
def test_chunks_of_any_size_give_the_logits_of_the_whole_text(layers, texts, expected, sizes, extra, chosen):
    """All chosen texts at once, which end in different chunks; `extra`: more padding than needed."""
    texts, expected = [texts[i] for i in chosen], [expected[i] for i in chosen]
    cache, begin, result, turns = (
        Cache(DIMS, len(texts), max(map(len, texts))),
        0,
        [[] for _ in texts],
        itertools.chain(sizes, itertools.repeat(sizes[-1])),
    )
    while begin < max(map(len, texts)):
        size = next(turns)
        parts = [text[begin : begin + size] for text in texts]
        chunk = cache.extend(list(map(len, parts)))
        output = computed(layers, padded(parts, size + extra), chunk)
        for slots in (8, 21, min(65, cache.tokens)):
            slot_of = chunk._slots(size + extra, slots)[[0, 2]]
            assert slot_of.unique(dim=1).size(1) == slot_of.size(1), (
                "two tokens in one slot: which is kept would be chance on a GPU"
            )
        for kept, row, part in zip(result, output, parts, strict=True):
            kept.append(row[: len(part)])
        begin += size
    assert cache.lengths == [LENGTHS[i] for i in chosen]
    for kept, right in zip(result, expected, strict=True):
        close(torch.cat(kept), right)


@pytest.mark.parametrize("sizes", [[200], [100, 1, 1, 50], [7, 60, 1, 70]])
def test_texts_longer_than_sequence_len_keep_their_windows(layers, texts, expected, sizes):
    test_chunks_of_any_size_give_the_logits_of_the_whole_text(layers, texts, expected, sizes, 3, [2, 6])


@pytest.mark.parametrize("tokens", [51, 64])
def test_rows_branch_from_a_prefix_that_stays(layers, texts, expected, tokens):
    """Branches of any number of tokens, in any order, before and after the prefix grows; then rows copied from it."""
    prefixes = [texts[2][:30], texts[3][:45], texts[4][:2]]
    cache = Cache(DIMS, 3, tokens)
    computed(layers, padded(prefixes, 45), cache.extend([30, 45, 2]))
    rows = [1, 0, 1, 2, 2]
    tails = [texts[3][45:], texts[2][30:35], torch.tensor([9, 8, 7]), texts[4][2:], torch.tensor([50])]
    for _ in range(2):
        output = computed(layers, padded(tails, 19), cache.branch(rows))
        for row, result, tail in zip(rows, output, tails, strict=True):
            close(result[: len(tail)], computed(layers, torch.cat((prefixes[row], tail))[None])[0, -len(tail) :])
        assert cache.lengths == list(map(len, prefixes))
        more = [torch.tensor([3]), torch.tensor([1, 2, 3]), torch.tensor([4, 5])]
        computed(layers, padded(more, 3), cache.extend([1, 3, 2]))
        prefixes = [torch.cat(pair) for pair in zip(prefixes, more, strict=True)]
        tails = [tail[:4] for tail in tails]
    copied = cache.select([2, 0, 2])
    following = torch.tensor([[1], [2], [3]])
    output = computed(layers, following, copied.extend([1, 1, 1]))
    for row, result, token in zip([2, 0, 2], output, following, strict=True):
        close(result, computed(layers, torch.cat((prefixes[row], token))[None])[0, -1:])
    assert cache.lengths == list(map(len, prefixes)) and copied.lengths == [7, 33, 7]


def test_what_does_not_fit_is_refused_and_bytes_are_foretold(layers, texts):
    cache = Cache(DIMS, 2, 30)
    for lengths in ([31, 1], [1], [1, 2, 3]):
        with pytest.raises(ValueError, match="cannot grow by"):
            cache.extend(lengths)
    assert cache.lengths == [0, 0] and cache.bytes == 0
    computed(layers, texts[3][None, :20].expand(2, -1), cache.extend([20, 11]))
    assert cache.bytes == cache_bytes(DIMS, 2, 30, torch.float32)
    assert cache.bytes == 2 * 4 * (2 * 2 * 16 * (8 + 21 + 30 + 30) + 64) + 2 * 8 * 4  # the last embedding and 4 ids
    with pytest.raises(ValueError, match="a cache of 641 tokens for a model of at most 640"):
        Cache(DIMS, 1, 641)
