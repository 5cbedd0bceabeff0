"""Compares evaluations: two recipes with each other, or one recipe with GPT-2. A recipe may have several runs."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from megachat.errors import UserError
from megachat.evals.core_bundle import CORE_TASKS
from megachat.evals.results import CROPPED, CROPPED_LINE, error_text, load_results, newest_results
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
from megachat.files import path_kind
from megachat.text import plural, text_table

_MODES = (
    "{} and {} treat long prompts differently (core_crop; evaluations of older versions cropped): evaluate one of them "
    "again with the other's setting"
)
# what a CORE value depends on besides the weights -> why its difference matters
_STAMPS = {
    "tokenizer": "CORE depends on it: with equal bits per byte, other tokenizers have moved it by more than 0.01",
    "bundle_digest": "other examples or settings of the tasks",
    "harness": "the same weights could get other answers",
    "megachat": "other versions of the program",
}
Side = Sequence[tuple[Path, dict]]  # per run of one recipe: its JSON file and the content


def load_side(paths: Sequence[Path]) -> Side:
    """Loads evaluations, each from a JSON file or from a run folder (its newest evaluation with CORE).

    Raises UserError if a path does not exist, is not an evaluation, or is given twice.
    """
    side: list[tuple[Path, dict]] = []
    for path in paths:
        if not path_kind(path):
            raise UserError(f"{path} does not exist: give a run's folder, or the JSON file of an evaluation")
        file = newest_results(path) if path_kind(path) == "folder" else path
        if any(file.resolve() == other.resolve() for other, _ in side):
            raise UserError(f"{file.resolve()} is given twice on one side: give each run once")
        side.append((file, load_results(file)))
    return side


def compare_evaluations(first: Side, second: Side, *, same_weights: bool = False) -> dict:
    """Returns as JSON values: each task's means and difference with its error, the mean difference, and the verdict.

    Tasks that not all evaluations have are left out and listed. Raises UserError if no task is left, or if the runs of
    one side answered different examples.
    """
    first_tasks, second_tasks = (
        [results.get("core", {}).get("tasks", {}) for _, results in side] for side in (first, second)
    )
    labels = [set(tasks) for tasks in (*first_tasks, *second_tasks)]
    shared = [label for label in first_tasks[0] if all(label in others for others in labels)]
    if not shared:
        without = [path for (path, _), tasks in zip((*first, *second), labels, strict=True) if not tasks]
        reason = f"{without[0]} has no CORE" if without else "they have no task in common"
        raise UserError(
            f"cannot compare these evaluations: {reason}; run `megachat evaluate --core` with the same tasks for all"
        )
    first_crop, second_crop = _crop_mode(first), _crop_mode(second)
    if first_crop != second_crop and not same_weights:
        raise UserError(_MODES.format(first[0][0], second[0][0]) + ", or add --same-weights if only that differs")
    left, right = _score_side(first, first_tasks, shared), _score_side(second, second_tasks, shared)
    same = {label: _example_set(first_tasks[0][label]) == _example_set(second_tasks[0][label]) for label in shared}
    for label in shared:
        if left[label].baseline != right[label].baseline:
            raise UserError(
                f"{first[0][0]} and {second[0][0]} have different baselines for {label}: "
                "evaluate both with the same bundle"
            )
    difference = estimate_difference(left, right, same_examples=same, same_weights=same_weights)
    verdict = "cannot tell"
    if abs(difference.value) > SIGMAS * difference.error:
        verdict = "the first is better" if difference.value > 0 else "the second is better"
    return {
        "runs": [[str(path) for path, _ in side] for side in (first, second)],
        "is_core": set(shared) == set(CORE_TASKS),
        "crop": [first_crop, second_crop],
        "left_out": sorted(set().union(*labels) - set(shared)),
        "same_examples": all(same.values()),
        "warnings": stamp_warnings((*first, *second)),
        "difference": difference.value,
        "deviation": difference.deviation_json(),
        "verdict": verdict,
        "tasks": {
            label: {
                "means": [float(side[label].right.mean()) for side in (left, right)],
                "difference": difference.task_values[label],
                "deviation": difference.task_errors[label],
                "paired": same[label],
            }
            for label in shared
        },
    }


def stamp_warnings(runs: Side) -> list[str]:
    """Returns one sentence for each thing besides the weights that differs between evaluations."""
    warnings = []
    for key, consequence in _STAMPS.items():
        values = [str(stamp_of(results, key) or "none recorded") for _, results in runs]
        other = next((number for number, value in enumerate(values) if value != values[0]), 0)
        if other:
            (first, one), (second, two) = ((runs[n][0], values[n]) for n in (0, other))
            one, two = (value[:12] if len(value) == 64 else value for value in (one, two))  # of hashes
            name = key.replace("_", " ")
            warnings.append(f"{name} of CORE: {first} has {one}, {second} has {two}; {consequence}")
    return warnings


def stamp_of(results: dict, key: str) -> str | int | None:
    """Returns what an evaluation has of a part of its stamp; None for evaluations of versions without it."""
    core, document = results.get("core", {}), {"tokenizer": results.get("tokenizer")}
    return core.get(key, document.get(key))


def _example_set(task: dict) -> tuple:
    """Identifies the examples that were answered: the data, their number (always the first of a fixed order), and which
    did not fit the model.
    """
    return task["digest"], task["examples"], tuple(task.get("left_out", ()))


def _crop_mode(side: Side) -> bool:
    """Returns whether prompts were cropped, which older evaluations always did. Raises UserError if only some were."""
    modes = [results.get("core", {}).get("crop", True) for _, results in side]
    if len(set(modes)) > 1:
        raise UserError(_MODES.format(*(side[modes.index(mode)][0] for mode in (True, False))))
    return modes[0]


def _score_side(side: Side, tasks: Sequence[dict], labels: Sequence[str]) -> dict[str, TaskScores]:
    for label in labels:
        for (path, _), run_tasks in zip(side, tasks, strict=True):
            if _example_set(run_tasks[label]) != _example_set(tasks[0][label]):
                raise UserError(
                    f"{path} and {side[0][0]} answered different examples of {label}: "
                    "evaluate both with the same bundle and --max-per-task"
                )
    answers = [{label: [answer == "1" for answer in run[label]["right"]] for label in labels} for run in tasks]
    return score_tasks(answers, {label: tasks[0][label]["baseline"] for label in labels})


def compare_with_gpt2(side: Side) -> dict:
    """Returns as JSON values a recipe's mean CORE, its error and the verdict. Raises UserError if a run lacks CORE."""
    for path, results in side:
        if results.get("core", {}).get("core_metric") is None:
            raise UserError(
                f"{path} has no CORE value, which requires all {len(CORE_TASKS)} tasks: evaluate with the full bundle"
            )
    crop = _crop_mode(side)
    recipe = estimate(_score_side(side, [results["core"]["tasks"] for _, results in side], CORE_TASKS))
    return {
        "runs": [str(path) for path, _ in side],
        "core_metric": recipe.value,
        "crop": crop,
        "deviation": recipe.deviation_json(),
        "verdict": asdict(judge_against(recipe, len(side))),
        "whole": all(results["core"]["whole"] for _, results in side),
        "warnings": stamp_warnings(side),
    }


