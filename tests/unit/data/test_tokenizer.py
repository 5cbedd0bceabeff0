import itertools
import json
import random

import numpy as np
import pytest

from megachat.data.tokenizer import (
    LONGEST_RUN,
    METADATA_FILE,
    RANK_FILE,
    SPECIAL_TOKENS,
    Tokenizer,
    load_origin,
    load_tokenizer,
    save_tokenizer,
    split_long_runs,
)
from megachat.errors import UserError
from tests.unit.data.corpus import byte_tokenizer

TEXTS = ["", "hello", "don't 12345\r\n\r\n  x", "für 日本 🙂", "<|bos|> is text here", "a" * 5000]


@pytest.fixture
def folder(tmp_path):
    save_tokenizer(tmp_path / "tokenizer", byte_tokenizer(), {"made": "by hand"})
    return tmp_path / "tokenizer"


def test_texts_come_back_and_bos_stands_in_front():
    tokenizer = byte_tokenizer()
    assert (tokenizer.vocab_size, tokenizer.bos) == (265, 256)
    for threads in (1, 3):
        for text, tokens in zip(TEXTS, tokenizer.encode_batch(TEXTS, threads), strict=True):
            assert (
                tokens.dtype == np.uint16
                and tokens[0] == tokenizer.bos
                and np.array_equal(tokens[1:], tokenizer.encode(text))
            )
            assert tokenizer.decode(tokens[1:]) == text and tokenizer.bos not in tokens[1:]
            assert np.array_equal(tokenizer.encode(text, bos=True), tokens)


def test_special_tokens_follow_the_merges_in_order():
    assert list(byte_tokenizer().special_tokens.items()) == [
        (token, 256 + index) for index, token in enumerate(SPECIAL_TOKENS)
    ]
    assert byte_tokenizer().decode([264, 65]) == "<|output_end|>A"


def test_what_is_not_utf8_is_replaced():
    tokenizer = byte_tokenizer()
    assert tokenizer.decode([0xFF, 65]) == "\ufffdA"
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"


def test_token_bytes():
    ranks = {bytes([byte]): byte for byte in range(256)} | {"日".encode()[:2]: 256, "日".encode(): 257, b" the": 258}
    counts = Tokenizer(ranks).token_bytes()
    assert counts.dtype == np.int32 and counts.tolist() == [1] * 256 + [2, 3, 4] + [0] * 9


def test_a_large_vocabulary_needs_32_bits():
    pairs = (bytes(pair) for pair in itertools.product(range(256), repeat=2))
    ranks = {bytes([byte]): byte for byte in range(256)} | {pair: 256 + index for index, pair in enumerate(pairs)}
    tokens = Tokenizer(ranks).encode("zz", bos=True)
    assert tokens.dtype == np.uint32 and tokens.tolist() == [65792, 256 + 256 * ord("z") + ord("z")]


def test_saved_and_loaded_it_is_the_same(folder):
    tokenizer = load_tokenizer(folder)
    assert tokenizer.fingerprint == byte_tokenizer().fingerprint and tokenizer.ranks == byte_tokenizer().ranks
    assert load_origin(folder) == {"made": "by hand"}
    assert (folder / RANK_FILE).read_text().splitlines()[:2] == ["AA== 0", "AQ== 1"]
    assert sorted(path.name for path in folder.iterdir()) == [RANK_FILE, METADATA_FILE]


def test_fingerprint_is_of_all_that_decides_the_ids():
    ranks = byte_tokenizer().ranks
    others = [
        Tokenizer({**ranks, b"ab": 256}),
        Tokenizer(ranks, ("<|bos|>",)),
        Tokenizer(ranks, pattern=r"\s+|\S+"),
        byte_tokenizer(),
    ]
    assert len({tokenizer.fingerprint for tokenizer in others}) == 4
    assert Tokenizer(ranks, name="renamed").fingerprint == byte_tokenizer().fingerprint


def change(folder, **changes):
    path = folder / METADATA_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_folders_that_are_refused(folder, tmp_path):
    with pytest.raises(UserError, match="no tokenizer at .*nowhere .*megachat tokenizer"):
        load_tokenizer(tmp_path / "nowhere")
    for changes in ({"pattern": r"\S+|\s+"}, {"special_tokens": list(SPECIAL_TOKENS[:-1])}, {"vocab_size": 300}):
        save_tokenizer(folder, byte_tokenizer(), {})
        change(folder, **changes)
        with pytest.raises(UserError, match="tokenizer.json was modified"):
            load_tokenizer(folder)
    change(folder, pattern="(")
    with pytest.raises(UserError, match="not a valid regular expression"):
        load_tokenizer(folder)
    change(folder, special_tokens=["<|end|>"])
    with pytest.raises(UserError, match="begin with <.bos.>"):
        load_tokenizer(folder)
    for content in ("{", "[]", "{}"):
        (folder / METADATA_FILE).write_text(content)
        with pytest.raises(UserError, match="is not valid"):
            load_tokenizer(folder)


