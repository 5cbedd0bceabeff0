"""Builds the token rows of CORE's examples and locates the answers in them.

Defined by DCLM (arXiv 2406.11794), in detail by nanochat (github.com/karpathy/nanochat, nanochat/core_eval.py).
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from megachat.data.tokenizer import Tokenizer
from megachat.errors import UserError
from megachat.evals.core_bundle import Task

SHUFFLE_SEED = 1337  # order of a task's examples, before max_per_task
SHOTS_SEED = 1234  # plus the example's number
SHOT_SEPARATOR = "\n\n"


@dataclass(frozen=True)
class Row:
    """One text of an example. tokens: BOS first unless cropped. start: where the answer starts; it extends to the end.

    cropped: how many tokens were removed from the beginning.
    """

    tokens: tuple[int, ...]
    start: int
    cropped: int = 0


@dataclass(frozen=True)
class Question:
    """An example as rows, one per choice. gold: index of the correct row; None: one row, to be predicted exactly."""

    rows: tuple[Row, ...]
    gold: int | None


def shuffle_examples(task: Task, max_per_task: int) -> list[dict]:
    """Returns the first `max_per_task` of the task's examples in the metric's order; -1 for all."""
    examples = list(task.examples)
    random.Random(SHUFFLE_SEED).shuffle(examples)
    return examples[:max_per_task] if max_per_task > 0 else examples


def build_questions(task: Task, tokenizer: Tokenizer, longest: int, max_per_task: int) -> list[Question]:
    """Builds a task's questions. Rows longer than `longest` tokens are cropped at the beginning.

    Raises UserError if an answer alone is too long or has no tokens, or if there are too few examples for the shots.
    """
    examples = shuffle_examples(task, max_per_task)
    if len(examples) <= task.shots:
        raise UserError(
            f"{task.label} needs {task.shots} shots, but has only {len(examples)} examples: use more examples"
        )
    questions = []
    for number, example in enumerate(examples):
        others = [index for index in range(len(examples)) if index != number]
        shots = [examples[index] for index in random.Random(SHOTS_SEED + number).sample(others, task.shots)]
        rows, gold = _build_rows(task, example, shots, tokenizer), example.get("gold")
        name = f"example {number + 1} of {task.label}"
        questions.append(Question(tuple(_crop(row, longest, gold is None, name) for row in rows), gold))
    return questions


def build_texts(task: Task, example: dict, shots: Sequence[dict]) -> list[str]:
    """Returns shots and example as texts, one per choice; for language modeling one without and one with answer."""

    def text(example: dict, choice: int | None) -> str:
        if task.kind == "multiple_choice":
            return f"{example['query']}{task.delimiter}{example['choices'][choice]}"
        if task.kind == "schema":
            return f"{example['context_options'][choice]}{task.delimiter}{example['continuation']}"
        return f"{example['context'].strip()}{task.delimiter}{example['continuation']}"

    before = "".join(text(shot, shot.get("gold")) + SHOT_SEPARATOR for shot in shots)
    if task.kind != "language_modeling":
        choices = example["choices" if task.kind == "multiple_choice" else "context_options"]
        return [before + text(example, choice) for choice in range(len(choices))]
    # a trailing space would be a separate token here, but part of the answer's first token in the text with the answer
    question = f"{before}{example['context'].strip()}{task.delimiter}".strip()
    return [question, before + text(example, None)]


def common_prefix(rows: Sequence[Sequence[int]]) -> int:
    """Returns the number of leading tokens that all rows share."""
    return next((at for at, tokens in enumerate(zip(*rows, strict=False)) if len(set(tokens)) > 1), min(map(len, rows)))


def _build_rows(task: Task, example: dict, shots: Sequence[dict], tokenizer: Tokenizer) -> list[Row]:
    encoded = [tuple(tokenizer.encode(text, bos=True).tolist()) for text in build_texts(task, example, shots)]
    if task.kind == "multiple_choice":  # the answer is where the texts differ
        start = common_prefix(encoded)
        return [Row(tokens, start) for tokens in encoded]
    if task.kind == "schema":  # the answer is the common ending
        answer = common_prefix([tokens[::-1] for tokens in encoded])
        return [Row(tokens, len(tokens) - answer) for tokens in encoded]
    return [Row(encoded[1], common_prefix(encoded))]


def _crop(row: Row, longest: int, exact: bool, name: str) -> Row:
    excess = max(0, len(row.tokens) - longest)
    answer = len(row.tokens) - row.start
    if row.start - excess < 1:
        raise UserError(
            f"{name} has an answer of {answer} tokens, but the model takes {longest}, including at least one before "
            "the answer: leave the task out"
        )
    if exact and not answer:
        raise UserError(f"{name} has an answer without any tokens: repair it or leave the task out")
    return Row(row.tokens[excess:], row.start - excess, excess)
