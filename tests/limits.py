"""Time limits that end a test that hangs. They never judge speed: ten times what is usual, and more on a slow or busy machine."""

import functools
import time

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