def test_an_altered_rank_file_is_refused(folder):
    path = folder / RANK_FILE
    path.write_bytes(path.read_bytes().replace(b"AA== 0\nAQ== 1\n", b"AA== 1\nAQ== 0\n"))
    with pytest.raises(UserError, match="ranks.tiktoken was modified"):
        load_tokenizer(folder)
    path.unlink()
    with pytest.raises(UserError, match="ranks.tiktoken is missing"):
        load_tokenizer(folder)


def test_ranks_with_gaps_are_refused():
    with pytest.raises(UserError, match="256 single bytes"):
        Tokenizer({bytes([byte]): byte + 1 for byte in range(256)})


BLANKS = "\t\x0b\x0c \x85\xa0\u1680\u2000\u2003\u200a\u2028\u2029\u202f\u205f\u3000"


def merging_tokenizer() -> Tokenizer:
    """Merges blanks, line ends and letters, so that another cut of a run gives other tokens."""
    merges = [b"  ", b"    ", b"\n\n", b"\r\n", b" \n", b"\t\t", b" a", b"\tb", b"ab", b"12", b"!\n", b" !", b"   "]
    return Tokenizer({bytes([byte]): byte for byte in range(256)} | {m: 256 + n for n, m in enumerate(merges)})


def test_a_text_cut_at_runs_has_the_tokens_of_the_whole_text():
    """The cut is tiktoken's at every length of run: tested where tiktoken can still tokenize the whole text."""
    rng, tokenizer = random.Random(0), merging_tokenizer()
    others = [
        "\n",
        "\r\n",
        "\r",
        "a",
        "ab",
        "B",
        "日",
        "1",
        "12",
        "!",
        "!?",
        "'s",
        "\u0301",
        "\x1c",
        "\u200b",
        "\0",
        "",
    ]
    cuts = 0
    for _ in range(20_000):
        parts = [
            rng.choice(BLANKS) * rng.randint(1, 6) if rng.random() < 0.5 else rng.choice(others)
            for _ in range(rng.randint(1, 9))
        ]
        text, longest = "".join(parts), rng.randint(1, 5)
        ids = []
        for part, is_run in split_long_runs(text, longest):
            encoding = tokenizer._encoding
            ids += encoding._encode_single_piece(part) if is_run else encoding.encode_ordinary(part)
            cuts += is_run
        assert ids == tokenizer._encoding.encode_ordinary(text), (text, longest)
    assert cuts > 10_000


@pytest.mark.parametrize("run", [" ", "\u2003", " \t"])
def test_runs_of_a_million_blanks(run):
    """tiktoken fails on them ("Max stack size exceeded"). The tokens are those of a run of any length."""
    tokenizer, count = merging_tokenizer(), 1_100_000 // len(run)
    text = "a\r\n" + run * count + "1"
    assert bytes_of(tokenizer, text) == len(text.encode())
    if run == " ":
        four, ends = tokenizer.ranks[b"    "], tokenizer.encode("a" + " " * 9 + "b").tolist()
        tokens = tokenizer.encode("a" + " " * (count + 1) + "b").tolist()
        assert tokens == ends[:1] + [four] * (count // 4) + ends[3:]


@pytest.mark.parametrize("text", ["\n", " \n", "a", "日", "1", "!", "!\n", "\x1c"])
def test_other_runs_of_a_million_characters(text):
    text *= 1_100_000 // len(text)
    assert bytes_of(merging_tokenizer(), text) == len(text.encode())


def bytes_of(tokenizer: Tokenizer, text: str) -> int:
    return tokenizer.token_bytes()[tokenizer.encode(text)].sum()


def test_a_text_around_the_bound_is_tokenized_alike():
    """Above the bound a text is cut, below it tiktoken gets it whole, and so it is in a batch and with surrogates."""
    tokenizer = merging_tokenizer()
    for count in (LONGEST_RUN - 1, LONGEST_RUN, LONGEST_RUN + 1, LONGEST_RUN + 5):
        text = "x\n" + " " * count + "ab\n" + "\t" * count
        expected = tokenizer._encoding.encode_ordinary(text)
        assert tokenizer.encode(text).tolist() == expected
        assert tokenizer.encode_batch([text, "a"], 2)[0].tolist() == [tokenizer.bos, *expected]
        assert tokenizer.encode("\ud800" + text).tolist() == tokenizer.encode("\ufffd" + text).tolist()


def test_another_pattern_that_fails_is_reported():
    tokenizer = Tokenizer(byte_tokenizer().ranks, pattern=r"\s+(?!\S)|\s+|\S+", name="other")
    with pytest.raises(UserError, match="split pattern of tokenizer other fails on a text of 1,200,001 characters"):
        tokenizer.encode("a" + "\n" * 1_200_000)
