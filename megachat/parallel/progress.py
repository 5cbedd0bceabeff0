"""What this process is doing, written down at every collective and note, so that the watch can tell where a job stands still."""

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import NamedTuple

from torch.profiler import record_function

PROFILE_PREFIX = "part "  # how ranges of a profile that are a part of the step begin


def profile_range(name: str) -> record_function:
    """A context that a profile (torch.profiler, Nsight) shows under this name; parts may lie in parts. `tools/bench.py profile` adds them up."""
    return record_function(PROFILE_PREFIX + name)


class Entry(NamedTuple):
    """One thing that the process does or did.

    text: its name. axis, ranks, number: of a collective, the axis, its world ranks and the how manyth collective there it is, from 1; else "",
    () and 0. waits: the process cannot go on before another rank does something. since: time.monotonic() when this became so.
    thread: who does it (PyTorch runs gradient hooks of a GPU in threads of its own). after: of a note, text, axis and number of the last
    collective that returned within it; else None.
    """

    text: str
    axis: str
    ranks: tuple[int, ...]
    number: int
    waits: bool
    since: float
    thread: int
    after: tuple[str, str, int] | None = None


class Progress:
    """The recorder that all axes of one mesh share. Written by the thread that trains, read by the watch; every write is one assignment.

    counts: axis name -> collectives begun there. Ranks of one axis begin the same collectives in the same order, so their numbers compare.
    slow: what takes long at the moment and for good reasons (compiling, saving), else "": the watch is more patient then.
    """

    def __init__(self):
        self.counts: dict[str, int] = {}
        self.slow = ""
        self.now = self._note = Entry("starting", "", (), 0, False, time.monotonic(), threading.get_ident())

    def note(self, text: str, *, waits: bool = False) -> None:
        """Something other than a collective begins. waits: it lasts until another rank, or the device, does its part (a receive, reading a loss)."""
        self.now = self._note = Entry(text, "", (), 0, waits, time.monotonic(), threading.get_ident())

    def begin(self, text: str, axis: str, ranks: tuple[int, ...]) -> Entry:
        """A collective begins; an error in it leaves it so."""
        number = self.counts[axis] = self.counts.get(axis, 0) + 1
        entry = self.now = Entry(text, axis, ranks, number, True, time.monotonic(), threading.get_ident())
        return entry

    def wait(self, entry: Entry) -> None:
        """An asynchronous collective that was begun is waited for."""
        self.now = entry._replace(waits=True, since=time.monotonic(), thread=threading.get_ident())

    def end(self) -> None:
        """The collective has returned, or goes on in the background; the note within which it began holds again."""
        done = self.now
        self.now = self._note._replace(
            since=time.monotonic(), thread=done.thread, after=(done.text, done.axis, done.number)
        )

    @contextlib.contextmanager
    def long_running(self, what: str) -> Iterator[None]:
        """Work inside may keep other ranks waiting longer than parallel.stall_s, up to torch's own limit, parallel.timeout_s."""
        before, self.slow = self.slow, what
        self.note(what)
        try:
            yield
        finally:
            self.slow = before
            # an error leaves the entry where it happened
        self.note(f"after {what}")
