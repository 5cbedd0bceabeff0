"""Packs the rows of one data-parallel rank ahead of time in a thread, and keeps an exact state after each step."""

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from megachat.data import loader_state
from megachat.data.packing import PackingStream, PlacedDocument, StreamState, buffer_sizes, saving_rank, streams_of_rank
from megachat.data.reader import DocumentReader
from megachat.data.shards import Corpus, open_shards, split_shards
from megachat.data.staging import Staging, staging_for
from megachat.data.texts import BadTexts
from megachat.data.tokenizer import Tokenizer
from megachat.errors import UserError


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
        bad_texts = {s: logged if saving_rank(s, ranks, streams, rows) == rank else counted for s in cursors}
        self._corpus = corpus
        self._reader = DocumentReader(corpus, tokenizer, cursors, streams, tokenizer_threads, bad_texts, row_tokens)
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
        if self._now.documents:  # the first step is over: its cores are not needed for its rows
            self._reader.tokenize_postponed()
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
        """Returns the documents of each of this rank's rows of the last step. epoch: from 1. document: its index in the
        epoch. place: file, row group and row. start, tokens: of its part in the row.
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
        arrays = {stream: loader_state.stream_to_arrays(saved, self._dtype) for stream, saved in streams}
        return {"header": header, "streams": arrays}

    def close(self) -> None:
        """Ends the background threads."""
        self._stopped.set()
        self._reader.close(wait=False)  # a thread that waits for tokens stops waiting
        while self._thread.is_alive():
            try:
                self._packed.get_nowait()  # the thread may be waiting for space in the queue
            except queue.Empty:
                self._thread.join(0.01)
        self._reader.close(wait=True)

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
