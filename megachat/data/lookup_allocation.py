"""Rows of a lookup table for each token: the allocation of L3 (Large Lookup Layers; Tseng and De Sa, arXiv 2601.21461).

A pure function of a sample of token ids. Frequent words (sequences of tokens) give rows to their last token, so a token
that ends many frequent contexts has many rows.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from megachat.errors import UserError

Method = Literal["lzw", "lzw_published", "frequency", "uniform"]


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


def allocate_rows(
    method: Method, documents: Iterable[Sequence[int]], vocab_size: int, rows: int, max_rows_per_token: int
) -> np.ndarray:
    """Returns how many rows of the table each token has: int32 [vocab_size], at least 1 each, `rows` in total.

    "lzw": in the order of Words.order(), each word gives one row to its last token while that has fewer than the
    maximum; the order is repeated if all words are used up. "lzw_published": with the published scan. "frequency": in
    proportion to the tokens' frequencies. "uniform": equal numbers. The last two are for comparison: the paper reports
    that uniform loses nearly all of the gain.
    Raises UserError if `rows` cannot be divided so, or the sample has no text.
    """
    if not vocab_size <= rows <= vocab_size * max_rows_per_token:
        raise UserError(
            f"lookup.rows is {rows:,}, but a vocabulary of {vocab_size:,} tokens with 1 to {max_rows_per_token:,} rows "
            f"each takes {vocab_size:,} to {vocab_size * max_rows_per_token:,}: change lookup.rows or "
            "lookup.max_rows_per_token"
        )
    if method == "uniform":
        weights = np.ones(vocab_size)
    elif method == "frequency":
        weights = _token_counts(documents, vocab_size).astype(np.float64)
    else:
        words = collect_words(documents, vocab_size, published=method == "lzw_published")
        _require_text(int(words.counts.sum()))
        order = words.order()
        longer = words.last_tokens[order[words.lengths[order] > 1]]  # single tokens have their row already
        return _rows_in_order(longer, vocab_size, rows, max_rows_per_token)
    return _proportional_rows(weights, rows, max_rows_per_token)


def _token_counts(documents: Iterable[Sequence[int]], vocab_size: int) -> np.ndarray:
    counts = np.zeros(vocab_size, dtype=np.int64)
    for ids in documents:
        counts += np.bincount(np.asarray(ids, dtype=np.int64), minlength=vocab_size)
    _require_text(int(counts.sum()))
    return counts


def _require_text(tokens: int) -> None:
    if not tokens:
        raise UserError("the sample for the lookup table's allocation has no text: give a data folder with text")


def _rows_in_order(last_tokens: np.ndarray, vocab_size: int, rows: int, most: int) -> np.ndarray:
    """Gives each token one row, then one to each entry of `last_tokens` whose token has fewer than `most`."""
    allocation = np.ones(vocab_size, dtype=np.int64)
    left = rows - vocab_size
    while left:
        allowed = last_tokens[_occurrence(last_tokens) < (most - allocation)[last_tokens]][:left]
        if not len(allowed):  # no word ends on a token that may have more
            return allocation_of_rest(allocation, left, most)
        allocation += np.bincount(allowed, minlength=vocab_size)
        left -= len(allowed)
    return allocation.astype(np.int32)


def allocation_of_rest(allocation: np.ndarray, left: int, most: int) -> np.ndarray:
    """Gives the `left` rows to the tokens with the fewest rows, lowest id first."""
    allocation = allocation.copy()
    while left:
        candidates = np.flatnonzero(allocation == allocation.min())[:left]
        allocation[candidates] += 1
        left -= len(candidates)
    return allocation.astype(np.int32)


def _occurrence(values: np.ndarray) -> np.ndarray:
    """Returns for each element how often its value occurs before it."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]]) if len(values) else np.zeros(0, dtype=np.int64)
    before = np.arange(len(values)) - np.repeat(starts, np.diff(np.r_[starts, len(values)]))
    result = np.empty(len(values), dtype=np.int64)
    result[order] = before
    return result


def _proportional_rows(weights: np.ndarray, rows: int, most: int) -> np.ndarray:
    """Divides `rows` in proportion to the weights, from 1 to `most` for each; ties go to the lowest token."""
    # each token's share is scale * weight between the bounds; the scale that uses up all rows is found by bisection
    low, high = 0.0, rows * most / max(weights[weights > 0].min(), 1e-300)
    for _ in range(200):
        middle = (low + high) / 2
        if np.clip(middle * weights, 1, most).sum() < rows:
            low = middle
        else:
            high = middle
    shares = np.clip(high * weights, 1, most)
    allocation = np.floor(shares).astype(np.int64)
    left = rows - int(allocation.sum())
    if left > 0:
        order = np.lexsort((np.arange(len(weights)), allocation - shares))
        order = order[allocation[order] < most][:left]
        allocation[order] += 1
        left -= len(order)
    return allocation_of_rest(allocation, left, most) if left > 0 else allocation.astype(np.int32)


def allocation_hash(allocation: np.ndarray) -> str:
    """Returns the SHA-256 (hex) of an allocation, which the ranks and checkpoints compare."""
    return hashlib.sha256(np.ascontiguousarray(allocation, dtype="<i4").tobytes()).hexdigest()
