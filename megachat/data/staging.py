"""Copies a step's rows to a GPU while the step before it runs: pinned buffers, a stream beside, two of everything."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch


class Staging:
    """Two pinned buffers, two device buffers and one side stream for rows int64 of one shape.

    The caller alternates start(rows of a step) and take(), which returns them on the device. Kernels may read them that
    the current stream gets before the next take(). Raises RuntimeError for calls out of order.

    Three orders keep a buffer from being overwritten too early. A pinned buffer is written after the copy out of it is
    done (the host waits; that copy is two steps old). A device buffer is written after the kernels that the current
    stream got until the take() of the next rows. The current stream reads a buffer after the copy into it.
    cuda, empty: torch.cuda and torch.empty; tests replace them.
    """

    def __init__(
        self, device: torch.device, shape: tuple[int, ...], cuda: Any = torch.cuda, empty: Callable = torch.empty
    ):
        self._device, self._cuda = device, cuda
        self._pinned = [empty(shape, dtype=torch.int64, pin_memory=True) for _ in range(2)]
        self._rows = [empty(shape, dtype=torch.int64, device=device) for _ in range(2)]
        self._stream = cuda.Stream(device)
        self._stream.wait_stream(cuda.current_stream(device))  # whose kernels may still use the new buffers' memory
        self._copied = [cuda.Event() for _ in range(2)]
        self._read = [cuda.Event() for _ in range(2)]
        self._started = self._taken = 0

    def start(self, rows: np.ndarray) -> None:
        """Starts the copy of a step's rows; `rows` may be changed afterwards."""
        if self._started != self._taken:  # the other buffer is in use
            raise RuntimeError("start() was called twice without take()")
        slot = self._started % 2
        self._copied[slot].synchronize()  # returns at once for an event that was never recorded
        self._pinned[slot].copy_(torch.from_numpy(rows))
        self._stream.wait_event(self._read[slot])
        with self._cuda.stream(self._stream):
            self._rows[slot].copy_(self._pinned[slot], non_blocking=True)
            self._copied[slot].record(self._stream)
        self._started += 1

    def take(self) -> torch.Tensor:
        """Returns the rows of the last start(); the current stream waits for their copy, the host does not."""
        if self._taken == self._started:
            raise RuntimeError("take() was called without start()")
        current = self._cuda.current_stream(self._device)
        slot = self._taken % 2
        if self._taken:
            self._read[1 - slot].record(current)  # everything that reads the rows before is in the stream by now
        current.wait_event(self._copied[slot])
        self._taken += 1
        return self._rows[slot]


def staging_for(device: str | torch.device, shape: tuple[int, ...]) -> Staging | None:
    """Returns the staging of rows for a device by any name of CUDA ("cuda", "cuda:3", torch.device); None for a CPU."""
    device = torch.device(device)
    return Staging(device, shape) if device.type == "cuda" else None
