"""What saving costs training: how long it waited, and how much slower the steps are beside the writing."""

import statistics
from collections import deque

from megachat.text import plural

COMPARED_STEPS = 10  # compared on each side of a save


class SaveCost:
    """Compares the steps after a save with those before it. Saves that are closer than 2 x COMPARED_STEPS steps are not
    compared, because the steps between them are after one and before the other.

    last: (step of the save, ratio) of the last comparison.
    """

    last: tuple[int, float]

    def __init__(self) -> None:
        self._before = deque[float](maxlen=COMPARED_STEPS)  # seconds of steps that are not after a save
        self._after: list[float] | None = None  # of the steps after one; None once they are complete
        self._compares = False  # whether they can be compared
        self._step = 0
        self._ratios = list[float]()
        self._saves = list[tuple[float, float]]()  # (seconds that training waited, seconds of the whole save)

    def begin(self, step: int) -> None:
        """A save of `step` steps was begun, before the step that follows."""
        self._step, self._compares = step, self._after is None and len(self._before) == COMPARED_STEPS
        self._after = []

    def add(self, seconds: float) -> bool:
        """Adds a step; returns whether a comparison is complete with it."""
        if self._after is None:
            self._before.append(seconds)
            return False
        self._after.append(seconds)
        if len(self._after) < COMPARED_STEPS:
            return False
        if self._compares:  # sums: a median would hide a save that delays one step a lot
            self.last = self._step, sum(self._after) / sum(self._before)
            self._ratios.append(self.last[1])
        self._before.clear()
        self._after = None
        return self._compares

    def finish(self, blocked_s: float, total_s: float) -> None:
        """Adds a completed save."""
        self._saves.append((blocked_s, total_s))

    @property
    def line(self) -> str:
        """The last comparison as a line of the log."""
        return f"the {COMPARED_STEPS} steps since the save took {self.last[1]:.3f} times the {COMPARED_STEPS} before it"

    @property
    def values(self) -> dict[str, float]:
        """The last comparison as metrics."""
        return {"checkpoint/step": self.last[0], "checkpoint/steps_after_ratio": self.last[1]}

    @property
    def row(self) -> str | None:
        """All saves of this job as one line of the summary; None without a save."""
        if not self._saves:
            return None
        blocked, total = (sum(times) for times in zip(*self._saves, strict=True))
        text = f"{plural(len(self._saves), 'save')}; training waited {blocked:.2f} s"
        text += f", {blocked / total:.1%} of their {total:.2f} s"
        if self._ratios:
            ratio = statistics.median(self._ratios)
            text += f"; {COMPARED_STEPS} steps since a save took {ratio:.3f} times the {COMPARED_STEPS} before it"
            text += " (median)" * (len(self._ratios) > 1)
        return text
