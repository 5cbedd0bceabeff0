"""The texts of CORE's examples and where in them an answer stands, as DCLM (arXiv 2406.11794) defines and nanochat (github.com/karpathy/nanochat,
nanochat/core_eval.py) computes them."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from megachat.data.tokenizer import Tokenizer
from megachat.errors import UserError
from megachat.evals.core_bundle import Task

SHUFFLE_SEED = 1337  # of a task's examples, before the cap
SHOTS_SEED = 1234  # plus the example's number
_BETWEEN = "\n\n"  # shots


@dataclass(frozen=True)
class Row:
    """One text of an example: its tokens, BOS first unless it was cropped, the place of the first token of the answer, which goes on to the end,
    and how many first tokens were taken away."""

    tokens: tuple[int, ...]
    start: int
    cropped: int = 0


@dataclass(frozen=True)
class Question:
    """An example's rows, one a choice. gold: the right one; None: one row, whose answer must be what the model says."""

    rows: tuple[Row, ...]
    gold: int | None


def shuffle_examples(task: Task, max_per_task: int) -> list[dict]:
    """The task's examples in the metric's order, the first `max_per_task` of them; -1: all."""
    examples = list(task.examples)
    random.Random(SHUFFLE_SEED).shuffle(examples)
    return examples[:max_per_task] if max_per_task > 0 else examples


def build_questions(task: Task, tokenizer: Tokenizer, longest: int, max_per_task: int) -> list[Question]:
    """All examples of a task as rows of at most `longest` tokens, from which the first tokens are taken away where they would be longer.

    Raises UserError when an answer alone is longer, or has no tokens of its own, and when there are too few examples to draw the shots from.
    """
    examples = shuffle_examples(task, max_per_task)
    if len(examples) <= task.shots:
        raise UserError(
            f"{task.label} has {task.shots} shots and {len(examples)} examples to draw them from: take more examples"
        )
    found = []
    for number, example in enumerate(examples):
        others = [index for index in range(len(examples)) if index != number]
        shots = [examples[index] for index in random.Random(SHOTS_SEED + number).sample(others, task.shots)]
        rows = _rows(task, example, shots, tokenizer)
        found.append(_cropped(rows, example.get("gold"), longest, f"example {number + 1} of {task.label}"))
    return found


def build_texts(task: Task, example: dict, shots: Sequence[dict]) -> list[str]:
    """The example's texts after its shots: one a choice, or in language modelling one without and one with the answer."""
    delimiter = task.delimiter
    if task.kind == "multiple_choice":
        before = "".join(f"{shot['query']}{delimiter}{shot['choices'][shot['gold']]}{_BETWEEN}" for shot in shots)
        return [f"{before}{example['query']}{delimiter}{choice}" for choice in example["choices"]]
    if task.kind == "schema":
        before = "".join(
            f"{shot['context_options'][shot['gold']]}{delimiter}{shot['continuation']}{_BETWEEN}" for shot in shots
        )
        return [f"{before}{context}{delimiter}{example['continuation']}" for context in example["context_options"]]
    before = "".join(f"{shot['context'].strip()}{delimiter}{shot['continuation']}{_BETWEEN}" for shot in shots)
    question = f"{before}{example['context'].strip()}{delimiter}"
    # a space at its end would be a token of its own there, and a part of the answer's first one with the answer behind it
    return [question.strip(), question + example["continuation"]]


def common_prefix(rows: Sequence[Sequence[int]]) -> int:
    """How many first tokens all rows have in common."""
    return next((at for at, tokens in enumerate(zip(*rows, strict=False)) if len(set(tokens)) > 1), min(map(len, rows)))


def _rows(task: Task, example: dict, shots: Sequence[dict], tokenizer: Tokenizer) -> list[Row]:
    encoded = [tuple(tokenizer.encode(text, bos=True).tolist()) for text in build_texts(task, example, shots)]
    if task.kind == "multiple_choice":  # what differs is the answer
        start = common_prefix(encoded)
        return [Row(tokens, start) for tokens in encoded]
    if task.kind == "schema":  # the answer is what they end with
        answer = common_prefix([tokens[::-1] for tokens in encoded])
        return [Row(tokens, len(tokens) - answer) for tokens in encoded]
    return [Row(encoded[1], common_prefix(encoded))]


def _cropped(rows: Sequence[Row], gold: int | None, longest: int, what: str) -> Question:
    kept = []
    for row in rows:
        more = max(0, len(row.tokens) - longest)
        if row.start - more < 1:
            answer = len(row.tokens) - row.start
            raise UserError(
                f"{what} has an answer of {answer} tokens and the model takes {longest}, one of them in front: leave the task out"
            )
        if gold is None and row.start == len(row.tokens):
            raise UserError(f"{what} has an answer without tokens of its own: repair it or leave the task out")
        kept.append(Row(row.tokens[more:], row.start - more, more))
    return Question(tuple(kept), gold)
