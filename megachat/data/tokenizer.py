"""The tokenizer: a folder with a rank file (tiktoken's text format) and tokenizer.json; tiktoken encodes. No pickle."""

import base64
import binascii
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import tiktoken

from megachat.errors import UserError, raise_if_unreadable, summary
from megachat.files import lfs_problem, write_atomically

RANK_FILE = "ranks.tiktoken"
METADATA_FILE = "tokenizer.json"
BOS = "<|bos|>"
SPECIAL_TOKENS = (
    BOS,
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    "<|assistant_end|>",
    "<|python_start|>",
    "<|python_end|>",
    "<|output_start|>",
    "<|output_end|>",
)
# nanochat's pattern: GPT-4's, but with at most two digits per group, so that numbers take less of a small vocabulary.
SPLIT_PATTERN = (
    r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"""
)
# \s without line ends, as tiktoken's regular expressions define it; Python's \s has four control characters more.
_BLANK = "\t\x0b\x0c \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
# tiktoken and rustbpe fail on a million blanks in a row: `\s+(?!\S)` keeps one stack entry for each.
LONGEST_RUN = 100_000


class Tokenizer:
    """Byte-level BPE. Ids 0 to len(ranks) - 1 are the merges (rank = id), followed by the special tokens in order.

    fingerprint: SHA-256 (hex) over ranks, special tokens and pattern, which together determine the ids of a text.
    """

    def __init__(
        self,
        ranks: dict[bytes, int],
        special_tokens: Sequence[str] = SPECIAL_TOKENS,
        pattern: str = SPLIT_PATTERN,
        name: str = "megachat",
    ):
        if sorted(ranks.values()) != list(range(len(ranks))) or any(bytes([byte]) not in ranks for byte in range(256)):
            raise UserError(
                f"the ranks of tokenizer {name} are not 0 to {len(ranks) - 1} with all 256 single bytes: train it again"
            )
        if not special_tokens or special_tokens[0] != BOS or len(set(special_tokens)) != len(special_tokens):
            raise UserError(
                f"the special tokens of tokenizer {name} are {', '.join(special_tokens) or 'none'}: "
                f"they must be different and begin with {BOS}"
            )
        self.name, self.pattern, self.ranks = name, pattern, ranks
        self.special_tokens = {token: len(ranks) + index for index, token in enumerate(special_tokens)}
        self.vocab_size = len(ranks) + len(special_tokens)
        self.bos = self.special_tokens[BOS]
        self.dtype: np.dtype = np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)
        content = json.dumps([hashlib.sha256(rank_file_content(ranks)).hexdigest(), list(special_tokens), pattern])
        self.fingerprint = hashlib.sha256(content.encode()).hexdigest()
        try:
            self._encoding = tiktoken.Encoding(
                name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=self.special_tokens
            )
        except ValueError as error:
            raise UserError(
                f"the split pattern of tokenizer {name} is not a valid regular expression ({error}): train it again"
            ) from None

    def encode(self, text: str, *, bos: bool = False) -> np.ndarray:
        """Returns the ids [n] of a text, uint16 (uint32 above 65,536 tokens). bos: put BOS first.

        Names of special tokens in a text are ordinary text. Lone surrogates become U+FFFD. Raises UserError if another
        split pattern than SPLIT_PATTERN fails on the text.
        """
        try:
            ids = self._ids(text)
        except UnicodeEncodeError:  # lone surrogates, which UTF-8 cannot represent
            ids = self._ids(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
        tokens = np.empty(len(ids) + bos, dtype=self.dtype)
        tokens[:bos] = self.bos
        tokens[bos:] = ids
        return tokens

    def _ids(self, text: str) -> np.ndarray:
        whole = self._encoding.encode_to_numpy
        if len(text) > LONGEST_RUN and self.pattern == SPLIT_PATTERN:
            parts = [
                np.array(self._encoding._encode_single_piece(part), np.uint32)
                if is_run
                else whole(part, disallowed_special=())
                for part, is_run in split_long_runs(text)
            ]
            return np.concatenate(parts)
        try:
            return whole(text, disallowed_special=())
        except UnicodeEncodeError:
            raise
        except ValueError as error:
            raise UserError(
                f"the split pattern of tokenizer {self.name} fails on a text of {len(text):,} characters that begins "
                f"with {text[:20]!r} ({summary(error)}): leave the text out, or use a tokenizer with megachat's pattern"
            ) from None

    @property
    def cuts_words(self) -> bool:
        """Whether no token has characters of two words that are separated by whitespace, as SPLIT_PATTERN ensures."""
        return self.pattern == SPLIT_PATTERN

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> list[np.ndarray]:
        """Encodes each text with BOS first. Threads run in parallel, because tiktoken releases the interpreter lock."""
        if threads == 1 or len(texts) < 2:
            return [self.encode(text, bos=True) for text in texts]
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(lambda text: self.encode(text, bos=True), texts))

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Returns the text; bytes that are not UTF-8 become U+FFFD. Raises KeyError for an id outside the
        vocabulary.
        """
        return self._encoding.decode([int(i) for i in ids], errors="replace")

    def token_bytes(self) -> np.ndarray:
        """Returns the bytes per token, int32 [vocab_size]; 0 for special tokens, which bits per byte must not count."""
        counts = np.zeros(self.vocab_size, dtype=np.int32)
        for token, rank in self.ranks.items():
            counts[rank] = len(token)
        return counts


def split_long_runs(text: str, longest: int = LONGEST_RUN) -> Iterator[tuple[str, bool]]:
    """Yields (part, is_run) with the text cut at runs of more than `longest` blanks (whitespace without line ends).

    is_run: SPLIT_PATTERN matches the whole part as one piece. It matches the other parts as it matches them in the
    whole text, so the tokens of the parts together are those of the text. It leaves the last blank of a run to the
    piece after it, and takes blanks before a line end together with that line end, which needs no stack.
    """
    start = 0
    # The look-behind keeps a run that is just too short from being scanned again from each of its blanks.
    for run in re.finditer(f"(?<![{_BLANK}])[{_BLANK}]{{{longest + 1},}}", text):
        end = run.end()
        if end < len(text):
            if text[end] in "\r\n":
                continue
            end -= 1
        yield text[start : run.start()], False
        yield text[run.start() : end], True
        start = end
    yield text[start:], False


def rank_file_content(ranks: dict[bytes, int]) -> bytes:
    """Returns the rank file's content: one line `base64 rank` per token, in the order of ranks."""
    return b"".join(
        base64.b64encode(token) + b" %d\n" % rank for token, rank in sorted(ranks.items(), key=lambda item: item[1])
    )


def save_tokenizer(folder: str | Path, tokenizer: Tokenizer, origin: dict) -> None:
    """Writes the rank file, then tokenizer.json with its hash. origin: JSON-able, how the tokenizer was made."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    ranks = rank_file_content(tokenizer.ranks)
    metadata = {
        "name": tokenizer.name,
        "vocab_size": tokenizer.vocab_size,
        "pattern": tokenizer.pattern,
        "special_tokens": list(tokenizer.special_tokens),
        "rank_file": RANK_FILE,
        "rank_file_sha256": hashlib.sha256(ranks).hexdigest(),
        "fingerprint": tokenizer.fingerprint,
        "origin": origin,
    }
    (folder / METADATA_FILE).unlink(missing_ok=True)
    write_atomically(folder / RANK_FILE, ranks)
    write_atomically(folder / METADATA_FILE, json.dumps(metadata, indent=1, ensure_ascii=False).encode() + b"\n")


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Loads the tokenizer of a folder. Raises UserError if it is missing, invalid or modified."""
    folder = Path(folder)
    try:
        metadata = json.loads((folder / METADATA_FILE).read_text(encoding="utf-8"))
        content = (folder / RANK_FILE).read_bytes()
        if hashlib.sha256(content).hexdigest() != metadata["rank_file_sha256"]:
            if pointer := lfs_problem(folder / RANK_FILE):
                raise UserError(f"{folder / RANK_FILE} {pointer}")
            raise UserError(
                f"{folder / RANK_FILE} was modified: it does not match its SHA-256 in {METADATA_FILE}; "
                "train the tokenizer again or copy the folder again"
            )
        ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in content.splitlines())}
        tokenizer = Tokenizer(ranks, metadata["special_tokens"], metadata["pattern"], metadata["name"])
        saved = metadata["vocab_size"], metadata["fingerprint"]
    except FileNotFoundError as error:
        raise UserError(
            f"there is no tokenizer at {folder} ({Path(error.filename).name} is missing): "
            "make one with `megachat tokenizer`"
        ) from None
    except (ValueError, KeyError, TypeError, OSError, binascii.Error) as error:
        raise_if_unreadable(getattr(error, "filename", None) or folder, error)
        if pointer := lfs_problem(folder / METADATA_FILE):
            raise UserError(f"{folder / METADATA_FILE} {pointer}") from None
        raise UserError(f"the tokenizer at {folder} is not valid ({summary(error)}): train it again") from None
    if (tokenizer.vocab_size, tokenizer.fingerprint) != saved:
        raise UserError(
            f"{folder / METADATA_FILE} was modified: its fingerprint or vocab_size does not match its content; "
            "train the tokenizer again or copy the folder again"
        )
    return tokenizer


def load_origin(folder: str | Path) -> dict:
    """Returns how the tokenizer of a folder was made, as given to `save_tokenizer`."""
    return json.loads((Path(folder) / METADATA_FILE).read_text(encoding="utf-8")).get("origin", {})


def tokenizer_facts(folder: str | Path, tokenizer: Tokenizer) -> dict:
    """Returns what a record of a run has of its tokenizer: fingerprint, size, and how it was made."""
    facts = {"fingerprint": tokenizer.fingerprint, "vocab_size": tokenizer.vocab_size}
    return facts | {"origin": load_origin(folder)}
