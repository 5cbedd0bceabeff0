"""Timings in turn and their ratios: on a shared machine, ratios within a round are less noisy than times."""

import statistics
import time
from collections.abc import Callable, Sequence


def time_in_turn(
    actions: dict[str, Callable], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Returns each action's seconds in each round. All actions run once per round; the first round is not counted.

    clock: time.process_time is less noisy on a busy machine, but only right for a process with one thread.
    """
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for number in range(rounds + 1):
        for name, action in actions.items():
            begin = clock()
            action()
            if number:
                seconds[name].append(clock() - begin)
    return seconds


def round_ratios(seconds: Sequence[float], others: Sequence[float]) -> list[float]:
    """Returns the ratio of two actions' seconds in each round."""
    return [one / other for one, other in zip(seconds, others, strict=True)]


def compare_rates(seconds: dict[str, list[float]], baseline: str, amount: int = 1) -> dict[str, dict]:
    """Returns each action's median rate in `amount` per second, and the median of its ratios to the baseline."""
    rates = {}
    for name, values in seconds.items():
        rates[name] = {
            "per_sec": amount / statistics.median(values),
            "rounds": len(values),
            f"times_faster_than_{baseline}": round(statistics.median(round_ratios(seconds[baseline], values)), 3),
        }
    return rates
