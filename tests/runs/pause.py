"""Ranks that wait in front of a step, so that a test ends them there, however fast or busy the machine is.

Forked processes (tests/runs/forked.py, tests/runs/warm.py) execute the code in the variable TESTS_FIRST before their
program.
"""

import time
from pathlib import Path

from megachat.train import trainer
from tests.limits import limit_s


class Pause:
    """Each rank of the jobs with these variables waits once in front of `step`: a restarted one continues.

    folder: is made, and gets a file of each rank that waits or has waited.
    """

    def __init__(self, folder: Path, step: int):
        folder.mkdir()
        self.folder = folder
        first = f"from tests.runs.pause import wait_before; wait_before({str(folder)!r}, {step})"
        self.variables = {"TESTS_FIRST": first}

    @property
    def ranks(self) -> int:
        """How many ranks wait or have waited."""
        return len(list(self.folder.iterdir()))

    def again(self) -> None:
        """Has each rank wait once more."""
        for path in self.folder.iterdir():
            path.unlink()


def wait_before(folder: str, step: int) -> None:
    """Has this process wait in front of the step, as a rank."""
    take_step = trainer.train_step

    def waiting(run, number, **arguments):
        mark = Path(folder, f"rank_{run.mesh.world.rank}")
        if number == step and not mark.exists():
            mark.touch()
            time.sleep(limit_s())
        return take_step(run, number, **arguments)

    trainer.train_step = waiting
