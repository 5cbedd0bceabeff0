"""What a folder of runs holds: the state of each run, how far it came, its results, and what may be removed."""

import contextlib
import fcntl
import fnmatch
import json
import os
import shutil
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from megachat.checkpoint.facts import FACTS_NAME, checkpoint_step, read_facts
from megachat.errors import RESUME_AUTO, UserError, same_command
from megachat.evals.results import find_newest_results, load_results
from megachat.files import (
    CHECKPOINTS,
    CONFIG_NAME,
    ENVIRONMENT_NAME,
    EVALUATIONS,
    LOCK_NAME,
    METRICS_NAME,
    PART,
    PLAN_NAME,
    SAMPLES,
    is_locked,
    list_folder,
)
from megachat.studies.metrics import read_metrics, steps_recorded


@dataclass(frozen=True)
class RunRecord:
    """A run folder. lines: of metrics.jsonl. config: what differs from the defaults. plan: plan.json.

    state: "running" if a job holds the folder, "new" if no step is recorded. "finished": all steps are done, or those
    until horizon.stop_step. "stopped": the last step is saved. "crashed": steps after the newest checkpoint, or of a
    run without one, are lost. notes: what could not be read.
    """

    folder: Path
    state: str
    config: Mapping[str, Any]
    plan: Mapping[str, Any]
    lines: Sequence[dict]
    notes: tuple[str, ...] = ()

    @property
    def step(self) -> int:
        return steps_recorded(list(self.lines))

    def lines_with(self, key: str) -> list[dict]:
        """Returns the lines that have a number for a metric, in order."""
        return [line for line in self.lines if isinstance(line.get(key), int | float)]

    def values(self, key: str) -> list[float]:
        """Returns the recorded values of a metric, in order."""
        return [line[key] for line in self.lines_with(key)]


def is_run(folder: Path) -> bool:
    """Returns whether the folder is a run's: it has a config and a plan."""
    return (folder / CONFIG_NAME).is_file() and (folder / PLAN_NAME).is_file()


def load_run(folder: Path) -> RunRecord:
    """Reads a run folder. Raises UserError if it is none; files that cannot be read are noted instead."""
    if not is_run(folder):
        raise UserError(f"{folder} is no run folder: it has no {CONFIG_NAME} and {PLAN_NAME}; give runs/NAME")
    notes: list[str] = []

    def read(name: str) -> dict:
        try:
            return dict(json.loads((folder / name).read_bytes()))
        except (OSError, ValueError, TypeError, RecursionError) as error:
            notes.append(f"{folder / name} cannot be read ({type(error).__name__})")
            return {}

    config, plan, lines = read(CONFIG_NAME), read(PLAN_NAME), []
    if (folder / METRICS_NAME).exists():
        try:
            lines = [line for line in read_metrics(folder) if isinstance(line.get("step"), int)]
        except UserError as error:
            notes.append(str(error))
    return RunRecord(folder, _state(folder, plan, lines), config, plan, lines, tuple(notes))


def _state(folder: Path, plan: Mapping, lines: list[dict]) -> str:
    if is_locked(folder):
        return "running"
    step, saved = steps_recorded(lines), complete_checkpoints(folder)
    if step >= plan.get("stop_step", float("inf")):
        return "finished"
    if not step:
        return "new"
    return "stopped" if saved and max(saved) >= step else "crashed"


def state_text(run: RunRecord) -> str:
    """Returns the state of a run as a sentence for somebody who does not know megachat: how far it is, and how to
    continue it.
    """
    steps, stop = run.plan.get("steps", 0), run.plan.get("stop_step", 0)
    place, saved = f"at step {run.step:,} of {steps:,}", complete_checkpoints(run.folder)
    whole = f"finished: all {steps:,} steps are done"
    again = f"start it again with {resumed_with(run.folder)}"
    if run.state == "crashed":
        kept = f"to continue from its newest checkpoint, of step {max(saved):,}" if saved else "to begin again"
        return f"crashed {place}{'' if saved else ' without a checkpoint'}: {again} {kept}"
    return {
        "running": f"running, {place}",
        "finished": f"stopped {place} by horizon.stop_step" if stop < steps else whole,
        "stopped": f"stopped {place}, which is saved: {again} to continue",
        "new": "no step is recorded yet",
    }[run.state]


