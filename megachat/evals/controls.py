"""Counterfactual controls of CORE: does a model answer because it reads, or could it without?

Each example is evaluated again with another example's text in place of what the answer should follow from: the passage
before a question, else the question or the context. What a model loses is what it gains from reading. The idea is of
nanochat's pull request 806 (https://github.com/karpathy/nanochat).
"""

from collections.abc import Mapping, Sequence

import numpy as np

from megachat.evals.core_bundle import CoreTask
from megachat.evals.results import Answers
from megachat.evals.uncertainty import TaskScores, estimate_difference

_QUESTION = "\nQuestion:"  # after a passage, in the tasks that have one
_PROMPT_KEYS = {"multiple_choice": "query", "schema": "continuation", "language_modeling": "context"}


def swapped_part(task: CoreTask) -> str:
    """Returns what another example's is put in place of: "passage" if all of its prompts have one. If not, "stem" of a
    multiple choice, "continuation" of a schema (whose contexts are its choices), "context" of language modeling.
    """
    key = _PROMPT_KEYS[task.kind]
    if task.kind != "schema" and all(_passage(example[key]) for example in task.examples):
        return "passage"
    return "stem" if key == "query" else key


def _passage(text: str) -> str:
    return text[: max(0, text.rfind(_QUESTION))].strip()


def swap_examples(task: CoreTask, examples: Sequence[dict]) -> list[dict]:
    """Returns the examples, each with the part of the next one that has another, the first following the last.

    Choices, answer and everything else stay. An example without another part in its task stays as it is.
    """
    key, whole = _PROMPT_KEYS[task.kind], swapped_part(task) != "passage"
    parts = [example[key] if whole else example[key][: example[key].rfind(_QUESTION)] for example in examples]
    swapped = []
    for number, example in enumerate(examples):
        later = parts[number + 1 :] + parts[:number]
        part = next((other for other in later if other.strip() != parts[number].strip()), parts[number])
        swapped.append(example | {key: part + example[key][len(parts[number]) :]})
    return swapped


def control_section(tasks: Sequence[CoreTask], answers: Mapping[str, Answers], controls: Mapping[str, Answers]) -> dict:
    """Returns the "controls" section of an evaluation's JSON.

    answers, controls: of each task with the examples as they are, and swapped. Examples that one of them leaves out are
    not compared. difference: of the centered accuracies, what reading gains. A task of which nothing is left is not
    in it.
    """
    right = {task.label: _both(answers[task.label], controls[task.label]) for task in tasks}
    scored = [task for task in tasks if right[task.label]]
    if not scored:
        return {"tasks": {}}
    plain, swapped = (
        {
            task.label: TaskScores(np.array([[pair[side] for pair in right[task.label]]]), task.baseline)
            for task in scored
        }
        for side in (0, 1)
    )
    same = {task.label: True for task in scored}
    gain = estimate_difference(plain, swapped, same_examples=same, same_weights=True)
    return {
        "difference": gain.value,
        "deviation": gain.example_error,
        "tasks": {
            task.label: {
                "swapped": swapped_part(task),
                "examples": len(right[task.label]),
                "accuracy": float(swapped[task.label].right.mean()),
                "centered": (float(swapped[task.label].right.mean()) - task.baseline) / (1 - task.baseline),
                "difference": gain.task_values[task.label],
                "deviation": gain.task_errors[task.label],
                "right": "".join("01"[pair[1]] for pair in right[task.label]),
            }
            for task in scored
        },
    }


def _both(answers: Answers, control: Answers) -> list[tuple[bool, bool]]:
    """Returns (right, right when swapped) of the examples that both have."""
    one, other = (_by_number(each) for each in (answers, control))
    return [(one[number], other[number]) for number in sorted(one.keys() & other.keys())]


def _by_number(answers: Answers) -> dict[int, bool]:
    left_out, count = set(answers.left_out), len(answers.right) + len(answers.left_out)
    return dict(zip((number for number in range(count) if number not in left_out), answers.right, strict=True))
