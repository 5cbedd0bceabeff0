import json
from pathlib import Path

import numpy as np
import pytest

from megachat.data.tokenizer import load_tokenizer
from megachat.errors import UserError
from megachat.prepare.lookup_allocation import (
    allocate,
    collect_words,
    load_allocation,
    sample_documents,
    save_allocation,
)
from tests.unit.data.corpus import byte_tokenizer, write_folder

FIXTURES = Path(__file__).resolve().parents[2] / "fixtures"
METHODS = ("lzw", "lzw_published", "frequency", "uniform")


class Vocabulary:
    """Stands for a tokenizer with `vocab_size` tokens."""

    def __init__(self, vocab_size, fingerprint="f" * 64):
        self.vocab_size, self.fingerprint = vocab_size, fingerprint


def plain_words(documents, vocab_size, published):
    """The paper's Algorithm 1 with whole words as keys."""
    counts = {(token,): 0 for token in range(vocab_size)}
    for document in documents:
        start = 0
        while start < len(document):
            end = start + 1
            while end < len(document) and tuple(document[start : end + 1]) in counts:
                end += 1
            counts[tuple(document[start:end])] += 1
            if end < len(document):
                counts[tuple(document[start : end + 1])] = 1
            start = end + (published and end < len(document))
    return counts


def plain_rows(counts, vocab_size, rows, most):
    allocation, left = [1] * vocab_size, rows - vocab_size
    order = [word for word in sorted(counts, key=lambda word: (-counts[word], len(word), word)) if len(word) > 1]
    while left:
        for word in order:
            if left and allocation[word[-1]] < most:
                allocation[word[-1]] += 1
                left -= 1
    return allocation


@pytest.fixture(scope="module")
def zipf():
    """A sample of 200,000 tokens of 1,000, with frequencies 1 / rank, in documents of different lengths."""
    generator = np.random.default_rng(3)
    frequencies = 1 / np.arange(1, 1001)
    ids = generator.choice(1000, size=200_000, p=frequencies / frequencies.sum())
    return np.split(ids, np.sort(generator.choice(len(ids), size=400, replace=False)))


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_the_scan_is_algorithm_1(seed, published):
    generator = np.random.default_rng(seed)
    documents = [generator.integers(0, 5, size=generator.integers(0, 60)).tolist() for _ in range(20)]
    words, expected = collect_words(documents, 7, published=published), plain_words(documents, 7, published)
    assert {tuple(words.tokens(w)): int(words.counts[w]) for w in range(len(words.counts))} == expected
    order = [tuple(words.tokens(w)) for w in words.order()]
    assert order == sorted(expected, key=lambda word: (-expected[word], len(word), word))
    method = "lzw_published" if published else "lzw"
    allocation = allocate(method, documents, Vocabulary(7), 40, 9)
    assert allocation.rows_per_token.tolist() == plain_rows(expected, 7, 40, 9)


def test_a_word_that_ends_a_document_keeps_its_count():
    words = collect_words([[1, 2], [1, 2], [1, 2]], 3)
    assert {tuple(words.tokens(w)): int(words.counts[w]) for w in range(len(words.counts))}[1, 2] == 3


@pytest.mark.parametrize("method", METHODS)
def test_sums_and_bounds(zipf, method):
    allocation = allocate(method, zipf, Vocabulary(1000), 10_000, 512)
    rows = allocation.rows_per_token
    assert rows.sum() == allocation.rows == 10_000 and rows.min() >= 1 and rows.max() <= 512
    for total, most in ((1000, 3), (3000, 3), (2999, 3), (1001, 512)):
        rows = allocate(method, zipf, Vocabulary(1000), total, most).rows_per_token
        assert rows.sum() == total and rows.min() >= 1 and rows.max() <= most


@pytest.mark.parametrize("method", ["lzw", "lzw_published"])
def test_a_zipf_sample_is_far_from_uniform(zipf, method):
    allocation = allocate(method, zipf, Vocabulary(1000), 10_000, 512)
    assert allocation.rows_per_token[0] >= 20 * np.median(allocation.rows_per_token)
    assert allocation.mean_rows > 10 * allocate("uniform", zipf, Vocabulary(1000), 10_000, 512).mean_rows


