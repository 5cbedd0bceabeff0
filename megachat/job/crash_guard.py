"""Crashes of a run, remembered in its folder, so that a step which fails again and again is told instead of tried for
ever.

`running` holds the step that a job is in, while it lives; a job that ends in order removes it. What a start finds of it
is a crash, which goes into `crashes.json`. A killed process loses nothing of what it has written to a file, so this
needs no syncing and costs a step microseconds.
"""

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

from megachat.errors import UserError
from megachat.files import write_atomically
from megachat.parallel.collectives import on_all_ranks_or_raise
from megachat.parallel.mesh import Axis

RUNNING_NAME, CRASHES_NAME = "running", "crashes.json"
MOST_CRASHES = 3  # in a row, at one step


class CrashGuard:
    """The record of one run folder, kept by the one rank that writes; on others every call does nothing."""

    def __init__(self, folder: Path, writes: bool):
        self._folder, self._writes = folder, writes
        self._file: int | None = None

    def begin(self, step: int, *, forget: bool = False) -> None:
        """The job goes on from `step`. forget: earlier crashes do not count, because the user chose where to go on.

        Raises UserError when the last guard all crashed at one step.
        """
        if not self._writes:
            return
        crashes = [] if forget else self._crashes()
        if crashes:
            write_atomically(self._folder / CRASHES_NAME, json.dumps(crashes, indent=1).encode() + b"\n")
        else:
            (self._folder / CRASHES_NAME).unlink(missing_ok=True)
        (self._folder / RUNNING_NAME).unlink(missing_ok=True)
        last = crashes[-MOST_CRASHES:]
        if len(last) == MOST_CRASHES and len({crash["step"] for crash in last}) == 1:
            raise UserError(
                f"step {last[0]['step']} of {self._folder} has failed {MOST_CRASHES} times in a row, the last time on {last[-1]['seen']}: look at "
                f"the log and at metrics.jsonl there, mend the cause, and go on with --resume and a checkpoint's path, or remove {CRASHES_NAME} there"
            )
        self._file = os.open(self._folder / RUNNING_NAME, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        self.record_step(step)

    def record_step(self, step: int) -> None:
        """The job is in `step` now. Raises UserError when the run folder has gone."""
        if self._file is not None:
            os.pwrite(self._file, b"%012d\n" % step, 0)
            if not os.fstat(self._file).st_nlink:
                raise UserError(
                    f"step {step}: the run folder {self._folder} has gone: bring it back from a copy and continue with --resume auto, or start again"
                )

    def end(self) -> None:
        """The job ends in order: finished, told to stop, or with a mistake that it tells."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
            with contextlib.suppress(OSError):  # the folder may be what went wrong
                (self._folder / RUNNING_NAME).unlink()

    def forget(self) -> None:
        """The run got through: earlier crashes mean nothing any more."""
        if self._writes:
            (self._folder / CRASHES_NAME).unlink(missing_ok=True)

    def _crashes(self) -> list[dict]:
        """Those on record and the one that `running` tells of."""
        try:
            crashes = [
                {"step": int(crash["step"]), "seen": str(crash["seen"])}
                for crash in json.loads((self._folder / CRASHES_NAME).read_text())
            ]
        except (OSError, ValueError, KeyError, TypeError):
            crashes = []
        with contextlib.suppress(OSError, ValueError):
            running = self._folder / RUNNING_NAME
            crashes.append(
                {
                    "step": int(running.read_text()),
                    "seen": time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(running.stat().st_mtime)),
                }
            )
        return crashes


@contextlib.contextmanager
def guard_crashes(folder: Path, step: int, world: Axis, *, forget: bool) -> Iterator[CrashGuard]:
    """The record of a job that goes on from `step` in the run folder; all ranks enter together. What leaves the block
    with anything but a mistake that is told, or a storage that failed, is a crash. Raises UserError on all ranks as
    `CrashGuard.begin` does.
    """
    guard = CrashGuard(folder, writes=world.rank == 0)
    on_all_ranks_or_raise(lambda: guard.begin(step, forget=forget), world, lambda text: text.partition(": ")[2])
    try:
        yield guard
    except (UserError, OSError, KeyboardInterrupt):
        guard.end()
        raise
    guard.end()
