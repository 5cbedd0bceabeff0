"""Shows what a program is doing: a line for an activity of more than a second, and the progress of long work."""

import contextlib
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import TypeVar

T = TypeVar("T")
ANNOUNCED_AFTER_S = 1.0
_LINE_EVERY_S = 10.0  # between two lines of progress where there is no terminal


def print_line(line: str) -> None:
    """Prints a line at once."""
    print(line, flush=True)


def log_line(line: str) -> None:
    """Prints a line on standard error at once; standard output is for a result."""
    print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def announced(activity: str, *, shown: bool = True, write: Callable[[str], object] = print_line) -> Iterator[None]:
    """Writes "ACTIVITY ..." if the block takes longer than a second. shown: False does nothing."""

    def announce() -> None:
        with contextlib.suppress(OSError):  # the next line of the main thread reports a console that fails
            write(f"{activity} ...")

    timer = threading.Timer(ANNOUNCED_AFTER_S, announce)
    timer.daemon = True
    if shown:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


_TICKS = """
import select, sys, time
begin = time.monotonic()
while not select.select([sys.stdin], [], [], float(sys.argv[2]))[0]:
    print(f"{sys.argv[1]}: {(time.monotonic() - begin) / 60:.1f} minutes so far", flush=True)
"""


@contextlib.contextmanager
def ticking(activity: str, every_s: float = 30.0) -> Iterator[None]:
    """Prints the time so far, every 30 s, during a call that no thread of this process interrupts. A process prints it,
    and ends with this one.
    """
    try:
        output = sys.stdout.fileno()
    except (OSError, ValueError):  # a stream in memory
        yield
        return
    line = [sys.executable, "-c", _TICKS, activity, str(every_s)]
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=output):  # leaving closes its input
        yield


class ProgressBar:
    """Shows how much of long work is done and how long the rest will take: a bar on a terminal, else some lines.

    total: the amount of work in `unit` ("B" for bytes); None while it is not known, and it may change.
    """

    def __init__(self, activity: str, total: float | None, unit: str):
        self.activity, self.unit, self.total, self.done, self._skipped = activity, unit, total, 0.0, 0.0
        self._scaled = unit == "B" or total is None or total >= 1000  # "3.00k", where "3.00 of 6.00" would puzzle
        from tqdm import tqdm  # a launch script shows its help before anything is installed

        self._bar = tqdm(
            desc=activity,
            total=total,
            unit=unit,
            unit_scale=self._scaled,
            delay=ANNOUNCED_AFTER_S,
            file=sys.stdout,
            disable=None,  # shown on a terminal only
        )
        self._begin = self._last = time.monotonic()

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(self, *_) -> None:
        self._bar.close()

    @property
    def plain(self) -> bool:
        """Whether there is no bar but lines."""
        return bool(self._bar.disable)

    def rename(self, activity: str) -> None:
        """Changes what the work is called."""
        self.activity = activity
        self._bar.set_description(activity, refresh=False)

    def skip(self, amount: float) -> None:
        """Counts work that was done before: it says nothing about the speed."""
        self.done += amount
        self._skipped += amount
        self._bar.n, self._bar.initial = self.done, self._skipped

    def update(self, amount: float, total: float | None = None) -> None:
        """Counts finished work. total: of the whole work, if it is better known now."""
        self.done += amount
        if total is not None:
            self.total = self._bar.total = total
        self._bar.update(amount)
        if self.plain and (now := time.monotonic()) - self._last >= _LINE_EVERY_S:
            self._last = now
            print_line(self.line(now - self._begin))

    def line(self, elapsed_s: float) -> str:
        """Returns the progress after `elapsed_s` of this work as one line."""
        size = self._bar.format_sizeof if self._scaled else "{:.0f}".format
        done = f"{size(self.done)}{self.unit}"
        if self.total is None:
            return f"{self.activity}: {done}"
        rate = (self.done - self._skipped) / elapsed_s if elapsed_s > 0 else 0.0
        left = f", eta {hours_minutes(max(0.0, self.total - self.done) / rate)}" if rate > 0 else ""
        share = f" ({100 * self.done / self.total:.0f}%)" if self.total else ""
        return f"{self.activity}: {done} of {size(self.total)}{self.unit}{share}{left}"


def counted(
    items: Iterable[T], activity: str, total: float, unit: str = "", size: Callable[[T], float] = lambda item: 1
) -> Iterator[T]:
    """Yields the items and shows the progress. size: how much of `total` an item is."""
    with ProgressBar(activity, total, unit) as progress:
        for item in items:
            yield item
            progress.update(size(item))


def hours_minutes(seconds: float) -> str:
    """Returns a time that is left, rounded up to a minute: "5min", "1h05", and from 100 hours on "123h"."""
    hours, minutes = divmod(-int(-seconds // 60), 60)
    if hours >= 100:
        return f"{hours}h"
    return f"{hours}h{minutes:02}" if hours else f"{minutes}min"


def duration(seconds: float) -> str:
    """Returns a measured time as h:mm:ss, after days if there are any."""
    return str(timedelta(seconds=round(seconds)))
