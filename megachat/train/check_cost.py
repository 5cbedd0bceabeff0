"""What the checks for silent data corruption did in a job and what they cost: reliability.replay_every, hash_every."""

from megachat.settings import ReliabilityConfig
from megachat.text import plural


def describe_device_checks(settings: ReliabilityConfig) -> str | None:
    """Returns the checks that are on, as a line of the log; None without one."""
    checks = (("a micro-batch is replayed", settings.replay_every), ("hashes are compared", settings.hash_every))
    listed = [f"{what} every {plural(every, 'step')}" for what, every in checks if every]
    return f"checks of the devices: {', '.join(listed)}" if listed else None


class CheckCost:
    """Counts the checks of this job and their seconds."""

    def __init__(self) -> None:
        self._replays, self._comparisons, self._seconds = 0, 0, 0.0

    def add(self, replay_s: float, hashes_s: float) -> None:
        """Adds a step: seconds of its replay and of its comparison of hashes, 0 where it had none."""
        self._replays += replay_s > 0
        self._comparisons += hashes_s > 0
        self._seconds += replay_s + hashes_s

    @property
    def row(self) -> str | None:
        """All checks of this job as one line of the summary; None without one. A check that fails ends the job."""
        counts = ((self._replays, "replay"), (self._comparisons, "hash comparison"))
        listed = [plural(count, what) for count, what in counts if count]
        return f"{' and '.join(listed)}: all passed; {self._seconds:.1f} s" if listed else None
