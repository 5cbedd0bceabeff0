import os
import pickle

import numpy as np
import pytest
import tiktoken
import torch

from megachat.data.tokenizer import SPECIAL_TOKENS
from megachat.errors import UserError
from megachat.prepare.tokenizer_training import (
    _with_short_runs,
    bytes_per_token,
    import_nanochat,
    read_texts,
    train_tokenizer,
)
from tests.unit.data.corpus import ENGLISH, NANOCHAT, byte_tokenizer, needs_shared, random_texts, write_folder


def test_training_merges_what_is_frequent():
    tokenizer = train_tokenizer(iter(["the cat and the dog and the bird"] * 20), 275)
    assert tokenizer.vocab_size == 275 and b" the" in tokenizer.ranks
    assert tokenizer.decode(tokenizer.encode("the zebra, für")) == "the zebra, für"
    assert list(tokenizer.special_tokens) == list(SPECIAL_TOKENS) and tokenizer.bos == 266
    assert train_tokenizer(iter(["the cat and the dog and the bird"] * 20), 275).fingerprint == tokenizer.fingerprint


def test_vocabularies_that_cannot_be():
    with pytest.raises(UserError, match="264 tokens is too small.* --vocab-size 265 .* or more"):
        train_tokenizer(iter(["abc"]), 264)
    assert train_tokenizer(iter(["abc"]), 265).vocab_size == 265
    with pytest.raises(UserError, match="only 3 merges, a vocabulary of 268 tokens, not 300"):
        train_tokenizer(iter(["abc abc"]), 300)


def test_training_on_long_texts_and_runs_of_blanks():
    """rustbpe panics on a million blanks in a row. Long texts without such runs train as they are."""
    trained = train_tokenizer(iter(["ab" + " " * 1_100_000 + "the cat\n" + "\t" * 1_100_000, "the dog"] * 2), 285)
    assert b" " * 512 in trained.ranks and b"\t" * 16 in trained.ranks
    texts = ["the cat and the dog " * 10_000, " \t" * 40_000, "", "a"]
    assert list(_with_short_runs(iter(texts))) == texts


def test_read_texts_keeps_to_its_limits(tmp_path):
    folder = write_folder(tmp_path, [["aaaa", "", "bb"], ["cccc"], ["validation"]])
    assert list(read_texts(folder, "train", 100, 3)) == ["aaa", "bb", "ccc"]
    assert list(read_texts(folder, "train", 5, 3)) == ["aaa", "bb"]
    assert list(read_texts(folder, "train", 6, 3)) == ["aaa", "bb", "c"]
    assert list(read_texts(folder, "validation", 5, 3)) == ["val"]


def test_bytes_per_token():
    texts = random_texts(3000, 0)
    assert bytes_per_token(byte_tokenizer(), iter(texts)) == 1.0
    assert bytes_per_token(train_tokenizer(iter(["für " * 50]), 268), iter(["für für", ""])) == 9 / 3
    assert bytes_per_token(byte_tokenizer(), iter([])) == 0


@needs_shared
def test_nanochat_tokenizer_is_imported_whole():
    tokenizer = import_nanochat(NANOCHAT)
    expected = torch.load(NANOCHAT / "token_bytes.pt", weights_only=True)
    assert np.array_equal(tokenizer.token_bytes(), expected.numpy()) and tokenizer.vocab_size == len(expected)
    assert list(tokenizer.special_tokens) == list(SPECIAL_TOKENS)


@needs_shared
def test_training_on_the_same_text_gives_nanochats_tokenizer():
    trained = train_tokenizer(read_texts(ENGLISH, "train", 2_000_000_000, 10_000), 1024)
    assert trained.fingerprint == import_nanochat(NANOCHAT).fingerprint


def encoding(**changes):
    settings = {
        "pat_str": r"\S+|\s+",
        "mergeable_ranks": byte_tokenizer().ranks,
        "special_tokens": {"<|bos|>": 256},
        **changes,
    }
    return tiktoken.Encoding("test", **settings)


@pytest.mark.parametrize("protocol", range(3, pickle.HIGHEST_PROTOCOL + 1))
def test_any_pickle_protocol_is_read(tmp_path, protocol):
    (tmp_path / "tokenizer.pkl").write_bytes(pickle.dumps(encoding(), protocol))
    assert import_nanochat(tmp_path).vocab_size == 257


class Malicious:
    def __init__(self, call, *given):
        self.call, self.given = call, given

    def __reduce__(self):
        return self.call, self.given


@pytest.mark.parametrize("protocol", [3, 4])
def test_a_malicious_pickle_is_refused_by_name_and_not_executed(tmp_path, protocol):
    trace = tmp_path / "executed"
    for content, name in (
        (Malicious(os.system, f"touch {trace}"), f"{os.name}.system"),
        ([encoding(), Malicious(open, str(trace), "w")], "io.open"),
        (Malicious(eval, f"open({str(trace)!r}, 'w')"), "builtins.eval"),
    ):
        (tmp_path / "tokenizer.pkl").write_bytes(pickle.dumps(content, protocol))
        with pytest.raises(UserError) as caught:
            import_nanochat(tmp_path)
        assert f"is refused: it refers to {name}," in str(caught.value) and "\n" not in str(caught.value)
        assert not trace.exists()


def test_files_that_are_not_an_encoding(tmp_path):
    with pytest.raises(UserError, match="tokenizer.pkl is missing"):
        import_nanochat(tmp_path)
    for content in (b"", b"garbage", pickle.dumps([1, 2]), pickle.dumps(encoding())[:-300]):
        (tmp_path / "tokenizer.pkl").write_bytes(content)
        with pytest.raises(UserError, match="is not a pickled tiktoken.Encoding"):
            import_nanochat(tmp_path)
    (tmp_path / "tokenizer.pkl").write_bytes(pickle.dumps(encoding(special_tokens={"<|bos|>": 300})))
    with pytest.raises(UserError, match="do not follow its 256 merges"):
        import_nanochat(tmp_path)
