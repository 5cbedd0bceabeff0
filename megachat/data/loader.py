"""Batches for one data-parallel rank, packed ahead in a background thread, with an exact state after every step."""

import queue
import threading
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from megachat.data import loader_state
from megachat.data.feed import Feed
from megachat.data.packing import Stream, StreamState, buffer_of, streams_of
from megachat.data.shards import Corpus, open_shards, split_of
from megachat.data.tokenizer import Tokenizer
from megachat.errors import UserError


@dataclass(frozen=True)
class _Snapshot:
    """The loader after a step."""

    step: int
    streams: dict[int, StreamState]


class Loader:
    """An endless iterator over one rank's rows: `next(loader)` is the next step's int64 tensor [rows / ranks, row_tokens] on the CPU.

    Row slot k of a rank is row k * ranks + rank of the step. The rows depend on the data, seed, row_tokens, rows, streams and buffer_documents only,
    never on ranks or rank. row_tokens: sequence length + 1; every row starts with BOS. rows: rows of a step over all ranks. A stream's buffer holds
    at least buffer_documents documents, fewer where the stream has too few in one epoch (`packing.buffer_of`).
    seed: None visits the row groups in file order. state: from `state()` or `load_loader_state`, of a run with any number of ranks, or from
    `begun_anew`. Raises UserError for a data folder that is wrong, settings that do not divide, or a state of other settings.
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
        shards = split_of(open_shards(folder, least=1 if split == "validation" else 2), split)
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
        self._settings = loader_state.settings_of(shards, tokenizer, order)
        mine = streams_of(rank, ranks, streams, rows)
        self._now = self._resume(state, mine)
        cursors = {stream: packed.next_document for stream, packed in self._now.streams.items()}
        self._feed = Feed(corpus, tokenizer, cursors, streams, tokenizer_threads)
        self._streams = {}
        for stream in mine:
            buffer = buffer_of(self._share(stream), buffer_documents)
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
            return _Snapshot(0, dict.fromkeys(mine, loader_state.first_state(self._restarts)))
        loader_state.refuse_other(state["header"], self._settings)
        return _Snapshot(
            state["header"]["step"],
            {stream: loader_state.stream_of(state["streams"][stream], self._row_tokens) for stream in mine},
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
                stream: loader_state.arrays_of(packed, self._dtype) for stream, packed in self._now.streams.items()
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
