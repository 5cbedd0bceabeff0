"""Saves evaluations: one JSON file per step of a run, with the answer to every example for later comparisons."""

import contextlib
import functools
import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from megachat.errors import UserError
from megachat.evals.core_bundle import CORE_TASKS, Bundle
from megachat.evals.uncertainty import estimate, judge_against, score_tasks
from megachat.files import (
    CONFIG_NAME,
    EVALUATIONS,
    Log,
    list_folder,
    read_side_file,
    readable_metrics,
    refuse_damaged,
    write_side_json,
)
from megachat.installation import version_text
from megachat.text import plural, text_table

RESULTS_FORMAT = "megachat-evaluation-1"
# Raise it with every change by which the same weights, tokenizer and bundle could get other answers or another bpb.
HARNESS_VERSION = 1
_program = functools.cache(version_text)
CROPPED = "prompts are cropped to the model's sequence_len"
CROPPED_LINE = f"{CROPPED}, which nanochat does not do"


def results_path(run_folder: Path, step: int, *, in_training: bool = False) -> Path:
    """Returns the path of the file for one step of a run."""
    return run_folder / EVALUATIONS / f"step_{step:06d}{'_in_training' * in_training}.json"


def recorded_validation(run_folder: Path, step: int) -> float | None:
    """Returns the bits per byte that the run's metrics.jsonl has for `step`, None if it has none.

    The checkpoint of a step is made before its validation, so it does not contain this value.
    """
    value = None
    for line in readable_metrics(run_folder, containing='"val/bpb"'):
        with contextlib.suppress(ValueError, TypeError, KeyError):
            value = float(line["val/bpb"]) if line["step"] == step else value
    return value


def evaluation_stamp(tokenizer: str) -> dict:
    """Returns what a result depends on besides the weights and the examples. tokenizer: its fingerprint."""
    return {"tokenizer": tokenizer, "harness": HARNESS_VERSION, "megachat": _program()}


@dataclass(frozen=True)
class Answers:
    """A task's answers. right: whether each example is answered correctly, in the metric's order.

    left_out: numbers of the examples that do not fit the model; `right` lacks them. ambiguous: how many questions have
    equal or empty choices; they are scored like the others.
    """

    right: tuple[bool, ...]
    left_out: tuple[int, ...] = ()
    ambiguous: int = 0


def core_section(bundle: Bundle, answers: Mapping[str, Answers], max_per_task: int, *, crop: bool, **more) -> dict:
    """Returns the "core" section of the file. crop: whether long prompts were cropped to sequence_len.

    more: further keys. core_metric is the mean of the centered accuracies of CORE's 22 tasks, None if one is missing;
    mean_centered is then the mean of the evaluated tasks.
    """
    tasks = {task.label: task for task in bundle.tasks}
    right = {label: answer.right for label, answer in answers.items()}
    scores = score_tasks([right], {label: tasks[label].baseline for label in answers})
    is_core = scores.keys() >= set(CORE_TASKS)
    mean = estimate({label: scores[label] for label in (CORE_TASKS if is_core else scores)})
    each = estimate(scores)  # a bundle may contain tasks that are not part of CORE
    return {
        "core_metric": mean.value if is_core else None,
        "mean_centered": mean.value,
        "deviation": mean.deviation_json(),
        "verdict": asdict(judge_against(mean, runs=1)) if is_core else None,
        "missing": list(bundle.missing),
        "bundle_digest": bundle.digest,
        "max_per_task": max_per_task,
        "crop": crop,
        "whole": all(len(right[label]) == len(tasks[label].examples) for label in right),
        "tasks": {
            label: {
                "accuracy": sum(answer.right) / len(answer.right),
                "centered": each.task_values[label],
                "deviation": each.task_errors[label],  # of the centered accuracy
                "baseline": tasks[label].baseline,
                "examples": len(answer.right),
                "left_out": list(answer.left_out),
                "ambiguous": answer.ambiguous,
                "digest": tasks[label].digest,
                "right": "".join("01"[is_right] for is_right in answer.right),
            }
            for label, answer in answers.items()
        },
    } | more


def save_results(path: Path, results: dict, log: Log = print) -> None:
    """Writes the file. Sections of an earlier evaluation of the same checkpoint that `results` lacks are kept.

    log: gets a line if the earlier file is not an evaluation; it is set aside.
    """
    results = {"format": RESULTS_FORMAT} | results
    earlier = read_side_file(path, _parse_results, log) or {}
    if earlier.get("checkpoint_sha256") == results.get("checkpoint_sha256") is not None:
        results = earlier | results
    write_side_json(path, results, log)


def _parse_results(content: bytes) -> dict:
    results = json.loads(content)
    if results["format"] != RESULTS_FORMAT:
        raise ValueError(f"format {results['format']!r}")
    core = results.get("core", {})
    if type(results["step"]) is not int or not isinstance(core.get("crop", True), bool):
        raise ValueError(f"step {results['step']!r}, crop {core.get('crop')!r}")
    if core.get("tasks") and not isinstance(core["whole"], bool):
        raise ValueError(f"whole {core['whole']!r}")
    for label, task in core.get("tasks", {}).items():
        right, left_out, digest = task["right"], task.get("left_out", []), task["digest"]
        typed = isinstance(left_out, list) and isinstance(digest, str)
        if not typed or len(right) != task["examples"] or set(right) - set("01"):
            raise ValueError(f"answers of {label}")
        if not 0 <= task["baseline"] < 1:
            raise ValueError(f"baseline of {label}")
    return results