def quiet_s(folder: Path) -> float:
    """Returns the seconds since a run wrote a line of its metrics or was started."""
    paths = [path for name in (METRICS_NAME, ENVIRONMENT_NAME, PLAN_NAME) if (path := folder / name).exists()]
    return time.time() - max(path.stat().st_mtime for path in paths)


def complete_checkpoints(folder: Path) -> dict[int, Path]:
    """Returns step -> checkpoint of a run folder's checkpoints that were written to the end."""
    paths = [path for path in list_folder(folder / CHECKPOINTS) if (path / FACTS_NAME).is_file()]
    return {step: path for path in paths if (step := checkpoint_step(path)) is not None}


def newest_facts(folder: Path) -> dict[str, Any]:
    """Returns the facts of a run folder's newest complete checkpoint; {} if there is none that can be read."""
    saved = complete_checkpoints(folder)
    with contextlib.suppress(UserError):
        return read_facts(saved[max(saved)]) if saved else {}
    return {}


def read_starts(folder: Path) -> list[dict[str, Any]]:
    """Returns what environment.json has of each start of the run; [] if it cannot be read."""
    try:
        return [dict(start) for start in json.loads((folder / ENVIRONMENT_NAME).read_bytes())]
    except (OSError, ValueError, TypeError):
        return []


def newest_start(folder: Path) -> dict[str, Any]:
    """Returns what environment.json has of the last start of the run; {} if it cannot be read."""
    return next(reversed(read_starts(folder)), {})


def resumed_with(folder: Path) -> str:
    """Returns what continues a run, for messages: --resume auto, or the command that has started `pretrain`."""
    words = newest_start(folder).get("command") or []
    place = words.index("--started-by") + 1 if "--started-by" in words else len(words)
    return same_command(words[place]) if place < len(words) else RESUME_AUTO


def given_twice(folders: Sequence[Path]) -> list[Path]:
    """Returns the folders that an earlier one of the list is, too."""
    resolved = [folder.resolve() for folder in folders]
    return [folder for number, folder in enumerate(folders) if resolved[number] in resolved[:number]]


def find_runs(folder: Path) -> list[RunRecord]:
    """Returns the runs in a folder, by name; a run's own folder is one run. Raises UserError if there is none."""
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder: give the folder of your runs (run.folder), such as runs")
    folders = [folder] if is_run(folder) else [path for path in list_folder(folder) if is_run(path)]
    if not folders:
        raise UserError(f"{folder} contains no run: a run's folder has {CONFIG_NAME} and {PLAN_NAME}")
    return [load_run(path) for path in folders]


# ---- the table