def mean_of_tasks(side: Side) -> dict:
    """Returns as JSON values the mean centered accuracy of a recipe's runs over the tasks that all of them have, and
    its error. Raises UserError if they answered different examples.
    """
    tasks = [results["core"]["tasks"] for _, results in side]
    shared = [label for label in tasks[0] if all(label in others for others in tasks)]
    return {"deviation": estimate(_score_side(side, tasks, shared)).deviation_json()}


def gpt2_lines(comparison: dict) -> list[str]:
    """Returns lines of text for the result of `compare_with_gpt2`."""
    lines = [
        f"mean CORE of {plural(len(comparison['runs']), 'run')}: {comparison['core_metric']:.6f} "
        f"{error_text(comparison['deviation'], digits=6)}",
        f"against GPT-2's {GPT2_CORE}: {comparison['verdict']['text']}",
    ]
    lines += [CROPPED_LINE] if comparison["crop"] else []
    lines += [] if comparison["whole"] else ["not all examples were evaluated: not the full metric"]
    return [*lines, *_warning_lines(comparison)]


def comparison_lines(comparison: dict) -> list[str]:
    """Returns lines of text for the result of `compare_evaluations`."""
    rows = [("task", "first", "second", "centered difference", "standard error", "")]
    for label, task in comparison["tasks"].items():
        means = (f"{mean:.4f}" for mean in task["means"])
        note = "" if task["paired"] else "different examples"
        rows.append((label, *means, f"{task['difference']:+.4f}", f"{task['deviation']:.4f}", note))
    what = "CORE" if comparison["is_core"] else f"mean of {plural(len(comparison['tasks']), 'task')}, which is not CORE"
    deviation = comparison["deviation"]
    return [
        *text_table(rows, right=range(1, 5)),
        *_crop_lines(comparison["crop"]),
        *(f"left out, because not all evaluations have it: {label}" for label in comparison["left_out"]),
        f"{what}: {comparison['difference']:+.6f} {error_text(deviation, digits=6)}; "
        + " against ".join(plural(len(side), "run") for side in comparison["runs"]),
        f"{comparison['verdict']} (at {CONFIDENCE:.0%} confidence; "
        f"the smallest detectable difference is {SIGMAS * deviation['both']:.6f})",
        *_warning_lines(comparison),
    ]


def _warning_lines(comparison: dict) -> list[str]:
    return [f"warning: {text}" for text in comparison["warnings"]]


def _crop_lines(modes: Sequence[bool]) -> list[str]:
    if modes[0] == modes[1]:
        return [CROPPED] if modes[0] else []
    return [f"{CROPPED} in the {'first' if modes[0] else 'second'} evaluation only"]
