"""Records what this process is doing, at every collective and note, for the failure monitor's report of a stall."""

import contextlib
import threading
import time
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch.profiler import record_function

from megachat.kernels.bit_hash import bit_hash
from megachat.parallel.work_time import WorkTime

PROFILE_PREFIX = "part "  # of the ranges of a profile that are a part of the step


def profile_range(name: str) -> record_function:
    """Returns a context that profilers (torch.profiler, Nsight) show under this name; ranges may nest."""
    return record_function(PROFILE_PREFIX + name)


class Entry(NamedTuple):
    """One operation of the process.

    axis, ranks, number: of a collective: its axis, that axis's world ranks, and its count there, from 1.
    waits: the process cannot continue before another rank does something. since: time.monotonic() when this became so.
    thread: the one that does it (PyTorch runs the gradient hooks of a GPU in threads of its own).
    after: of a note, text, axis and number of the last collective that returned within it.
    """

    text: str
    axis: str = ""
    ranks: tuple[int, ...] = ()
    number: int = 0
    waits: bool = False
    since: float = 0.0
    thread: int = 0
    after: tuple[str, str, int] | None = None


class Progress:
    """The recorder shared by all axes of one mesh: written by the training thread, read by the failure monitor.

    Every write is one assignment. counts: axis name -> collectives begun there. The ranks of an axis begin the same
    collectives in the same order, so their counts compare.
    slow: legitimately long work that is under way (compiling, saving), else ""; the failure monitor then waits longer.
    sent: while it is a list, the hash of everything that this rank sends to others is added to it, with a name.
    work: measures how long the training thread works in a step. cuda: whether it computes on a GPU.
    """

    def __init__(self, *, cuda: bool = False):
        self.work = WorkTime(cuda=cuda)
        self.counts: dict[str, int] = {}
        self.slow = ""
        self.sent: list[tuple[str, torch.Tensor]] | None = None
        self.note("starting")

    def note(self, text: str, *, waits: bool = False) -> None:
        """Records the start of work that is no collective. waits: until another rank or the device does its part."""
        self._note = self._begin_now(Entry(text, waits=waits))

    def begin(self, text: str, axis: str, ranks: tuple[int, ...]) -> Entry:
        """Records the start of a collective. After an error in it, the record still shows it."""
        number = self.counts[axis] = self.counts.get(axis, 0) + 1
        entry = self._begin_now(Entry(text, axis, ranks, number, waits=True))
        self.work.pause(launches=True)
        return entry

    def wait(self, entry: Entry) -> None:
        """Records that an asynchronous collective, begun before, is now waited for."""
        self._begin_now(entry)
        self.work.pause(launches=False)

    def end(self) -> None:
        """Returns to the note in which a collective began: it has returned, or continues in the background."""
        self.work.resume()
        done = self.now
        self._begin_now(self._note._replace(after=(done.text, done.axis, done.number)))

    def _begin_now(self, entry: Entry) -> Entry:
        """Makes the entry what this thread does from now on, and returns it."""
        entry = entry._replace(since=time.monotonic(), thread=threading.get_ident())
        self.now = entry
        return entry

    def record_sent(self, text: str, tensors: Iterable[torch.Tensor]) -> None:
        """Adds the hashes of what this rank sends to `sent`, if that is recorded."""
        if self.sent is not None:
            self.sent += [(text, bit_hash(tensor)) for tensor in tensors]

    @contextlib.contextmanager
    def long_running(self, what: str) -> Iterator[None]:
        """Allows the work inside to take longer than parallel.stall_s, up to torch's limit, parallel.timeout_s."""
        before, self.slow = self.slow, what
        self.note(what)
        try:
            yield
        finally:
            self.slow = before
        self.note(f"after {what}")  # an error leaves the entry where it happened
