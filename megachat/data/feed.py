"""The tokenized documents of some streams: row groups are read once, tokenized ahead in threads and dealt to the streams that asked for them."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import numpy as np
import pyarrow as pa

from megachat.data.shards import Corpus
from megachat.data.tokenizer import Tokenizer
from megachat.errors import UserError

# Documents looked at together, few enough that a foreign file with one huge row group starts at once; batches ahead, so that the threads never wait.
_BATCH_DOCUMENTS = 256
_BATCHES_AHEAD = 2
# Documents of one task for a thread: small, because one document may be as long as a hundred others.
_TASK_DOCUMENTS = 8


class Feed:
    """Deals documents to streams. cursors: stream -> first document number it wants; only these streams' documents are tokenized."""

    def __init__(self, corpus: Corpus, tokenizer: Tokenizer, cursors: dict[int, int], streams: int, threads: int):
        if corpus.documents < streams:
            names = ", ".join(shard.path.name for shard in corpus.shards)
            raise UserError(
                f"{corpus.shards[0].path.parent} has {corpus.documents} documents in {names}, fewer than {streams} packing streams: "
                f"set data.streams to {corpus.documents} or fewer, or add text"
            )
        self._corpus, self._tokenizer, self._streams = corpus, tokenizer, streams
        self._wanted_from = np.full(streams, np.iinfo(np.int64).max)
        for stream, cursor in cursors.items():
            self._wanted_from[stream] = cursor
        self._waiting: dict[int, deque[tuple[int, np.ndarray]]] = {stream: deque() for stream in cursors}
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="tokenizer")
        self._batches = self._batches_from(min(cursors.values()))
        self._ahead: deque[tuple[int, list[int], list[Future]]] = deque()

    def take(self, stream: int) -> tuple[int, np.ndarray]:
        """(number, tokens: uint [n], BOS first) of the stream's next document that is not empty. Raises UserError if an epoch holds none."""
        waiting, looked_at = self._waiting[stream], 0
        while not waiting:
            if looked_at > 2 * self._corpus.documents:
                raise UserError(
                    f"all documents of packing stream {stream} in {self._corpus.shards[0].path.parent} are empty: "
                    "prepare the data again or set fewer data.streams"
                )
            looked_at += self._deal()
        return waiting.popleft()

    def close(self) -> None:
        """Stop the threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _batches_from(self, number: int) -> Iterator[tuple[int, pa.ChunkedArray]]:
        for first, texts in self._corpus.read_from(number):
            for start in range(0, len(texts), _BATCH_DOCUMENTS):
                yield first + start, texts.slice(start, _BATCH_DOCUMENTS)

    def _deal(self) -> int:
        """Hand the oldest batch to its streams; returns how many documents were looked at."""
        while len(self._ahead) <= _BATCHES_AHEAD:
            self._ahead.append(self._submit(*next(self._batches)))
        looked_at, numbers, tasks = self._ahead.popleft()
        documents = [tokens for task in tasks for tokens in task.result()]
        for number, tokens in zip(numbers, documents, strict=True):
            self._waiting[number % self._corpus.documents % self._streams].append((number, tokens))
        return looked_at

    def _submit(self, first: int, texts: pa.ChunkedArray) -> tuple[int, list[int], list[Future]]:
        numbers = np.arange(first, first + len(texts))
        wanted = np.flatnonzero(numbers >= self._wanted_from[numbers % self._corpus.documents % self._streams])
        found = [
            (first + at, text)
            for at, text in zip(wanted.tolist(), texts.take(pa.array(wanted)).to_pylist(), strict=True)
            if text
        ]
        encode = partial(self._pool.submit, self._tokenizer.encode_batch)
        tasks = [
            encode([text for _, text in found[start : start + _TASK_DOCUMENTS]])
            for start in range(0, len(found), _TASK_DOCUMENTS)
        ]
        return len(texts), [number for number, _ in found], tasks
