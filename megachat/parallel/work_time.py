"""How long this rank works in a step, without the time in which it waits for other ranks."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch


class WorkTime:
    """Adds up the spans of a step in which this rank works, and subtracts the waits inside them.

    On a CPU: wall time less that of collectives. On a GPU: time on the device between events, less the waits for
    collectives that run beside the computation. A collective in the middle of a layer (tensor axis) is not subtracted
    there, because its events would slow the step: a slow rank slows its whole tensor group.

    cuda: whether the rank computes on a GPU.
    """

    def __init__(self, *, cuda: bool = False):
        self._cuda, self._measures, self._works = cuda, False, False
        self._pause: Any = None  # the start of a wait
        self._spans: list[tuple[int, Any, Any]] = []  # 1 for work or -1 for a wait, begin, end

    def start(self) -> None:
        """Begins a step. Outside of a step nothing is measured."""
        self._spans.clear()
        self._measures = True

    def finish(self) -> float:
        """Ends the step; returns the seconds of work in it. The device must have finished the step."""
        self._measures = False
        if self._cuda:
            return sum(sign * begin.elapsed_time(end) for sign, begin, end in self._spans) / 1000
        return sum(sign * (end - begin) for sign, begin, end in self._spans)

    @contextlib.contextmanager
    def working(self, counts: bool = True) -> Iterator[None]:
        """Measures the block as work; blocks may not nest. counts: False does nothing."""
        begin, self._works = self._now() if counts else None, counts and self._measures
        try:
            yield
        finally:
            self._works = False
        if counts:
            self._add(1, begin)

    def pause(self, *, launches: bool) -> None:
        """Begins a wait, if this rank is at work. launches: a collective, which may be in the middle of a layer."""
        self._pause = self._now() if self._works and not (launches and self._cuda) else None

    def resume(self) -> None:
        """Ends the wait."""
        if self._pause is not None:
            self._add(-1, self._pause)
            self._pause = None

    def _add(self, sign: int, begin: Any) -> None:
        if self._measures:
            self._spans.append((sign, begin, self._now()))

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        if not self._measures:
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
