"""Reads the documents of a rank's packing streams and tokenizes them ahead in threads."""

import contextlib
import itertools
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import numpy as np
import pyarrow as pa

from megachat.data.packing import PostponedDocument
from megachat.data.shards import Corpus
from megachat.data.texts import BadTexts, count_words, decode_texts
from megachat.data.tokenizer import Tokenizer
from megachat.errors import UserError
from megachat.text import shortened

_BATCH_DOCUMENTS = 256  # small, so that a file with one huge row group starts without delay
_BATCHES_AHEAD = 2  # so that the threads never wait
_TASK_DOCUMENTS = 8  # per thread task: few, because one document may be as long as a hundred others
_POSTPONED_CHARACTERS = 1 << 25  # of the texts that are kept in memory, because they are not tokenized yet


# A document's number -> the task that tokenizes it, itself if it is postponed, None if it is not UTF-8.
_Documents = dict[int, Future | PostponedDocument | None]


class DocumentReader:
    """Reads each row group once, tokenizes ahead in threads and distributes the documents to this rank's streams.

    cursors: stream -> number of the first document that it needs. Only documents of these streams are tokenized.
    bad_texts: stream -> what happens to its texts that are not UTF-8. Skipped texts are like empty ones, but counted.
    row_tokens: texts that are surely longer, which may be most of the data, are tokenized when they are needed, or
    after `tokenize_postponed`: the first rows do not wait for them.
    """

    def __init__(
        self,
        corpus: Corpus,
        tokenizer: Tokenizer,
        cursors: dict[int, int],
        streams: int,
        threads: int,
        bad_texts: dict[int, BadTexts],
        row_tokens: int,
    ):
        if corpus.documents < streams:
            names = shortened(shard.path.name for shard in corpus.shards)
            raise UserError(
                f"{corpus.shards[0].path.parent} has {corpus.documents} documents in {names}, fewer than "
                f"{streams} packing streams: set data.streams to {corpus.documents} or fewer, or add text"
            )
        self._corpus, self._tokenizer, self._streams = corpus, tokenizer, streams
        self._first_needed = np.full(streams, np.iinfo(np.int64).max)
        for stream, cursor in cursors.items():
            self._first_needed[stream] = cursor
        self._ready: dict[int, deque[tuple[int, np.ndarray | PostponedDocument, int]]] = {
            stream: deque() for stream in cursors
        }
        self._bad_texts, self._skipped = bad_texts, dict.fromkeys(cursors, 0)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="tokenizer")
        self._batches = self._batches_from(min(cursors.values()))
        self._submitted: deque[tuple[int, _Documents]] = deque()
        self._row_tokens, self._postponed_characters = row_tokens, 0
        self._postponed: list[PostponedDocument] | None = []  # None: nothing is postponed anymore

    def next_document(self, stream: int) -> tuple[int, np.ndarray | PostponedDocument, int]:
        """Returns (number, tokens, skipped) of the stream's next document that is not empty. tokens: uint [n] with BOS
        first, or postponed. skipped: the number of texts before it that are not UTF-8 and were left out.

        Raises UserError if all documents of an epoch are empty, or for a text that is not UTF-8 if these are refused.
        """
        ready, visited = self._ready[stream], 0
        while not ready:
            if visited > 2 * self._corpus.documents:
                raise UserError(
                    f"all documents of packing stream {stream} in {self._corpus.shards[0].path.parent} are empty "
                    "or skipped: prepare the data again or set fewer data.streams"
                )
            visited += self._distribute_batch()
        return ready.popleft()

    def tokenize_postponed(self) -> None:
        """Begins to tokenize in a thread what was postponed; from now on nothing is."""
        postponed, self._postponed = self._postponed, None
        if postponed:
            self._pool.submit(self._tokenize_some, deque(postponed))

    def _tokenize_some(self, postponed: deque[PostponedDocument]) -> None:
        for _ in range(min(_TASK_DOCUMENTS, len(postponed))):
            postponed.popleft().document()
        if postponed:
            with contextlib.suppress(RuntimeError):  # the reader was closed
                self._pool.submit(self._tokenize_some, postponed)  # after the documents that rows may wait for

    def close(self, *, wait: bool) -> None:
        """Drops the tasks that have not begun. wait: returns when the threads have ended."""
        self._pool.shutdown(wait=wait, cancel_futures=True)

    def _batches_from(self, number: int) -> Iterator[tuple[int, pa.ChunkedArray]]:
        for first, texts in self._corpus.read_from(number):
            for start in range(0, len(texts), _BATCH_DOCUMENTS):
                yield first + start, texts.slice(start, _BATCH_DOCUMENTS)

    def _distribute_batch(self) -> int:
        """Gives the documents of the oldest batch to their streams; returns the size of the batch."""
        while len(self._submitted) <= _BATCHES_AHEAD:
            self._submitted.append(self._submit(*next(self._batches)))
        size, documents = self._submitted.popleft()
        for number, task in documents.items():
            stream = self._stream_of(number)
            if task is None:
                self._skipped[stream] += 1
            else:
                tokens = task if isinstance(task, PostponedDocument) else task.result()[number]
                self._ready[stream].append((number, tokens, self._skipped[stream]))
                self._skipped[stream] = 0
        return size

    def _stream_of(self, number: int) -> int:
        return number % self._corpus.documents % self._streams

    def _submit(self, first: int, texts: pa.ChunkedArray) -> tuple[int, _Documents]:
        """Starts to tokenize a batch. Returns its size and its needed documents."""
        numbers = np.arange(first, first + len(texts))
        needed = np.flatnonzero(numbers >= self._first_needed[numbers % self._corpus.documents % self._streams])
        documents: _Documents = {}
        decoded: dict[int, str] = {}
        # not pa.array: to recognize a Series, it would import pandas where that is installed
        texts = texts.take(pa.Array.from_buffers(pa.int64(), len(needed), [None, pa.py_buffer(needed)]))
        words = count_words(texts) if self._tokenizer.cuts_words else np.zeros(len(texts), np.int64)
        for number, text, least in zip((first + needed).tolist(), decode_texts(texts), words.tolist(), strict=True):
            if isinstance(text, bytes):
                self._bad_texts[self._stream_of(number)].add(self._corpus.location(number), text)
                documents[number] = None
            elif text:
                documents[number] = self._postpone(number, text, least)
                if documents[number] is None:
                    decoded[number] = text
        for start in range(0, len(decoded), _TASK_DOCUMENTS):
            part = dict(itertools.islice(decoded.items(), start, start + _TASK_DOCUMENTS))
            documents |= dict.fromkeys(part, self._pool.submit(self._encode, part))
        return len(numbers), documents

    def _postpone(self, number: int, text: str, least: int) -> PostponedDocument | None:
        """Returns a document that is surely longer than a row and may be tokenized later, else None. least: of its
        tokens.
        """
        postponed = self._postponed  # which another thread replaces
        if postponed is None or least <= self._row_tokens:
            return None
        if self._postponed_characters + len(text) > _POSTPONED_CHARACTERS:
            return None
        self._postponed_characters += len(text)
        encode = partial(self._tokenizer.encode, text, bos=True)
        postponed.append(PostponedDocument(number, least, encode, self._row_tokens))
        return postponed[-1]

    def _encode(self, texts: dict[int, str]) -> dict[int, np.ndarray]:
        return dict(zip(texts, self._tokenizer.encode_batch(list(texts.values())), strict=True))
