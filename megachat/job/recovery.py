"""Measures how long a restarted job had no training: the supervisor and the new ranks each time their phases.

The supervisor (job/elastic.py) gives its times to the ranks that it starts in a variable of the environment. All times
are those of time.time() on one host: rank 0 runs on the host of its supervisor.
"""

import json
import os
import time

_VARIABLE = "MEGACHAT_RESTART"


def give_restart_times(noticed: float, ended: float, met: float) -> None:
    """Gives the supervisor's times to the ranks that this process starts from now on.

    noticed: it noticed that a rank has ended. ended: all ranks of this host have ended. met: the hosts have met again.
    """
    os.environ[_VARIABLE] = json.dumps([noticed, ended, met])


class Recovery:
    """The phases from the step that was interrupted to the end of the first new step; made when the imports are done.

    restarted: whether a supervisor has started this process again; if not, there is nothing to measure.
    """

    def __init__(self) -> None:
        times = json.loads(os.environ.get(_VARIABLE, "null"))
        self.restarted = times is not None
        self._seconds: dict[str, float] = {}
        if self.restarted:
            self._noticed, ended, met = times
            self._seconds = {"end": ended - self._noticed, "meeting": met - ended}
            self._last = met
            self.finish("import")

    def interrupted(self, at: float | None) -> None:
        """Sets when the step began that was interrupted; None if no step was."""
        if self.restarted and at is not None:
            self._seconds = {"detection": max(0.0, self._noticed - at)} | self._seconds

    def finish(self, phase: str) -> None:
        """Ends a phase, which began when the phase before it ended."""
        if self.restarted:
            now = time.time()
            self._seconds[phase] = now - self._last
            self._last = now

    @property
    def values(self) -> dict[str, float]:
        """The seconds of each phase and of all as metrics; empty if this is no restart."""
        seconds = self._seconds | {"total": sum(self._seconds.values())} if self.restarted else {}
        return {f"recovery/{phase.replace(' ', '_')}_s": value for phase, value in seconds.items()}

    @property
    def line(self) -> str:
        """The phases as a line of the log."""
        begin = "the start of the interrupted step" if "detection" in self._seconds else "the end of the ranks"
        phases = ", ".join(f"{phase} {seconds:.1f} s" for phase, seconds in self._seconds.items())
        total = sum(self._seconds.values())
        return f"recovered in {total:.1f} s, from {begin} to the end of the first new step: {phases}"
