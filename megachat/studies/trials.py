"""One training of a study: an ordinary run folder, trained by its own process, continued if it was stopped."""

import contextlib
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from megachat.errors import UserError
from megachat.files import list_folder, refuse_damaged
from megachat.studies.runs import RunRecord, is_run, load_run

_POLL_S = 0.5
_DIVERGED_MESSAGE = re.compile(r"step \d+: the loss is (nan|inf|-inf) ")  # how train/step.py ends such a run
FIRST_SEED = 42  # of studies that versions before run.seed was respected have begun
LOGS = "logs"  # folder of what the trainings print


class Trial(NamedTuple):
    """name: of the run folder. settings: "section.key=JSON", beside those of the study's config."""

    name: str
    settings: tuple[str, ...]


def as_settings(values: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns {"section.key": JSON value} as overrides of a config."""
    return tuple(f"{key}={json.dumps(value)}" for key, value in values.items())


QUESTION = "question.json"  # what a study's folder is for


def saved_question(folder: Path, study: str) -> dict | None:
    """Returns what the runs of a study's folder are for, None for a new one. Raises UserError if another study has it:
    both would have runs of the same names.
    """
    path = folder / QUESTION
    if not path.exists():
        return None
    with refuse_damaged(path, "cannot be read ({}): give another --out"):
        saved = dict(json.loads(path.read_bytes()))
    if (other := saved.get("study", study)) != study:
        raise UserError(f"{folder} has the runs of {other}, not of {study}: give another --out")
    return saved


class Diverged(UserError):
    """A training whose loss was no number: a result of a study, where any other failure is none. run: so far."""

    def __init__(self, message: str, run: RunRecord) -> None:
        super().__init__(message)
        self.run = run


def first_seed(seed: int, folder: Path) -> int:
    """Returns the seed of a study's first runs: the config's run.seed. A folder whose runs began at 42 whatever the
    config said, as earlier versions did, continues with that.
    """
    names = [path.name for path in list_folder(folder)] if folder.is_dir() else []
    begun = {each for each in (seed, FIRST_SEED) if any(name.endswith(f"_s{each}") for name in names)}
    return FIRST_SEED if begun == {FIRST_SEED} else seed


def refuse_fixed(settings: Sequence[str], fixed: Sequence[str], source: str) -> None:
    """Raises UserError for a setting that a study gives its runs itself. fixed: sections or section.key. source: where
    the settings are from."""
    for setting in settings:
        key = setting.partition("=")[0].strip()
        if key in fixed or key.partition(".")[0] in fixed:
            raise UserError(f"{source} has {key}, which this study sets for each of its runs: leave it out")


@contextlib.contextmanager
def continued_later(log: Callable[[str], object]) -> Iterator[None]:
    """Logs how to continue a study if Ctrl-C interrupts the block."""
    try:
        yield
    except KeyboardInterrupt:
        log("interrupted: the same command continues from here; finished runs are not trained again")
        raise


Watch = Callable[[RunRecord], bool]  # gets the run when it has new metrics; returns whether it should end
Train = Callable[[Trial, Watch | None], RunRecord]


def trainer(config: str, folder: Path, settings: Sequence[str] = (), *, ranks: int = 1) -> Train:
    """Returns a function that trains a trial to its end, and returns its run; a finished one is not trained again.

    config: of all trials. folder: where their run folders are. settings: of all trials. ranks: processes per trial on
    this machine, under torchrun. The function raises UserError when a training fails, with its last error; Diverged
    if its loss was no number.
    """

    def train(trial: Trial, watch: Watch | None = None) -> RunRecord:
        log = folder / LOGS / f"{trial.name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.with_suffix(".lock").open("a") as lock:  # another process of the study may train it, as the baseline
            fcntl.flock(lock, fcntl.LOCK_EX)
            return train_alone(trial, watch, log)

    def train_alone(trial: Trial, watch: Watch | None, log: Path) -> RunRecord:
        run = folder / trial.name
        if is_run(run) and (record := load_run(run)).state in ("finished", "running"):
            if record.state == "running":
                raise UserError(f"{run} is trained by another job at this moment: wait, or use another folder")
            return record
        printed_before = log.stat().st_size if log.exists() else 0
        place = (f"run.folder={folder}", f"run.name={trial.name}")
        overrides = [word for setting in (*settings, *trial.settings, *place) for word in ("--set", setting)]
        with log.open("ab") as out:
            process = subprocess.Popen(
                [*_launcher(ranks), "pretrain", "--config", config, *overrides, "--resume", "auto"],
                stdout=out,
                stderr=subprocess.STDOUT,
            )
        stopped = _wait(process, run, watch)
        if process.returncode and not stopped:
            error = _last_error(log, printed_before)
            message = f"the training of {trial.name} failed: {error} (its output is in {log})"
            raise Diverged(message, load_run(run)) if _DIVERGED_MESSAGE.match(error) else UserError(message)
        return load_run(run)

    return train


def _launcher(ranks: int) -> list[str]:
    python = [sys.executable, "-m"]
    if ranks == 1:
        return [*python, "megachat"]
    return [*python, "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m", "megachat"]


def _wait(process: subprocess.Popen, run: Path, watch: Watch | None) -> bool:
    """Waits for the process; returns whether `watch` ended it. The process ends, and saves, if this one is ended."""
    seen, stopped = 0, False
    try:
        while process.poll() is None:
            time.sleep(_POLL_S)
            if watch and not stopped and is_run(run) and len((record := load_run(run)).lines) > seen:
                seen = len(record.lines)
                if stopped := watch(record):
                    process.send_signal(signal.SIGTERM)
    except BaseException:
        process.send_signal(signal.SIGTERM)
        process.wait()
        raise
    return stopped


def _last_error(log: Path, begin: int) -> str:
    """Returns the last error in the log behind byte `begin`, where this start's output begins; else its last line."""
    lines = log.read_bytes()[begin:].decode(errors="replace").splitlines()
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error:")]
    return errors[-1] if errors else next(iter(lines[-1:]), f"it printed nothing to {os.fspath(log)}")
