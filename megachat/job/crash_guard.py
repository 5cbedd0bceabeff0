"""Crashes of a run, recorded in its folder, so that a step that fails again and again is refused, not retried for ever.

`running` holds the step that a job is in, or was in last; a job that ends in order removes it. If a job finds it at its
start, the job before crashed, and this is added to `crashes.json`. The file is created when the first step begins: a
start that fails before, for whatever reason, says nothing about a step and does not count. A killed process loses
nothing that it has written to a file, so `running` needs no sync and costs microseconds per step.
"""

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

from megachat.errors import UserError, how_to_resume
from megachat.files import METRICS_NAME, Log, read_side_file, write_json
from megachat.parallel.collectives import on_all_ranks_or_raise
from megachat.parallel.mesh import Axis

MAX_CRASHES = 3  # in a row, at one step


class CrashGuard:
    """The records in one run folder. Only the rank that writes keeps them; on others every method does nothing."""

    def __init__(self, folder: Path, writes: bool):
        self._folder, self._writes = folder, writes
        self._running, self._crashes = folder / "running", folder / "crashes.json"
        self._file: int | None = None
        self.interrupted_at: float | None = None  # time.time() at which the step began in which the job before crashed

    def begin(self, log: Log, *, forget: bool = False) -> None:
        """Records the crash of the job before. forget: earlier crashes do not count, because the user chose it.

        log: gets a line for each record that cannot be read. Raises UserError when the last attempts all crashed at
        one step.
        """
        if not self._writes:
            return
        crashes = [] if forget else self._read_crashes(log)
        if crashes:
            write_json(self._crashes, crashes)
        else:
            self._crashes.unlink(missing_ok=True)
        self._running.unlink(missing_ok=True)
        last = crashes[-MAX_CRASHES:]
        if len(last) == MAX_CRASHES and len({crash["step"] for crash in last}) == 1:
            raise UserError(
                f"step {last[0]['step']} of {self._folder} has failed {MAX_CRASHES} times in a row, the last time on "
                f"{last[-1]['seen']}: look at the log and at {METRICS_NAME} there, fix the cause, and continue with "
                f"--resume and a checkpoint's path, or remove {self._crashes.name} there"
            )

    def record_step(self, step: int) -> None:
        """Records that the job is in `step` now. Raises UserError when the run folder no longer exists."""
        if not self._writes:
            return
        with contextlib.suppress(FileNotFoundError):
            if self._file is None:
                self._file = os.open(self._running, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            os.pwrite(self._file, b"%012d\n" % step, 0)
            if os.fstat(self._file).st_nlink:
                return
        raise UserError(
            f"step {step}: the run folder {self._folder} no longer exists: restore it from a copy and "
            f"continue with {how_to_resume()}, or start again"
        )

    def end(self) -> None:
        """Records that the job ends without a crash: it finished, was stopped, or reported an error."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
            with contextlib.suppress(OSError):  # the folder may be the reason for the error
                self._running.unlink()

    def forget(self) -> None:
        """Removes the record of earlier crashes, once the run is finished."""
        if self._writes:
            self._crashes.unlink(missing_ok=True)

    def _read_crashes(self, log: Log) -> list[dict]:
        """Returns the recorded crashes, and the one that `running` shows."""

        def parse_crashes(content: bytes) -> list[dict]:
            return [{"step": int(crash["step"]), "seen": str(crash["seen"])} for crash in json.loads(content)]

        crashes = read_side_file(self._crashes, parse_crashes, log) or []
        step = read_side_file(self._running, int, log)
        if step is not None:
            self.interrupted_at = self._running.stat().st_mtime
            seen = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.interrupted_at))
            crashes.append({"step": step, "seen": seen})
        return crashes


@contextlib.contextmanager
def guard_crashes(folder: Path, world: Axis, log: Log, *, forget: bool) -> Iterator[CrashGuard]:
    """Records in the run folder which step the job is in; all ranks enter together.

    An exception that leaves the block is a crash, unless it is a reported error or a storage failure. Raises UserError
    on all ranks as CrashGuard.begin does.
    """
    guard = CrashGuard(folder, writes=world.rank == 0)
    on_all_ranks_or_raise(lambda: guard.begin(log, forget=forget), world)
    try:
        yield guard
    except (UserError, OSError, KeyboardInterrupt):
        guard.end()
        raise
    guard.end()
