"""Saves in the background: the state is copied to host memory, and a thread on every rank writes the copy.

On a GPU the caller makes the copy before it continues. On a CPU the thread makes it during the next step.
"""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from megachat.parallel.mesh import Axis
from megachat.parallel.rectangles import RectanglesByName

# Writes the copied rectangles with collectives of the given axis, which nothing else uses; returns the checkpoint.
Write = Callable[[RectanglesByName, Axis], Path]


class Saved(NamedTuple):
    """A completed save."""

    path: Path
    blocked_s: float  # how long training waited
    total_s: float  # from begin() until the checkpoint was complete


class Saver:
    """Saves one checkpoint at a time in the background; all ranks call everything here in the same order.

    axis: all ranks, with a separate process group, because its collectives run at the same time as those of training.
    background: False makes the caller wait until the checkpoint is written, and needs no memory for copies.
    """

    def __init__(self, axis: Axis, *, background: bool = True):
        self._axis, self._background = axis, background
        # Kept from save to save: allocating memory costs more than copying.
        self._copies: dict[tuple[str, int], torch.Tensor] = {}
        self._thread: threading.Thread | None = None
        self._saved: list[Saved] = []
        self._error: BaseException | None = None
        self._copied = threading.Event()
        self._copied.set()
        self._blocked_s = 0.0

    def reserve(self, tensors: RectanglesByName) -> None:
        """Allocates the memory of the copies, so that a job with too little memory fails soon after its start. Does
        nothing after begin(), which made them.
        """
        if self._background and not self._copies:
            for copy, _ in self._pairs(tensors):
                copy.zero_()

    def begin(self, tensors: RectanglesByName, write: Write, since: float | None = None) -> None:
        """Writes in the background. The caller must not modify the tensors until `wait_copied` returns.

        Waits for an earlier save first. Raises UserError when the earlier save failed. since: time.perf_counter() when
        the caller started to prepare this save; `blocked_s` counts from there.
        """
        start = time.perf_counter() if since is None else since
        self.wait()
        to_copy: list[tuple[torch.Tensor, torch.Tensor]] = []  # by the thread, during the next step
        if self._background:
            to_copy = list(self._pairs(tensors))
            tensors = self._with_copies(tensors)
            if any(view.is_cuda for _, view in to_copy):  # copy now, after the kernels in the device's queue
                self._copy(to_copy)
                torch.cuda.synchronize()
                to_copy = []
        self._copied.clear()
        self._blocked_s = time.perf_counter() - start
        self._thread = threading.Thread(target=self._run, args=(to_copy, tensors, write, start), name="saver")
        self._thread.start()
        if not self._background:
            self.wait(blocks=True)

    def wait_copied(self) -> None:
        """Waits until the tensors given to `begin` are copied; call it before modifying any of them."""
        if not self._copied.is_set():
            start = time.perf_counter()
            self._copied.wait()
            self._blocked_s += time.perf_counter() - start

    @property
    def failed(self) -> bool:
        """Whether the current save failed; `wait` raises its error."""
        return self._error is not None

    def finished(self) -> list[Saved]:
        """Returns the saves that were completed since the last call."""
        saved, self._saved = self._saved, []
        return saved

    def wait(self, *, blocks: bool = False) -> None:
        """Waits for the current save. Raises UserError when it failed. blocks: count the wait into its `blocked_s`."""
        start = time.perf_counter()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        if blocks and self._saved:
            last = self._saved[-1]
            self._saved[-1] = last._replace(blocked_s=min(last.total_s, last.blocked_s + time.perf_counter() - start))

    def _pairs(self, tensors: RectanglesByName) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yields (copy, view) of every rectangle; allocates missing copies."""
        for name, (_, rectangles) in tensors.items():
            for index, (_, _, view) in enumerate(rectangles):
                if (name, index) not in self._copies:
                    self._copies[name, index] = torch.empty(view.shape, dtype=view.dtype, pin_memory=view.is_cuda)
                yield self._copies[name, index], view

    def _with_copies(self, tensors: RectanglesByName) -> RectanglesByName:
        """Returns the rectangles with the copies in place of the views, which training changes."""
        return {
            name: (shape, [(offsets, sizes, self._copies[name, i]) for i, (offsets, sizes, _) in enumerate(parts)])
            for name, (shape, parts) in tensors.items()
        }

    @staticmethod
    def _copy(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        for copy, view in pairs:
            copy.copy_(view.detach(), non_blocking=True)

    def _run(self, to_copy: list, tensors: RectanglesByName, write: Write, start: float) -> None:
        try:
            try:
                self._copy(to_copy)
            finally:
                self._copied.set()
            path = write(tensors, self._axis)
            self._saved.append(Saved(path, self._blocked_s, time.perf_counter() - start))
        except BaseException as error:  # raised by wait(), in the training's thread
            self._error = error