def test_rows_follow_the_frequencies(zipf):
    rows = allocate("frequency", zipf, Vocabulary(1000), 10_000, 10_000).rows_per_token
    counts = np.bincount(np.concatenate(zipf), minlength=1000)
    many = rows > 20
    assert np.allclose(rows[many] / counts[many], rows[0] / counts[0], rtol=0.05)
    assert allocate("uniform", zipf, Vocabulary(1000), 2500, 512).rows_per_token.tolist() == [3] * 500 + [2] * 500


def test_the_sample_is_the_beginning_of_the_train_split(tmp_path):
    write_folder(tmp_path / "data", [["ab", "c"], ["d" * 10], ["validation"]])
    tokenizer = byte_tokenizer()
    texts = [tokenizer.decode(ids) for ids in sample_documents(tmp_path / "data", tokenizer, 7)]
    assert texts == ["ab", "c", "dddd"]
    assert sum(map(len, sample_documents(tmp_path / "data", tokenizer, 10**9))) == 13


def test_a_file_gives_the_same_allocation_and_the_same_bytes(zipf, tmp_path):
    allocation = allocate("lzw", zipf, Vocabulary(1000), 4000, 512)
    save_allocation(allocation, tmp_path / "a.json")
    loaded = load_allocation(tmp_path / "a.json", Vocabulary(1000))
    assert (loaded.rows_per_token == allocation.rows_per_token).all() and loaded.hash == allocation.hash
    assert loaded.mean_rows == allocation.mean_rows and loaded.method == "lzw"
    save_allocation(allocate("lzw", zipf, Vocabulary(1000), 4000, 512), tmp_path / "b.json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


@pytest.mark.parametrize(
    ("change", "fact"),
    [
        (lambda content: content.update(format=9), "format 9"),
        (lambda content: content["rows_per_token"].__setitem__(0, 7), "hash"),
        (lambda content: content.pop("method"), "method"),
        (lambda content: content.update(method=[]), "damaged"),
        (lambda content: content.update(rows_per_token="x"), "not a lookup allocation"),
        (lambda content: content.update(rows_per_token=[2**40]), "not a lookup allocation"),
    ],
)
def test_a_damaged_file_is_refused(zipf, tmp_path, change, fact):
    save_allocation(allocate("uniform", zipf, Vocabulary(1000), 2000, 512), tmp_path / "a.json")
    content = json.loads((tmp_path / "a.json").read_text())
    change(content)
    (tmp_path / "a.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=fact):
        load_allocation(tmp_path / "a.json", Vocabulary(1000))


def test_bad_input_is_refused(zipf, tmp_path):
    for rows, most in ((999, 512), (3001, 3)):
        with pytest.raises(UserError, match=f"{rows:,} rows"):
            allocate("lzw", zipf, Vocabulary(1000), rows, most)
    for method in METHODS:
        with pytest.raises(UserError, match="no text"):
            allocate(method, [[]], Vocabulary(10), 20, 5)
    with pytest.raises(UserError, match="there is no lookup allocation"):
        load_allocation(tmp_path / "missing.json", Vocabulary(1000))
    save_allocation(allocate("uniform", zipf, Vocabulary(1000), 2000, 512), tmp_path / "a.json")
    for other in (Vocabulary(1000, "e" * 64), Vocabulary(1001)):
        with pytest.raises(UserError, match="another tokenizer"):
            load_allocation(tmp_path / "a.json", other)


def test_real_text():
    tokenizer = load_tokenizer(FIXTURES / "tokenizer")
    documents = list(sample_documents(FIXTURES / "data", tokenizer, 50_000))
    allocation = allocate("lzw", documents, tokenizer, 4 * tokenizer.vocab_size, 512)
    assert allocation.rows_per_token.max() >= 20 * np.median(allocation.rows_per_token)