def load_results(path: Path) -> dict:
    """Reads an evaluation's JSON. Raises UserError if the file is not a valid evaluation."""
    with refuse_damaged(path, "is not a valid evaluation ({}): evaluate again"):
        return _parse_results(path.read_bytes())


def newest_results(run_folder: Path) -> Path:
    """Returns the run's last evaluation with CORE; see `find_newest_results`. Raises UserError if the run has none."""
    if (newest := find_newest_results(run_folder)) is None:
        raise UserError(f"{run_folder} contains no evaluation with CORE: run `{core_command(run_folder)}` first")
    return newest


def core_command(run_folder: Path) -> str:
    """Returns the command that evaluates CORE of a run's newest checkpoint, with the bundle of its config."""
    bundle: object = None
    with contextlib.suppress(OSError, ValueError, TypeError, LookupError):
        bundle = json.loads((run_folder / CONFIG_NAME).read_bytes())["evaluate"]["core_bundle"]
    words = ["megachat", "evaluate", "--checkpoint", str(run_folder), "--core"]
    return shlex.join(words + ([bundle] if isinstance(bundle, str) else []))


def find_newest_results(run_folder: Path, *, whole_core: bool = False) -> Path | None:
    """Returns the run's last evaluation with CORE, None without one; of several at that step, the one with the most
    examples.

    whole_core: only an evaluation of all of CORE's tasks, which has a core_metric. Raises UserError if a file of that
    step or a later one is damaged: an older result would pass for the newest.
    """
    candidates, damaged = [], list[tuple[int, UserError]]()
    for path in list_folder(run_folder / EVALUATIONS):
        if path.suffix != ".json":
            continue
        try:
            results = load_results(path)
        except UserError as error:
            digits = re.match(r"step_(\d+)", path.stem)
            damaged.append((int(digits[1]) if digits else 0, error))
            continue
        core = results.get("core", {})
        if (tasks := core.get("tasks")) and not (whole_core and core.get("core_metric") is None):
            candidates.append((results["step"], sum(task["examples"] for task in tasks.values()), path))
    last = max(candidates)[0] if candidates else 0
    if problems := [error for step, error in damaged if step >= last]:
        raise problems[-1]
    return max(candidates)[2] if candidates else None


CORE_COLUMNS = ("examples", "accuracy", "centered", "standard error")


def core_rows(section: dict) -> list[tuple[str, ...]]:
    """Returns each task with its CORE_COLUMNS as text."""
    values = ("accuracy", "centered", "deviation")
    return [
        (label, f"{task['examples']:,}", *(f"{task[key]:.4f}" for key in values))
        for label, task in section["tasks"].items()
    ]


def core_table(section: dict) -> list[str]:
    """Returns lines of text: each task's accuracy, centered accuracy and error, then `core_lines`."""
    table = text_table([("task", *CORE_COLUMNS), *core_rows(section)], right=range(1, 5))
    return [*table, *core_lines(section)]


def core_lines(section: dict) -> list[str]:
    """Returns lines of text: the mean with its error and, if it is CORE, the verdict against GPT-2."""
    error, notes = error_text(section["deviation"], digits=4), _notes(section)
    controls = _control_lines(section["controls"]) if "controls" in section else []
    if section["core_metric"] is None:
        return [
            *notes,
            *controls,
            f"mean of {plural(len(section['tasks']), 'task')} {section['mean_centered']:.6f} {error}; "
            f"this is not CORE: {len(section['missing'])} of its {len(CORE_TASKS)} tasks are missing",
        ]
    lines = [
        *notes,
        *controls,
        f"CORE {section['core_metric']:.6f} {error}",
        f"against GPT-2's: {section['verdict']['text']}",
    ]
    if not section["whole"] and section["max_per_task"] > 0:
        lines.append(f"at most {section['max_per_task']:,} examples per task: not the full metric")
    return lines


def _control_lines(section: dict) -> list[str]:
    """Returns lines of text: what reading gains (evals/controls.py), over all tasks and in each."""
    if not section["tasks"]:
        return ["controls: no example fits the model when its context is swapped"]
    value = f"{section['difference']:+.4f} +- {section['deviation']:.4f} (standard error)"
    each = ", ".join(
        f"{label} {task['difference']:+.3f} ({task['swapped']})" for label, task in section["tasks"].items()
    )
    return [
        f"gain from reading, over {plural(len(section['tasks']), 'task')}: {value} of the centered accuracy",
        f"  {each}",
    ]


def _notes(section: dict) -> list[str]:
    """Returns lines of text about the questions that need explanation."""
    lines = [CROPPED_LINE] if section["crop"] else []
    for key, what in (
        ("left_out", "do not fit the model and are left out: not the full metric"),
        ("ambiguous", "have equal or empty choices; they are scored as in nanochat"),
    ):
        counts = {label: len(task[key]) if key == "left_out" else task[key] for label, task in section["tasks"].items()}
        if total := sum(counts.values()):
            each = ", ".join(f"{label} {count:,}" for label, count in counts.items() if count)
            lines.append(f"{total:,} questions {what} ({each})")
    return lines


def error_text(deviation: Mapping[str, float], digits: int) -> str:
    """Returns the standard error and its two parts as text."""
    both, examples, runs = (f"{deviation[key]:.{digits}f}" for key in ("both", "examples", "runs"))
    return f"+- {both} (standard error: examples {examples}, from run to run {runs})"
