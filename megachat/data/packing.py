"""Best-fit packing of documents into rows, and which stream packs which row.

Method: nanochat's BOS-aligned best-fit packing (https://github.com/karpathy/nanochat). Of the documents in a buffer the largest that fits whole into
what is left of the row is placed; when none fits, the shortest is cropped to fill the row and its rest thrown away. Among equals the oldest goes
first. Here a sorted list finds both in O(log n), and the work is dealt to a fixed number of streams, so that the rows do not depend on the number of
ranks: row n of the run (n = step * rows + row of the step) is the next row of stream n % streams, and stream s packs the documents whose index in
their epoch is s modulo streams.
"""

import hashlib
import math
import struct
from bisect import bisect_left, insort
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

# A key of the sorted list is length << _SEQUENCE_BITS | sequence number: integers compare faster than pairs.
_SEQUENCE_BITS = 40
# As many as nanochat tokenizes at once.
REFILL_DOCUMENTS = 128


def streams_of_rank(rank: int, ranks: int, streams: int, rows: int) -> list[int]:
    """The streams a data-parallel rank runs: those that pack one of its rows n (n % ranks == rank) at some step. rows: a step, divisible by ranks."""
    if rows % ranks:
        raise ValueError(f"{rows} rows a step cannot be dealt evenly to {ranks} ranks")
    shared = math.gcd(ranks, streams)
    return [stream for stream in range(streams) if stream % shared == rank % shared]


def saving_rank(stream: int, ranks: int, streams: int, rows: int) -> int:
    """The first rank that runs a stream; it saves the stream's state."""
    if rows % ranks:
        raise ValueError(f"{rows} rows a step cannot be dealt evenly to {ranks} ranks")
    return stream % math.gcd(ranks, streams)


@dataclass(frozen=True)
class BufferedDocument:
    """A document in a buffer."""

    number: int  # in the endless sequence of epochs
    length: int  # tokens of the whole document, BOS included
    tokens: np.ndarray  # its first row_tokens tokens at most: no row can ever take more


@dataclass(frozen=True)
class StreamState:
    """A stream between two rows. Documents are shared, not copied: they never change."""

    next_document: int  # the stream's first document number that it has not yet looked at
    next_sequence: int
    rows: int  # packed so far
    read_tokens: int  # of the documents placed or cropped
    cropped_tokens: int  # thrown away of these
    ledger: bytes  # running SHA-256 of the documents placed or cropped
    held: dict[int, BufferedDocument]  # by sequence number, in its order


FRESH = StreamState(0, 0, 0, 0, 0, bytes(32), {})


def buffer_sizes(share: int, buffer_documents: int) -> tuple[int, int]:
    """(least, refill): a stream with fewer than `least` documents in its buffer takes `refill` more.

    share: the stream's documents in one epoch; a small corpus gets a smaller buffer, so that it never holds more documents than that.
    Refilling one by one would crop far more: documents longer than a row gather in the buffer, and only what came with the last refill is left to
    choose from (6,400 rows of 2,049 tokens of English: 39 % cropped one by one, 9 % with 128).
    """
    refill = min(REFILL_DOCUMENTS, max(1, share // 2))
    return min(buffer_documents, share - refill + 1), refill


class Stream:
    """One packing stream.

    take: gives (number, tokens: uint [n], BOS first) of the stream's next document. buffer: from `buffer_sizes`. epoch_documents: of the whole corpus.
    """

    def __init__(
        self,
        take: Callable[[], tuple[int, np.ndarray]],
        row_tokens: int,
        buffer: tuple[int, int],
        epoch_documents: int,
        state: StreamState = FRESH,
    ):
        self._take, self._row_tokens, self._epoch_documents = take, row_tokens, epoch_documents
        self._least, self._refill = buffer
        self._next_document, self._next_sequence, self._rows = state.next_document, state.next_sequence, state.rows
        self._read_tokens, self._cropped_tokens, self._ledger = state.read_tokens, state.cropped_tokens, state.ledger
        self._held = dict(state.held)
        self._keys = sorted(held.length << _SEQUENCE_BITS | sequence for sequence, held in self._held.items())

    def state(self) -> StreamState:
        """The state now, in microseconds: only references are copied."""
        return StreamState(
            self._next_document,
            self._next_sequence,
            self._rows,
            self._read_tokens,
            self._cropped_tokens,
            self._ledger,
            self._held.copy(),
        )

    def pack(self, row: np.ndarray) -> None:
        """Fill `row` (int64 [row_tokens]) with the stream's next row."""
        keys, start, end = self._keys, 0, self._row_tokens
        while start < end:
            while len(keys) < self._least:
                for _ in range(self._refill):
                    self._hold(*self._take())
            space = end - start
            after = bisect_left(keys, space + 1 << _SEQUENCE_BITS)
            # after == 0: nothing fits and the first key, the shortest document, is cropped. Otherwise go back to the oldest of the largest length.
            at = bisect_left(keys, keys[after - 1] >> _SEQUENCE_BITS << _SEQUENCE_BITS) if after else 0
            held = self._held.pop(keys.pop(at) & (1 << _SEQUENCE_BITS) - 1)
            placed = min(held.length, space)
            row[start : start + placed] = held.tokens[:placed]
            start += placed
            self._read_tokens += held.length
            self._cropped_tokens += held.length - placed
            self._ledger = hashlib.sha256(
                self._ledger + struct.pack("<qq", *divmod(held.number, self._epoch_documents))
            ).digest()
        self._rows += 1

    def _hold(self, number: int, tokens: np.ndarray) -> None:
        length, sequence = len(tokens), self._next_sequence
        # A long document's tail is dropped here: a view would keep it in memory and in every checkpoint.
        kept = tokens if length <= self._row_tokens else tokens[: self._row_tokens].copy()
        self._held[sequence] = BufferedDocument(number, length, kept)
        insort(self._keys, length << _SEQUENCE_BITS | sequence)
        self._next_document, self._next_sequence = number + 1, sequence + 1
