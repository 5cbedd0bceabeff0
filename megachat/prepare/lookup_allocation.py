"""Allocates the rows of a lookup table to tokens (L3: Large Lookup Layers; Tseng and De Sa, arXiv 2601.21461).

The allocation is a pure function of a sample of text. Frequent words (sequences of tokens) give rows to their last
token, so a token that ends many frequent contexts has many rows.
"""

import hashlib
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np

from megachat.data.texts import REFUSE, BadTexts
from megachat.data.tokenizer import Tokenizer
from megachat.errors import UserError, raise_if_unreadable, summary
from megachat.files import write_atomically
from megachat.prepare.tokenizer_training import read_texts
from megachat.settings.model import AllocationMethod

_FORMAT = 1


@dataclass(frozen=True)
class Words:
    """The words that a scan collected, in the order in which they were added; the first `vocab_size` are single tokens.

    counts: int64 [words], how often the scan ended on each word. parents: int64 [words], the word without its last
    token, -1 for a single token. last_tokens: int64 [words]. lengths: int64 [words], in tokens.
    """

    counts: np.ndarray
    parents: np.ndarray
    last_tokens: np.ndarray
    lengths: np.ndarray

    def tokens(self, word: int) -> list[int]:
        """Returns the token ids of a word."""
        ids: list[int] = []
        while word >= 0:
            ids.append(int(self.last_tokens[word]))
            word = int(self.parents[word])
        return ids[::-1]

    def order(self) -> np.ndarray:
        """Returns the words sorted by count descending, then by length, then by their token ids."""
        rank = np.zeros(len(self.counts), dtype=np.int64)  # of a word among those of its length, by token ids
        for length in range(1, int(self.lengths.max(initial=0)) + 1):
            words = np.flatnonzero(self.lengths == length)
            # of a single token the parent is -1, which ranks all of them alike
            parents = rank[self.parents[words]] if length > 1 else np.zeros(len(words), dtype=np.int64)
            rank[words[np.lexsort((self.last_tokens[words], parents))]] = np.arange(len(words))
        return np.lexsort((rank, self.lengths, -self.counts))


def collect_words(documents: Iterable[Sequence[int]], vocab_size: int, *, published: bool = False) -> Words:
    """Scans documents of token ids as Algorithm 1 of the paper: finds the longest known word, counts it, and adds the
    word that is one token longer with count 1.

    The next word begins with the token that extended the last one, as in LZW (Welch 1984). published: it begins one
    token later, as in the paper's code. A word never crosses the end of a document; there it is counted and not
    extended (the published code sets its count back to 1).
    """
    counts = [0] * vocab_size
    parents = [-1] * vocab_size
    last_tokens = list(range(vocab_size))
    extensions: dict[int, int] = {}  # word * vocab_size + next token -> the longer word
    find_extension, step_past = extensions.get, 1 if published else 0
    for ids in documents:
        position, end = 0, len(ids)
        while position < end:
            word, position = ids[position], position + 1
            while position < end:
                key = word * vocab_size + ids[position]
                longer = find_extension(key)
                if longer is None:
                    extensions[key] = len(counts)
                    counts.append(1)
                    parents.append(word)
                    last_tokens.append(ids[position])
                    counts[word] += 1
                    position += step_past
                    break
                word, position = longer, position + 1
            else:
                counts[word] += 1
    all_parents = np.array(parents, dtype=np.int64)
    lengths = np.ones(len(counts), dtype=np.int64)
    for word in range(vocab_size, len(counts)):  # a parent was added before its extensions
        lengths[word] = lengths[parents[word]] + 1
    return Words(np.array(counts, dtype=np.int64), all_parents, np.array(last_tokens, dtype=np.int64), lengths)


@dataclass(frozen=True)
class Allocation:
    """How many rows of a lookup table each token has, and the sample that decided it.

    rows_per_token: int32 [vocabulary], at least 1 each. token_counts: int64 [vocabulary], of the sample. tokenizer: the
    fingerprint of the tokenizer whose ids these are.
    """

    method: AllocationMethod
    rows_per_token: np.ndarray
    token_counts: np.ndarray
    tokenizer: str

    @property
    def rows(self) -> int:
        """Rows of the table."""
        return int(self.rows_per_token.sum())

    @property
    def mean_rows(self) -> float:
        """Rows that a token of the text reads, on average over the sample."""
        return float((self.rows_per_token * self.token_counts).sum() / self.token_counts.sum())

    @property
    def hash(self) -> str:
        """SHA-256 (hex) of the rows per token and the tokenizer, which ranks and checkpoints compare."""
        rows = np.ascontiguousarray(self.rows_per_token, dtype="<i4").tobytes()
        return hashlib.sha256(self.tokenizer.encode() + rows).hexdigest()


def sample_documents(
    folder: str | Path, tokenizer: Tokenizer, tokens: int, bad_texts: BadTexts = REFUSE
) -> Iterator[np.ndarray]:
    """Yields the ids of the train split's documents in the order of files and rows, `tokens` in total (fewer if the
    split has fewer). The sample depends on no rank, seed or layout. Raises UserError for damaged shards."""
    left = tokens
    for text in read_texts(folder, "train", sys.maxsize, sys.maxsize, bad_texts):
        ids = tokenizer.encode(text)[:left]
        left -= len(ids)
        yield ids
        if left <= 0:
            return


