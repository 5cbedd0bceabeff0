"""The outputs of a run: metrics.jsonl, console lines, a progress bar on a terminal, and the configured trackers.

One dictionary of values feeds all of them.
"""

import json
import math
import os
import sys
import time
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

from megachat.activity import hours_minutes
from megachat.console import console_error
from megachat.files import METRICS_NAME, set_aside, write_atomically
from megachat.settings import LogConfig
from megachat.train.trackers import TrackedRun, Trackers


class Metrics:
    """The outputs of the rank that writes; on other ranks (`writes` false) every call does nothing.

    first_step: the step from which this job trains; lines of it and of later steps are dropped from metrics.jsonl.
    rewinds: how often the run had gone back when its checkpoint was made; the lines of later rewinds are dropped.
    trains: False for a job that has no step to train; then no line is dropped.
    """

    def __init__(
        self,
        folder: Path,
        log: LogConfig,
        *,
        writes: bool,
        first_step: int,
        steps: int,
        run_name: str,
        settings: dict,
        rewinds: int = 0,
        trains: bool = True,
    ):
        self.writes = writes
        self._path = folder / METRICS_NAME
        self._file: TextIO | None = None
        self._bar: tqdm | None = None
        self._trackers: Trackers | None = None
        self._console_lost = False
        if not writes:
            return
        problem = _drop_lines_from(self._path, first_step, rewinds) if trains else None
        self._file = open(self._path, "a", encoding="utf-8")
        if sys.stdout.isatty():
            self._bar = tqdm(total=steps, initial=first_step, unit="step", file=sys.stdout, dynamic_ncols=True)
        if problem:
            self.log(problem)
        self._trackers = Trackers(log, TrackedRun(folder, run_name, settings, first_step, self.log))

    def record(self, values: dict) -> None:
        """Appends one JSON object, which has "step", to metrics.jsonl and sends it to the trackers.

        Adds "time": seconds since 1970-01-01 UTC.
        """
        if self._file is not None:
            stamp = {"step": values["step"], "time": round(time.time(), 3)}
            values = stamp | values
            lines = [values]
            if not self._console_lost and (error := console_error()):
                self._console_lost = True
                lines.append(stamp | {"console": f"stdout takes no more output ({error.strerror})"})
            self._file.write("".join(json.dumps(line) + "\n" for line in lines))
            self._file.flush()
            if self._trackers is not None:
                self._trackers.log(values)

    def rewind(self, step: int, rewinds: int) -> None:
        """Drops the lines of `step` and later ones from metrics.jsonl, because these steps run again. rewinds: so far,
        this one included.
        """
        if self._file is not None:
            self._file.close()
            _drop_lines_from(self._path, step, rewinds)
            self._file = open(self._path, "a", encoding="utf-8")
            self.advance(step)

    def log(self, line: str) -> None:
        """Prints a line on the console."""
        if self.writes:
            if self._bar is not None:
                self._bar.write(line, file=sys.stdout)
            else:
                print(line, flush=True)

    def advance(self, step: int) -> None:
        """Moves the progress bar to `step` finished steps."""
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def close_bar(self) -> None:
        """Ends the progress bar; lines that follow are below it."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def close(self) -> None:
        """Syncs the file and closes all outputs."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        self.close_bar()
        if self._trackers is not None:
            self._trackers.finish()


def _drop_lines_from(path: Path, step: int, rewinds: int) -> str | None:
    """Drops the lines of steps that will run again, and a line that a crash cut short: a resumed run continues one
    curve. Of the lines of rewinds the first `rewinds` are kept, and no other: a job that begins at `step` meets the
    faults of the others again.

    Returns a line for the log if other lines cannot be read. They are dropped, and the file as it was is set aside.
    """
    if path.is_dir():
        return f"{path} is a folder: it is set aside as {set_aside(path).name} and a new one is started"
    if not path.exists():
        return None
    kept, damaged = [], []
    *lines, cut_short = path.read_bytes().split(b"\n")
    for number, line in enumerate([*lines, cut_short], 1):
        try:
            values = json.loads(line)
            # a training line or spike has the number of its step, an evaluation the number of steps before it
            # (a new run repeats that of step 0)
            of_step = "train/loss" in values or "spike/documents" in values
            keep = values["step"] < step or (values["step"] == step > 0 and not of_step)
            if "rewind/count" in values:
                keep = values["rewind/count"] <= rewinds
        except (ValueError, TypeError, LookupError, RecursionError):
            if line.strip() and number <= len(lines):
                damaged.append(number)
            continue
        if keep:
            kept.append(line + b"\n")
    aside = set_aside(path) if damaged else None
    write_atomically(path, b"".join(kept))
    if aside is None:
        return None
    return (
        f"{path} has damaged lines ({len(damaged)}; the first is line {damaged[0]}): it is kept as {aside.name}, "
        "and its other lines are continued"
    )


def console_line(values: dict, steps: int, eta_s: float | None) -> str:
    """Returns the console line of one training step, at most 100 columns; values that are not known are left out."""
    width = max(5, len(str(steps)))
    norm, milliseconds = values["train/grad_norm"], 1000 * values["train/dt"]
    decimals = 3 if norm < 99.9995 else 1
    parts = [
        f"loss {values['train/loss']:7.4f}",
        f"norm {norm:6.{decimals}f}" if norm < 9999.95 or math.isinf(norm) else f"norm {norm:6.0e}",
        f"lrm {values['train/lrm']:.2f}",
        f"{milliseconds:5.0f}ms" if milliseconds < 99999.5 else f"{milliseconds / 1000:6.0f}s",
        f"{tqdm.format_sizeof(values['train/tok_per_sec']):>5} tok/s",
    ]
    if "train/mfu" in values:
        parts.append(f"mfu {values['train/mfu']:4.1f}%")
    if eta_s is not None:
        parts.append(f"eta {hours_minutes(eta_s):>5}")
    return f"step {values['step']:0{width}d}/{steps:0{width}d} | {'  '.join(parts)}"


class Pace:
    """Estimates the time that is left from the wall time per step of this job, evaluations and saves included.

    first_step: of this job. Its first two steps are left out: they compile and warm up.
    """

    def __init__(self, first_step: int):
        self._start, self._begin = first_step + 2, 0.0

    def finish(self, steps: int) -> None:
        """Is called when `steps` steps of the run are done."""
        if steps == self._start:
            self._begin = time.perf_counter()

    def left_s(self, steps: int, last: int) -> float | None:
        """Returns the seconds from `steps` finished steps to `last`, None before the job's third step."""
        timed = steps - self._start
        return (time.perf_counter() - self._begin) / timed * (last - steps) if timed > 0 else None
