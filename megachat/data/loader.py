"""Packs the rows of one data-parallel rank ahead of time in a thread, and keeps an exact state after each step."""

import itertools
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from megachat.data import loader_state
from megachat.data.packing import PackingStream, PlacedDocument, StreamState, buffer_sizes, saving_rank, streams_of_rank
from megachat.data.shards import Corpus, open_shards, split_shards
from megachat.data.staging import Staging, staging_for
from megachat.data.texts import BadTexts, decode_texts
from megachat.data.tokenizer import Tokenizer
from megachat.errors import UserError
from megachat.text import shortened

_BATCH_DOCUMENTS = 256  # small, so that a file with one huge row group starts without delay
_BATCHES_AHEAD = 2  # so that the threads never wait
_TASK_DOCUMENTS = 8  # per thread task: few, because one document may be as long as a hundred others


class DocumentReader:
    """Reads each row group once, tokenizes ahead in threads and distributes the documents to this rank's streams.

    cursors: stream -> number of the first document that it needs. Only documents of these streams are tokenized.
    bad_texts: stream -> what happens to its texts that are not UTF-8. Skipped texts are like empty ones, but counted.
    """

    def __init__(
        self,
        corpus: Corpus,
        tokenizer: Tokenizer,
        cursors: dict[int, int],
        streams: int,
        threads: int,
        bad_texts: dict[int, BadTexts],
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
        self._ready: dict[int, deque[tuple[int, np.ndarray, int]]] = {stream: deque() for stream in cursors}
        self._bad_texts, self._skipped = bad_texts, dict.fromkeys(cursors, 0)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="tokenizer")
        self._batches = self._batches_from(min(cursors.values()))
        self._submitted: deque[tuple[int, dict[int, Future | None]]] = deque()

    def next_document(self, stream: int) -> tuple[int, np.ndarray, int]:
        """Returns the number and tokens (uint [n] with BOS first) of the stream's next document that is not empty, and
        the number of texts that are not UTF-8 and were skipped before it.

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

    def close(self) -> None:
        """Stops the threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)

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
                self._ready[stream].append((number, task.result()[number], self._skipped[stream]))
                self._skipped[stream] = 0
        return size

    def _stream_of(self, number: int) -> int:
        return number % self._corpus.documents % self._streams

    def _submit(self, first: int, texts: pa.ChunkedArray) -> tuple[int, dict[int, Future | None]]:
        """Starts to tokenize a batch. Returns its size, and for the number of each needed document that is not empty
        the task that tokenizes it, None if it is not UTF-8.
        """
        numbers = np.arange(first, first + len(texts))
        needed = np.flatnonzero(numbers >= self._first_needed[numbers % self._corpus.documents % self._streams])
        documents: dict[int, Future | None] = {}
        decoded: dict[int, str] = {}
        # not pa.array: to recognize a Series, it would import pandas where that is installed
        indices = pa.Array.from_buffers(pa.int64(), len(needed), [None, pa.py_buffer(needed)])
        for number, text in zip((first + needed).tolist(), decode_texts(texts.take(indices)), strict=True):
            if isinstance(text, bytes):
                self._bad_texts[self._stream_of(number)].add(self._corpus.location(number), text)
            elif text:
                decoded[number] = text
            if text:
                documents[number] = None
        for start in range(0, len(decoded), _TASK_DOCUMENTS):
            part = dict(itertools.islice(decoded.items(), start, start + _TASK_DOCUMENTS))
            documents |= dict.fromkeys(part, self._pool.submit(self._encode, part))
        return len(texts), documents

    def _encode(self, texts: dict[int, str]) -> dict[int, np.ndarray]:
        return dict(zip(texts, self._tokenizer.encode_batch(list(texts.values())), strict=True))


@dataclass(frozen=True)
class _Snapshot:
    """The state of the loader after a step. documents: of each of this rank's rows of that step, in their order."""

    step: int
    streams: dict[int, StreamState]
    documents: list[list[PlacedDocument]]


