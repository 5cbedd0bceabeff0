"""Saving behind the training: a thread on every rank copies the state to host memory, before the next update changes it, and writes it."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from megachat.checkpoint.save import rectangle_bytes
from megachat.checkpoint.storage import RectanglesByName
from megachat.parallel.mesh import Axis

# writes the copied rectangles with the collectives of the given axis, which nothing else uses; returns the checkpoint
Write = Callable[[RectanglesByName, Axis], Path]


class Saved(NamedTuple):
    """A finished save. blocked_s: for which the training waited. total_s: until it was complete. local_bytes: of this rank's tensors."""

    path: Path
    blocked_s: float
    total_s: float
    local_bytes: int


class Saver:
    """Saves one checkpoint at a time in the background; all ranks call everything here in the same order.

    axis: all ranks, with a group of its own, since its collectives run beside the training's. background: false writes the rectangles
    themselves, while the caller waits, and takes no memory for copies.
    """

    def __init__(self, axis: Axis, *, background: bool = True):
        self._axis, self._background = axis, background
        self._copies: dict[
            tuple[str, int], torch.Tensor
        ] = {}  # kept from save to save: fresh memory costs more than the copy
        self._thread: threading.Thread | None = None
        self._saved: list[Saved] = []
        self._error: BaseException | None = None
        self._copied = threading.Event()
        self._copied.set()
        self._blocked_s = 0.0

    def reserve(self, pieces: RectanglesByName) -> None:
        """Take the memory of the copies now: a job that has too little fails at its start, and the first save waits no longer than others."""
        if self._background:
            for copy, _ in self._pairs(pieces):
                copy.zero_()

    def begin(self, pieces: RectanglesByName, write: Write, since: float | None = None) -> None:
        """Write the rectangles behind the caller's back, who must not change them before `wait_copied`.

        Waits for an earlier save first. Raises UserError when that one failed.

        since: time.perf_counter() when the caller began to prepare this save; from then on its seconds count.
        """
        begin = time.perf_counter() if since is None else since
        self.wait()
        views = None
        if self._background:
            views = list(self._pairs(pieces))
            if any(view.is_cuda for _, view in views):  # in the order of the device's queue
                self._copy(views)
                torch.cuda.synchronize()
                views = None
            pieces = {
                name: (
                    shape,
                    [
                        (offsets, sizes, self._copies[name, index])
                        for index, (offsets, sizes, _) in enumerate(rectangles)
                    ],
                )
                for name, (shape, rectangles) in pieces.items()
            }
        self._copied.clear()
        self._blocked_s = time.perf_counter() - begin
        self._thread = threading.Thread(target=self._run, args=(views, pieces, write, begin), name="saver")
        self._thread.start()
        if not self._background:
            self.wait(blocks=True)

    def wait_copied(self) -> None:
        """To be called before anything that was given to `begin` changes: its copy may still be under way."""
        if not self._copied.is_set():
            begin = time.perf_counter()
            self._copied.wait()
            self._blocked_s += time.perf_counter() - begin

    @property
    def failed(self) -> bool:
        """Whether the save under way could not be finished; `wait` raises why."""
        return self._error is not None

    def finished(self) -> list[Saved]:
        """The saves that became complete since the last call."""
        done, self._saved = self._saved, []
        return done

    def wait(self, *, blocks: bool = False) -> None:
        """Wait for the save under way. blocks: count this as time for which the training waited. Raises UserError when it failed."""
        begin = time.perf_counter()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        if blocks and self._saved:
            last = self._saved[-1]
            self._saved[-1] = last._replace(blocked_s=min(last.total_s, last.blocked_s + time.perf_counter() - begin))

    def _pairs(self, pieces: RectanglesByName) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(copy, view) of every rectangle."""
        for name, (_, rectangles) in pieces.items():
            for index, (_, _, view) in enumerate(rectangles):
                if (name, index) not in self._copies:
                    self._copies[name, index] = torch.empty(view.shape, dtype=view.dtype, pin_memory=view.is_cuda)
                yield self._copies[name, index], view

    @staticmethod
    def _copy(views: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        for copy, view in views:
            copy.copy_(view.detach(), non_blocking=True)

    def _run(self, views: list | None, pieces: RectanglesByName, write: Write, begin: float) -> None:
        try:
            try:
                self._copy(views or [])
            finally:
                self._copied.set()
            path = write(pieces, self._axis)
            self._saved.append(Saved(path, self._blocked_s, time.perf_counter() - begin, rectangle_bytes(pieces)))
        except BaseException as error:  # raised in the training's thread
            self._error = error
