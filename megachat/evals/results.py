"""What an evaluation leaves behind: one JSON file a step of a run, with every example's answer, so that it can be compared later."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from megachat.errors import UserError
from megachat.evals.core_bundle import CORE_TASKS, Bundle, Task
from megachat.evals.uncertainty import Estimate, estimate, judge_against, score_tasks
from megachat.files import write_atomically
from megachat.text import text_table

FORMAT = "megachat-evaluation-1"
FOLDER = "evaluations"


def results_path(run_folder: Path, step: int, *, in_training: bool = False) -> Path:
    """Where the evaluation of a step of a run lies."""
    return run_folder / FOLDER / f"step_{step:06d}{'_in_training' * in_training}.json"


def core_section(
    bundle: Bundle, right: Mapping[str, tuple[bool, ...]], core_metric: float | None, max_per_task: int, **more
) -> dict:
    """JSON values of one evaluation of CORE. right: task -> each example right or not. core_metric: None where tasks are missing."""
    tasks = {task.label: task for task in bundle.tasks}
    all_scored = score_tasks([right], {label: tasks[label].baseline for label in right})
    each = estimate(all_scored)
    counted = CORE_TASKS if core_metric is not None else right  # a bundle may hold tasks beside the metric's
    found = estimate({label: all_scored[label] for label in counted})
    return {
        "core_metric": core_metric,
        "mean_centered": found.value,
        "deviation": {"examples": found.examples, "runs": found.runs, "both": found.both},
        "verdict": None if core_metric is None else asdict(judge_against(found, runs=1)),
        "missing": list(bundle.missing),
        "bundle_digest": bundle.digest,
        "max_per_task": max_per_task,
        "whole": all(len(answers) == len(tasks[label].examples) for label, answers in right.items()),
        "tasks": {label: _task_section(tasks[label], answers, each) for label, answers in right.items()},
    } | more


def _task_section(task: Task, answers: tuple[bool, ...], found: Estimate) -> dict:
    return {
        "accuracy": sum(answers) / len(answers),
        "centered": found.tasks[task.label],
        "deviation": found.task_examples[task.label],  # of centered
        "baseline": task.baseline,
        "examples": len(answers),
        "digest": task.digest,
        "right": "".join("01"[answer] for answer in answers),
    }


def save_results(path: Path, told: dict) -> dict:
    """Write the file; what an earlier evaluation of the same checkpoint measured and this one did not stays in it. Returns what it holds."""
    told = {"format": FORMAT} | told
    try:
        earlier = load_results(path) if path.exists() else {}
    except UserError:  # replaced: it is none of ours, or cut short
        earlier = {}
    if earlier.get("checkpoint_sha256") == told.get("checkpoint_sha256") is not None:
        told = earlier | told
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(told, indent=1, ensure_ascii=False).encode() + b"\n")
    return told


def load_results(path: Path) -> dict:
    """An evaluation's JSON. Raises UserError when it is none."""
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        if told["format"] != FORMAT:
            raise ValueError(f"format {told['format']!r}")
        for label, task in told.get("core", {}).get("tasks", {}).items():
            if (
                len(task["right"]) != task["examples"]
                or set(task["right"]) - set("01")
                or not isinstance(task["digest"], str)
            ):
                raise ValueError(f"answers of {label}")
            if not 0 <= task["baseline"] < 1:
                raise ValueError(f"baseline of {label}")
        return told
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is no evaluation of launch/evaluate.py ({type(error).__name__}: {error}): make it again"
        ) from None


def newest_results(run_folder: Path) -> Path:
    """The evaluation with CORE of a run's last evaluated step, of one step the one with most examples. Raises UserError when there is none."""
    found = []
    for path in sorted((run_folder / FOLDER).glob("*.json")):
        told = load_results(path)
        if tasks := told.get("core", {}).get("tasks"):
            found.append((told["step"], sum(task["examples"] for task in tasks.values()), path))
    if not found:
        raise UserError(
            f"{run_folder} holds no evaluation with CORE: make one with launch/evaluate.py --checkpoint {run_folder} --core"
        )
    return max(found)[2]


def core_table(section: dict) -> list[str]:
    """Lines: each task's accuracy, its error and the centered accuracy; the mean, what it is, and the verdict."""
    rows = [("task", "examples", "accuracy", "centered", "+-")]
    for label, task in section["tasks"].items():
        rows.append(
            (
                label,
                f"{task['examples']:,}",
                f"{task['accuracy']:.4f}",
                f"{task['centered']:.4f}",
                f"{task['deviation']:.4f}",
            )
        )
    return [*text_table(rows, right=range(1, 5)), *core_lines(section)]


def core_lines(section: dict) -> list[str]:
    """The mean with its error, and the verdict against GPT-2 where it is CORE."""
    deviation = section["deviation"]
    error = (
        f"+- {deviation['both']:.4f} (examples {deviation['examples']:.4f}, from run to run {deviation['runs']:.4f})"
    )
    if section["core_metric"] is None:
        missing = f"{len(section['missing'])} of its {len(CORE_TASKS)} tasks are missing"
        return [
            f"mean of {len(section['tasks'])} tasks {section['mean_centered']:.6f} {error}; this is not CORE: {missing}"
        ]
    told = [f"CORE {section['core_metric']:.6f} {error}", f"against GPT-2's: {section['verdict']['text']}"]
    if not section["whole"]:
        told.append(f"at most {section['max_per_task']:,} examples a task: not the whole metric")
    return told