class Loader:
    """Endless iterator over one rank's rows: next(loader) is an int64 tensor [rows / ranks, row_tokens] per step.

    On a CPU every call returns a new tensor. On a GPU the copy of the next step's rows runs beside the current step
    (data.staging), and a call may overwrite the rows of the call before.

    Row k of a rank is row k * ranks + rank of the step. The rows of a step depend on data, tokenizer, seed, row_tokens,
    rows, streams and buffer_documents only, not on the number of ranks. Raises UserError for invalid data, for rows
    that cannot be split over the ranks, or for a state that was saved with other settings.

    row_tokens: sequence length + 1; each row starts with BOS. rows: rows per step over all ranks. buffer_documents:
    minimum of documents in a stream's buffer, see `packing.buffer_sizes`. seed: None visits the row groups in file
    order. state: from `state()` or `load_loader_state` of a run on any number of ranks, or from `restarted_state`; rows
    of the steps in its header's "left_out" are packed but not returned.
    on_bad_text: "refuse" or "skip" texts that are not UTF-8. device: where the rows are returned. log: gets a line for
    each skipped text, on one rank only.
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
        on_bad_text: str = "refuse",
        device: str | torch.device = "cpu",
        log: Callable[[str], None] = lambda line: None,
    ):
        if rows % ranks:
            raise UserError(
                f"{rows} rows per step cannot be split evenly over {ranks} data-parallel ranks: "
                f"make the rows a multiple of {ranks}"
            )
        shards = split_shards(open_shards(folder, min_shards=1 if split == "validation" else 2), split)
        corpus = Corpus(shards, seed)
        self._rows, self._ranks, self._rank = rows, ranks, rank
        self._row_tokens, self._stream_count, self._dtype = row_tokens, streams, tokenizer.dtype
        order = {"split": split, "row_tokens": row_tokens, "rows": rows, "streams": streams}
        order |= {"buffer_documents": buffer_documents, "seed": seed}
        self._settings = loader_state.loader_settings(shards, tokenizer, order)
        self._restarts = state["header"].get("restarts", []) if state else []
        self.left_out: list[int] = state["header"].get("left_out", []) if state else []
        self._now = self._first_snapshot(state, streams_of_rank(rank, ranks, streams, rows))
        cursors = {stream: saved.next_document for stream, saved in self._now.streams.items()}
        logged, counted = BadTexts(on_bad_text, log=log), BadTexts(on_bad_text)
        bad_texts = {
            stream: logged if saving_rank(stream, ranks, streams, rows) == rank else counted for stream in cursors
        }
        self._corpus = corpus
        self._reader = DocumentReader(corpus, tokenizer, cursors, streams, tokenizer_threads, bad_texts)
        self._streams = {
            stream: PackingStream(
                partial(self._reader.next_document, stream),
                row_tokens,
                buffer_sizes(self._stream_documents(stream), buffer_documents),
                corpus.documents,
                saved,
            )
            for stream, saved in self._now.streams.items()
        }
        self._staging = staging_for(device, (rows // ranks, row_tokens))
        self._staged: _Snapshot | None = None  # the state after the rows that are on their way to the device
        self._packed: queue.Queue = queue.Queue(maxsize=prefetch_steps)
        self._stopped = threading.Event()
        self._thread = threading.Thread(
            target=self._pack_ahead, args=(self._now.step,), name=f"loader-{split}", daemon=True
        )
        self._thread.start()

    def _first_snapshot(self, state: dict | None, streams: list[int]) -> _Snapshot:
        if state is None or state["streams"] is None:
            return _Snapshot(0, dict.fromkeys(streams, loader_state.initial_stream_state(self._restarts)), [])
        loader_state.require_same_settings(state["header"], self._settings)
        saved = state["streams"]
        return _Snapshot(
            state["header"]["step"],
            {stream: loader_state.stream_from_arrays(saved[stream], self._row_tokens) for stream in streams},
            [],
        )

    def _stream_documents(self, stream: int) -> int:
        """Returns the number of documents of a stream in an epoch."""
        return len(range(stream, self._corpus.documents, self._stream_count))

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> torch.Tensor:
        if self._stopped.is_set():
            raise StopIteration
        if self._staging is None:
            batch, self._now = self._take_packed()
            return torch.from_numpy(batch)
        if self._staged is None:
            self._stage(self._staging)
        rows = self._staging.take()
        assert self._staged
        self._now, self._staged = self._staged, None
        if self._packed.qsize() and not isinstance(self._packed.queue[0], BaseException):
            self._stage(self._staging)  # an error is raised in its turn
        return rows

    def _take_packed(self) -> tuple[np.ndarray, _Snapshot]:
        packed = self._packed.get()
        if isinstance(packed, BaseException):
            self.close()
            raise packed
        return packed

    def _stage(self, staging: Staging) -> None:
        batch, self._staged = self._take_packed()
        staging.start(batch)

    @property
    def step(self) -> int:
        """Steps since the first document, including those before a resume and those that are left out."""
        return self._now.step

    @property
    def epoch(self) -> int:
        """Epoch (from 1) of this rank's most advanced stream at the last batch; buffered documents do not count."""
        return 1 + max(
            (saved.next_sequence - len(saved.buffer)) // self._stream_documents(stream)
            for stream, saved in self._now.streams.items()
        )

    @property
    def cropped_share(self) -> float:
        """Share of the tokens read so far that were cropped, over this rank's streams."""
        streams = self._now.streams.values()
        return sum(saved.cropped_tokens for saved in streams) / max(1, sum(saved.read_tokens for saved in streams))

    def documents(self) -> list[list[dict]]:
        """Returns the documents of each of this rank's rows of the last step: epoch (from 1), document (its index in
        the epoch), place (file, row group and row), and start and tokens of its part in the row.
        """
        return [
            [
                {
                    "epoch": document.number // self._corpus.documents + 1,
                    "document": document.number % self._corpus.documents,
                    "place": self._corpus.location(document.number),
                    "start": document.start,
                    "tokens": document.tokens,
                }
                for document in row
            ]
            for row in self._now.documents
        ]

    def ledger(self) -> dict[int, str]:
        """Returns stream -> running SHA-256 (hex) of the (epoch, document) pairs used; equal on every layout."""
        return {stream: saved.ledger.hex() for stream, saved in self._now.streams.items()}

    def skipped_texts(self) -> dict[int, int]:
        """Returns stream -> texts that were skipped because they are not UTF-8; equal on every layout."""
        return {stream: saved.skipped_texts for stream, saved in self._now.streams.items()}

    def state(self) -> dict:
        """Returns the state after the last returned batch: {"header": JSON-able, "streams": {stream: arrays}}."""
        header = {"step": self._now.step, "epoch": self.epoch, **self._settings, "documents": self._corpus.documents}
        if self._restarts:
            header["restarts"] = self._restarts
        if self.left_out:
            header["left_out"] = self.left_out
        streams = self._now.streams.items()
        return {
            "header": header,
            "streams": {stream: loader_state.stream_to_arrays(saved, self._dtype) for stream, saved in streams},
        }

    def close(self) -> None:
        """Stops the background threads."""
        self._stopped.set()
        self._reader.close()  # a thread that waits for tokens stops waiting
        while self._thread.is_alive():
            try:
                self._packed.get_nowait()  # the thread may be waiting for space in the queue
            except queue.Empty:
                self._thread.join(0.01)

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _pack_ahead(self, step: int) -> None:
        try:
            while not self._stopped.is_set():
                batch, documents = self._pack(step)
                step += 1
                if step - 1 in self.left_out:
                    for stream in self._streams.values():
                        stream.leave_out(step - 1)
                    continue
                states = {stream: packer.state() for stream, packer in self._streams.items()}
                self._packed.put((batch, _Snapshot(step, states, documents)))
        except BaseException as error:  # raised by __next__
            self._packed.put(error)

    def _pack(self, step: int) -> tuple[np.ndarray, list[list[PlacedDocument]]]:
        batch = np.empty((self._rows // self._ranks, self._row_tokens), dtype=np.int64)
        other_ranks_row = np.empty(self._row_tokens, dtype=np.int64)
        documents = []
        for row in range(self._rows):
            stream = self._streams.get((step * self._rows + row) % self._stream_count)
            if stream is not None:
                index, owner_rank = divmod(row, self._ranks)
                if owner_rank == self._rank:
                    documents.append(stream.pack(batch[index]))
                else:
                    stream.pack(other_ranks_row)
        return batch, documents
