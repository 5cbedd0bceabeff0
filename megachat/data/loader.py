"""Batches for one data-parallel rank, packed ahead in a background thread, with an exact state after every step."""

import queue
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from megachat.data import loader_state
from megachat.data.packing import Stream, StreamState, buffer_sizes, streams_of_rank
from megachat.data.shards import Corpus, open_shards, split_shards
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


@dataclass(frozen=True)
class _Snapshot:
    """The loader after a step."""

    step: int
    streams: dict[int, StreamState]


class Loader:
    """An endless iterator over one rank's rows: `next(loader)` is the next step's int64 tensor [rows / ranks, row_tokens] on the CPU.

    Row slot k of a rank is row k * ranks + rank of the step. The rows depend on the data, seed, row_tokens, rows, streams and buffer_documents only,
    never on ranks or rank. row_tokens: sequence length + 1; every row starts with BOS. rows: rows of a step over all ranks. A stream's buffer holds
    at least buffer_documents documents, fewer where the stream has too few in one epoch (`packing.buffer_sizes`).
    seed: None visits the row groups in file order. state: from `state()` or `load_loader_state`, of a run with any number of ranks, or from
    `restarted_state`. Raises UserError for a data folder that is wrong, settings that do not divide, or a state of other settings.
    """

    def __init__(
        self,
        folder: str | Path,
        tokenizer: Tokenizer,
        *,
        split: str,
        row_tokens: int,
        rows: int,
        ranks: int = 1,
        rank: int = 0,
        streams: int = 8,
        buffer_documents: int = 1000,
        seed: int | None = None,
        tokenizer_threads: int = 2,
        prefetch_steps: int = 2,
        state: dict | None = None,
    ):
        if rows % ranks:
            raise UserError(
                f"{rows} rows a step cannot be dealt evenly to {ranks} data-parallel ranks: make the rows a multiple of {ranks}"
            )
        shards = split_shards(open_shards(folder, min_shards=1 if split == "validation" else 2), split)
        corpus = Corpus(shards, seed)
        self._rows, self._ranks, self._rank, self._row_tokens, self._stream_count = (
            rows,
            ranks,
            rank,
            row_tokens,
            streams,
        )
        self._documents, self._dtype = corpus.documents, tokenizer.dtype
        order = {
            "split": split,
            "row_tokens": row_tokens,
            "rows": rows,
            "streams": streams,
            "buffer_documents": buffer_documents,
            "seed": seed,
        }
        self._settings = loader_state.loader_settings(shards, tokenizer, order)
        mine = streams_of_rank(rank, ranks, streams, rows)
        self._now = self._resume(state, mine)
        cursors = {stream: packed.next_document for stream, packed in self._now.streams.items()}
        self._feed = Feed(corpus, tokenizer, cursors, streams, tokenizer_threads)
        self._streams = {}
        for stream in mine:
            buffer = buffer_sizes(self._share(stream), buffer_documents)
            self._streams[stream] = Stream(
                partial(self._feed.take, stream), row_tokens, buffer, corpus.documents, self._now.streams[stream]
            )
        self._ahead: queue.Queue = queue.Queue(maxsize=prefetch_steps)
        self._stopped = threading.Event()
        self._thread = threading.Thread(
            target=self._pack_ahead, args=(self._now.step,), name=f"loader-{split}", daemon=True
        )
        self._thread.start()

    def _resume(self, state: dict | None, mine: list[int]) -> _Snapshot:
        self._restarts = state["header"].get("restarts", []) if state else []
        if state is None or state["streams"] is None:
            return _Snapshot(0, dict.fromkeys(mine, loader_state.initial_stream_state(self._restarts)))
        loader_state.require_same_settings(state["header"], self._settings)
        return _Snapshot(
            state["header"]["step"],
            {stream: loader_state.stream_from_arrays(state["streams"][stream], self._row_tokens) for stream in mine},
        )

    def _share(self, stream: int) -> int:
        """Documents of a stream in one epoch."""
        return (self._documents - stream + self._stream_count - 1) // self._stream_count

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> torch.Tensor:
        if self._stopped.is_set():
            raise StopIteration
        packed = self._ahead.get()
        if isinstance(packed, BaseException):
            self.close()
            raise packed
        batch, self._now = packed
        return torch.from_numpy(batch)

    @property
    def step(self) -> int:
        """Steps done since the documents were begun, those before a resume included."""
        return self._now.step

    @property
    def epoch(self) -> int:
        """The epoch, from 1, of this rank's furthest stream at the last batch, by documents placed or cropped (those in its buffer do not count)."""
        done = {stream: packed.next_sequence - len(packed.held) for stream, packed in self._now.streams.items()}
        return 1 + max(documents // self._share(stream) for stream, documents in done.items())

    @property
    def cropped_share(self) -> float:
        """Tokens cropped over tokens read, over this rank's streams up to the last batch."""
        packed = self._now.streams.values()
        return sum(stream.cropped_tokens for stream in packed) / max(1, sum(stream.read_tokens for stream in packed))

    def ledger(self) -> dict[int, str]:
        """Stream -> running SHA-256 (hex) of the (epoch, document) pairs it has placed or cropped; the same on every layout."""
        return {stream: packed.ledger.hex() for stream, packed in self._now.streams.items()}

    def state(self) -> dict:
        """The state after the last batch given out, however far the background thread is: {"header": JSON-able, "streams": {stream: arrays}}."""
        header = {"step": self._now.step, "epoch": self.epoch, **self._settings, "documents": self._documents}
        if self._restarts:
            header["restarts"] = self._restarts
        return {
            "header": header,
            "streams": {
                stream: loader_state.stream_to_arrays(packed, self._dtype)
                for stream, packed in self._now.streams.items()
            },
        }

    def close(self) -> None:
        """Stop the background threads."""
        self._stopped.set()
        self._feed.close()  # whoever waits for tokens stops waiting
        while self._thread.is_alive():
            try:
                self._ahead.get_nowait()  # it may be waiting for room
            except queue.Empty:
                self._thread.join(0.01)

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _pack_ahead(self, step: int) -> None:
        try:
            while not self._stopped.is_set():
                batch = self._pack(step)
                step += 1
                self._ahead.put(
                    (batch, _Snapshot(step, {stream: packer.state() for stream, packer in self._streams.items()}))
                )
        except BaseException as error:  # surfaces in next()
            self._ahead.put(error)

    def _pack(self, step: int) -> np.ndarray:
        batch = np.empty((self._rows // self._ranks, self._row_tokens), dtype=np.int64)
        unneeded = np.empty(self._row_tokens, dtype=np.int64)
        for row in range(self._rows):
            stream = self._streams.get((step * self._rows + row) % self._stream_count)
            if stream is not None:
                slot, owner = divmod(row, self._ranks)
                stream.pack(batch[slot] if owner == self._rank else unneeded)
        return batch
