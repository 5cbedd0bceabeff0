"""Two sides of evaluations, each of one run of a recipe or of several: is the difference of their means larger than its error?"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from megachat.errors import UserError
from megachat.evals.core_bundle import CORE_TASKS
from megachat.evals.uncertainty import (
    CONFIDENCE,
    GPT2_CORE,
    SIGMAS,
    TaskScores,
    estimate,
    estimate_difference,
    judge_against,
    score_tasks,
)
from megachat.text import text_table

Side = Sequence[tuple[Path, dict]]  # (JSON file, what load_results gives) of each run


def compare_evaluations(first: Side, second: Side, *, same_weights: bool = False) -> dict:
    """JSON values: each task's means and difference with its error, the mean of the differences, and the verdict.

    Tasks that only some of the evaluations have are left out and named. Raises UserError when no task is left, or when the runs of one side
    did not answer the same examples.
    """
    sections = [[told.get("core", {}).get("tasks", {}) for _, told in side] for side in (first, second)]
    every = [set(tasks) for side in sections for tasks in side]
    shared = [label for label in sections[0][0] if all(label in tasks for tasks in every)]
    if not shared:
        path = next(
            (path for side in (first, second) for path, told in side if not told.get("core", {}).get("tasks")), None
        )
        why = f"{path} has no CORE" if path else "they have no task in common"
        raise UserError(
            f"these evaluations cannot be compared, because {why}: evaluate with launch/evaluate.py --core and the same tasks"
        )
    left, right = (_scored(side, tasks, shared) for side, tasks in zip((first, second), sections, strict=True))
    same = {label: _examples(sections[0][0][label]) == _examples(sections[1][0][label]) for label in shared}
    for label in shared:
        if left[label].baseline != right[label].baseline:
            raise UserError(
                f"{first[0][0]} and {second[0][0]} have other baselines of {label}: evaluate both with the same bundle"
            )
    found = estimate_difference(left, right, same_examples=same, same_weights=same_weights)
    word = "cannot tell"
    if abs(found.value) > SIGMAS * found.both:
        word = "the first is better" if found.value > 0 else "the second is better"
    return {
        "runs": [[str(path) for path, _ in side] for side in (first, second)],
        "is_core": set(shared) == set(CORE_TASKS),
        "left_out": sorted(set().union(*every) - set(shared)),
        "same_examples": all(same.values()),
        "difference": found.value,
        "deviation": {"examples": found.examples, "runs": found.runs, "both": found.both},
        "verdict": word,
        "tasks": {
            label: {
                "means": [float(side[label].right.mean()) for side in (left, right)],
                "difference": found.tasks[label],
                "deviation": found.task_examples[label],
                "paired": same[label],
            }
            for label in shared
        },
    }


def _examples(task: dict) -> tuple:
    """What tells which examples a task's answers are of: its data, and how many of them, which are always the first of one order."""
    return task["digest"], task["examples"]


def _scored(side: Side, tasks: list[dict], labels: list[str]) -> dict[str, TaskScores]:
    for label in labels:
        for (path, _), task in zip(side, tasks, strict=True):
            if _examples(task[label]) != _examples(tasks[0][label]):
                raise UserError(
                    f"{path} answered other examples of {label} than {side[0][0]}: evaluate both with one bundle and --max-per-task"
                )
    answers = [{label: [answer == "1" for answer in task[label]["right"]] for label in labels} for task in tasks]
    return score_tasks(answers, {label: tasks[0][label]["baseline"] for label in labels})


def compare_with_gpt2(side: Side) -> dict:
    """JSON values: the mean CORE of runs of one recipe, its error, and the verdict against GPT-2. Raises UserError when one of them has no CORE."""
    for path, told in side:
        if told.get("core", {}).get("core_metric") is None:
            raise UserError(
                f"{path} has no value of CORE, which takes all of its {len(CORE_TASKS)} tasks: evaluate with the whole bundle"
            )
    found = estimate(_scored(side, [told["core"]["tasks"] for _, told in side], list(CORE_TASKS)))
    return {
        "runs": [str(path) for path, _ in side],
        "core_metric": found.value,
        "deviation": {"examples": found.examples, "runs": found.runs, "both": found.both},
        "verdict": asdict(judge_against(found, len(side))),
        "whole": all(told["core"]["whole"] for _, told in side),
    }


def gpt2_lines(told: dict) -> list[str]:
    """Lines for a person."""
    count, deviation = len(told["runs"]), told["deviation"]
    lines = [
        f"mean CORE of {count} run{'s' * (count > 1)}: {told['core_metric']:.6f} +- {deviation['both']:.6f} (examples {deviation['examples']:.6f}, "
        f"from run to run {deviation['runs']:.6f})",
        f"against GPT-2's {GPT2_CORE}: {told['verdict']['text']}",
    ]
    return lines if told["whole"] else [*lines, "not of all examples: not the whole metric"]


def comparison_lines(told: dict) -> list[str]:
    """Lines for a person."""
    rows = [("task", "first", "second", "centered difference", "+-", "")]
    for label, task in told["tasks"].items():
        means = [f"{mean:.4f}" for mean in task["means"]]
        rows.append(
            (
                label,
                *means,
                f"{task['difference']:+.4f}",
                f"{task['deviation']:.4f}",
                "" if task["paired"] else "other examples",
            )
        )
    lines = text_table(rows, right=range(1, 5))
    deviation = told["deviation"]
    what = "CORE" if told["is_core"] else f"mean of {len(told['tasks'])} tasks, which is not CORE"
    counts = " against ".join(f"{len(side)} run{'s' * (len(side) > 1)}" for side in told["runs"])
    lines += [f"left out, because not all have it: {label}" for label in told["left_out"]]
    lines.append(
        f"{what}: {told['difference']:+.6f} +- {deviation['both']:.6f} ({counts}; examples {deviation['examples']:.6f}, from run to run "
        f"{deviation['runs']:.6f})"
    )
    return [line.rstrip() for line in lines] + [
        f"{told['verdict']} ({CONFIDENCE:.0%}: a difference of {SIGMAS * deviation['both']:.6f} would be told)"
    ]
