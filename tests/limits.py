"""What tests have instead of a clock: limits that end a hang, which grow with the machine's slowness, and counts of
calls for what must be quick.
"""

import functools
import sys
import time
from collections.abc import Callable

_USUAL_MEASURE_S = 0.15  # of _work() on one core of a 2023 server


@functools.cache
def slowness() -> float:
    """How many times slower than usual this machine is now, at least 1; measured once per process."""
    begin = time.monotonic()
    _work()
    return max(1.0, (time.monotonic() - begin) / _USUAL_MEASURE_S)


def _work() -> int:
    return sum(number * number % 7 for number in range(2_000_000))


def limit_s(usual_s: float = 60.0) -> float:
    """Seconds after which a step that usually takes `usual_s` is taken for a hang."""
    return 10 * usual_s * slowness()


def until(true: Callable[[], object], what: str, every_s: float = 0.05) -> None:
    """Waits for true()."""
    deadline = time.monotonic() + limit_s()
    while not true():
        assert time.monotonic() < deadline, f"no {what} in {limit_s():.0f} s"
        time.sleep(every_s)


def calls_of(function: Callable[[], object]) -> int:
    """Returns how many Python and C functions are called: the same number on every machine, busy or not."""
    count = 0

    def note(frame, event, argument) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count