def allocate(
    method: AllocationMethod,
    documents: Iterable[Sequence[int] | np.ndarray],
    tokenizer: Tokenizer,
    rows: int,
    max_rows_per_token: int,
) -> Allocation:
    """Allocates `rows` rows to the tokenizer's tokens, from 1 to `max_rows_per_token` each.

    "lzw": in the order of Words.order(), each word of two or more tokens gives one row to its last token while that has
    fewer than the maximum. The order is repeated when all words are used. "lzw_published": with the published scan.
    "frequency": in proportion to the tokens' frequencies. "uniform": equal numbers. The last two are for comparison:
    the paper reports that uniform loses nearly all of the gain.
    Raises UserError if `rows` cannot be divided so, or if the sample has no text.
    """
    size = tokenizer.vocab_size
    if not size <= rows <= size * max_rows_per_token:
        raise UserError(
            f"{rows:,} rows cannot be allocated: a vocabulary of {size:,} tokens with 1 to {max_rows_per_token:,} rows "
            f"each takes {size:,} to {size * max_rows_per_token:,} rows"
        )
    sample = [np.asarray(ids, dtype=np.int64) for ids in documents]
    counts = np.bincount(np.concatenate([*sample, np.zeros(0, dtype=np.int64)]), minlength=size)
    if not counts.sum():
        raise UserError("the sample for the lookup table's allocation has no text: give a data folder with text")
    if method == "uniform":
        allocated = _proportional_rows(np.ones(size), rows, max_rows_per_token)
    elif method == "frequency":
        allocated = _proportional_rows(counts.astype(np.float64), rows, max_rows_per_token)
    else:
        words = collect_words((ids.tolist() for ids in sample), size, published=method == "lzw_published")
        order = words.order()
        longer = words.last_tokens[order[words.lengths[order] > 1]]  # single tokens have their row already
        allocated = _rows_in_order(longer, size, rows, max_rows_per_token)
    return Allocation(method, allocated, counts, tokenizer.fingerprint)


def save_allocation(allocation: Allocation, path: str | Path) -> None:
    """Writes an allocation as JSON. The same allocation always gives the same bytes."""
    content = {
        "format": _FORMAT,
        "method": allocation.method,
        "tokenizer": allocation.tokenizer,
        "hash": allocation.hash,
        "rows_per_token": allocation.rows_per_token.tolist(),
        "token_counts": allocation.token_counts.tolist(),
    }
    write_atomically(Path(path), json.dumps(content, separators=(",", ":")).encode() + b"\n")


def load_allocation(path: str | Path, tokenizer: Tokenizer) -> Allocation:
    """Reads an allocation. Raises UserError if the file is not one, is damaged, or is of another tokenizer."""
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version, method, fingerprint = content["format"], content["method"], content["tokenizer"]
        rows = np.array(content["rows_per_token"], dtype=np.int32)
        counts = np.array(content["token_counts"], dtype=np.int64)
        allocation = Allocation(method, rows, counts, fingerprint)
        known = method in get_args(AllocationMethod)
        intact = known and allocation.hash == content["hash"] and rows.shape == counts.shape
    except OSError as error:
        raise_if_unreadable(path, error)
        raise UserError(f"there is no lookup allocation {path}: make it with megachat lookup --out {path}") from None
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise UserError(
            f"{path} is not a lookup allocation ({summary(error)}): make one with megachat lookup"
        ) from None
    if version != _FORMAT:
        raise UserError(f"{path} is a lookup allocation of format {version}, not {_FORMAT}: make it again")
    if not intact or rows.ndim != 1 or rows.min(initial=1) < 1:
        raise UserError(f"{path} is damaged: its content does not match its hash; make it again")
    if fingerprint != tokenizer.fingerprint or len(rows) != tokenizer.vocab_size:
        raise UserError(
            f"{path} allocates rows to the tokens of another tokenizer ({fingerprint[:12]}, {len(rows):,} tokens) than "
            f"this one ({tokenizer.fingerprint[:12]}, {tokenizer.vocab_size:,} tokens): make it again"
        )
    return allocation


def _rows_in_order(last_tokens: np.ndarray, vocab_size: int, rows: int, most: int) -> np.ndarray:
    """Gives each token one row, then one to each entry of `last_tokens` whose token has fewer than `most`."""
    allocation = np.ones(vocab_size, dtype=np.int64)
    left = rows - vocab_size
    while left:
        allowed = last_tokens[_occurrences(last_tokens) < (most - allocation)[last_tokens]][:left]
        if not len(allowed):  # no word ends on a token that may have more
            break
        allocation += np.bincount(allowed, minlength=vocab_size)
        left -= len(allowed)
    return _even_rest(allocation, left)


def _even_rest(allocation: np.ndarray, left: int) -> np.ndarray:
    """Gives `left` more rows, each to the token that has the fewest rows, the lowest id first."""
    while left:
        fewest = np.flatnonzero(allocation == allocation.min())[:left]
        allocation[fewest] += 1
        left -= len(fewest)
    return allocation.astype(np.int32)


def _occurrences(values: np.ndarray) -> np.ndarray:
    """Returns for each element how often its value occurs before it."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]]) if len(values) else np.zeros(0, dtype=np.int64)
    before = np.arange(len(values)) - np.repeat(starts, np.diff(np.r_[starts, len(values)]))
    result = np.empty(len(values), dtype=np.int64)
    result[order] = before
    return result


def _proportional_rows(weights: np.ndarray, rows: int, most: int) -> np.ndarray:
    """Divides `rows` in proportion to the weights, from 1 to `most` for each token; ties go to the lowest id."""
    low, high = 0.0, rows * most / weights[weights > 0].min()  # the factor on the weights that uses up all rows
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if np.clip(middle * weights, 1, most).sum() < rows else (low, middle)
    shares = np.clip(low * weights, 1, most)
    allocation = np.floor(shares).astype(np.int64)
    left = rows - int(allocation.sum())
    largest_rest = np.argsort(allocation - shares, kind="stable")
    largest_rest = largest_rest[allocation[largest_rest] < most][:left]
    allocation[largest_rest] += 1
    return _even_rest(allocation, left - len(largest_rest))