def flat_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns "section.key" -> value."""
    return {
        f"{section}.{key}": value
        for section, keys in config.items()
        if isinstance(keys, Mapping)
        for key, value in keys.items()
    }


def config_differences(runs: Sequence[RunRecord]) -> dict[str, list[Any]]:
    """Returns the settings that are not the same in all runs -> their values per run, None for the default.

    The names and places of runs are no differences of recipes.
    """
    flat = [flat_config(run.config) for run in runs]
    keys = sorted({key for settings in flat for key in settings} - {"run.name", "run.folder"})
    values = {key: [settings.get(key) for settings in flat] for key in keys}
    return {key: each for key, each in values.items() if any(value != each[0] for value in each)}


def run_row(run: RunRecord) -> dict[str, Any]:
    """Returns the columns of a run in the table, as JSON values; None where the run has no such value."""
    plan, step = run.plan, run.step
    bpb, mfu = run.values("val/bpb"), run.values("train/mfu")
    seconds = [line["total_training_time"] for line in run.lines if "total_training_time" in line]
    layout, (core, core_notes) = plan.get("layout", {}), _newest_core(run.folder)
    sizes = {"dp": "data", "tp": "tensor", "pp": "pipeline"}
    return {
        "name": run.folder.name,
        "state": run.state,
        "step": step,
        "steps": plan.get("steps"),
        "bpb": bpb[-1] if bpb else None,
        "core": core,
        "tokens": step * plan["tokens_per_step"] if "tokens_per_step" in plan else None,
        "hours": seconds[-1] / 3600 if seconds else None,
        "mfu": statistics.fmean(mfu) if mfu else None,
        "layout": ",".join(f"{short}={layout.get(axis, 1)}" for short, axis in sizes.items() if layout.get(axis, 1) > 1)
        or "one rank",
        "notes": [*run.notes, *core_notes],
    }


def _newest_core(folder: Path) -> tuple[float | None, list[str]]:
    """Returns the last CORE metric, and what is wrong with the file that should have it."""
    try:
        newest = find_newest_results(folder, whole_core=True)
        return load_results(newest)["core"]["core_metric"] if newest else None, []
    except UserError as error:
        return None, [str(error)]


def filter_runs(runs: Sequence[RunRecord], filters: Sequence[str]) -> list[RunRecord]:
    """Returns the runs that pass all filters: NAME patterns (`d4*`), or KEY=VALUE of a column or a setting.

    Raises UserError for a key that no run has.
    """
    rows = {run.folder: run_row(run) | flat_config(run.config) for run in runs}
    kept = list(runs)
    for text in filters:
        key, equals, value = text.partition("=")
        if equals and key not in (known := {name for row in rows.values() for name in row}):
            raise UserError(f"no run has {key!r} of --filter {text}: known are {', '.join(sorted(known))}")
        wanted = value if equals else text
        kept = [
            run
            for run in kept
            if fnmatch.fnmatchcase(_as_text(rows[run.folder].get(key if equals else "name")), wanted)
        ]
    return kept


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


# ---- what may go


class Leftover(NamedTuple):
    """A file or folder that a run does not need. why: its kind."""

    path: Path
    why: str
    size: int  # bytes


UNFINISHED, ASIDE, OLDER = "unfinished writes", "set aside by a resume or as damaged", "checkpoints before the newest"


def find_leftovers(runs: Sequence[RunRecord]) -> list[Leftover]:
    """Returns what may be removed from runs that no job holds. The newest complete checkpoint, metrics, evaluations and
    samples are never among it.
    """
    return [
        Leftover(path, why, folder_bytes(path))
        for run in runs
        if run.state != "running"
        for path, why in _leftovers_of(run.folder)
    ]


def _leftovers_of(folder: Path) -> Iterator[tuple[Path, str]]:
    saved = complete_checkpoints(folder)
    for step in sorted(saved)[:-1]:
        if not saved[step].is_symlink():
            yield saved[step], OLDER
    for inner in (folder, *(folder / kind for kind in (CHECKPOINTS, EVALUATIONS, SAMPLES))):
        for path in list_folder(inner) if inner.is_dir() else []:
            if path.name.endswith((PART, ".tmp")):
                yield path, UNFINISHED
            elif ".aside" in path.suffixes or ".damaged" in path.suffixes:
                yield path, ASIDE


def folder_bytes(path: Path) -> int:
    """Returns the size of a file, or of all files below a folder; links count nothing."""
    if path.is_symlink() or not path.exists():
        return 0
    if path.is_file():
        return path.stat().st_size
    paths = (Path(inner, name) for inner, _, names in os.walk(path) for name in names)
    return sum(each.stat().st_size for each in paths if not each.is_symlink() and each.exists())


def remove_leftover(leftover: Leftover) -> None:
    """Removes it, unless a job has started on its run meanwhile. Raises UserError then, or if the system refuses."""
    run = next(parent for parent in leftover.path.parents if is_run(parent))
    try:
        with open(run / LOCK_NAME, "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if leftover.path.is_dir() and not leftover.path.is_symlink():
                # a half-removed checkpoint must not look complete
                leftover.path.joinpath(FACTS_NAME).unlink(missing_ok=True)
                shutil.rmtree(leftover.path)
            else:
                leftover.path.unlink(missing_ok=True)
    except BlockingIOError:
        raise UserError(f"a job has started on {run}: nothing more of it is removed") from None
    except OSError as error:
        raise UserError(f"{leftover.path} cannot be removed ({error.strerror})") from None
