"""Builds the token rows of CORE's examples and locates the answers in them.

Defined by DCLM (arXiv 2406.11794), in detail by nanochat (github.com/karpathy/nanochat, nanochat/core_eval.py).
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from megachat.data.tokenizer import Tokenizer
from megachat.errors import UserError
from megachat.evals.core_bundle import Bundle, CoreTask
from megachat.planning.dimensions import Dimensions
from megachat.settings import EvaluateConfig

SHUFFLE_SEED = 1337  # order of a task's examples, before max_per_task
SHOTS_SEED = 1234  # plus the example's number
SHOT_SEPARATOR = "\n\n"


@dataclass(frozen=True)
class PromptRow:
    """One text of an example. tokens: BOS first unless cropped. start: where the answer starts; it extends to the end.

    cropped: how many tokens were removed from the beginning.
    """

    tokens: tuple[int, ...]
    start: int
    cropped: int = 0


@dataclass(frozen=True)
class Question:
    """An example as rows, one per choice. gold: index of the correct row; None: one row, to be predicted exactly.

    ambiguous: whether two choices are equal, or one is empty or the beginning of another.
    """

    rows: tuple[PromptRow, ...]
    gold: int | None
    ambiguous: bool = False


@dataclass(frozen=True)
class RowLimit:
    """How long a row may be. tokens: at most so many. crop: longer rows lose their beginning; else they do not fit.

    leave_out: whether questions that do not fit are left out; else they are refused.
    """

    tokens: int
    crop: bool = False
    leave_out: bool = False


def row_limit(dims: Dimensions, config: EvaluateConfig) -> RowLimit:
    """Returns the configured limit: nanochat's, which is ten times sequence_len, or sequence_len with cropping."""
    tokens = dims.sequence_len if config.core_crop else dims.longest_row
    return RowLimit(tokens, config.core_crop, config.core_unfit == "leave_out")


def shuffle_examples(task: CoreTask, max_per_task: int) -> list[dict]:
    """Returns the first `max_per_task` of the task's examples in the metric's order; -1 for all."""
    examples = list(task.examples)
    random.Random(SHUFFLE_SEED).shuffle(examples)
    return examples[:max_per_task] if max_per_task > 0 else examples


def build_questions(
    task: CoreTask,
    tokenizer: Tokenizer,
    limit: RowLimit,
    max_per_task: int,
    change: Callable[[CoreTask, Sequence[dict]], Sequence[dict]] | None = None,
) -> list[Question | None]:
    """Builds a task's questions, None for those that are left out.

    change: returns other examples to ask in place of the given ones; the shots stay. Raises UserError if a question
    does not fit and is not left out, or if there are too few examples for the shots.
    """
    examples, shots, names = zip(*_examples_with_shots(task, max_per_task), strict=True)
    changed = examples if change is None else change(task, examples)
    questions = [
        _build_question(task, example, some, tokenizer, limit, name)
        for example, some, name in zip(changed, shots, names, strict=True)
    ]
    if change is not None:  # none may be left
        return questions
    _check_some_fit(task, questions.count(None), len(questions))
    return questions


def check_questions(bundle: Bundle, tokenizer: Tokenizer, limit: RowLimit, max_per_task: int) -> dict[str, int]:
    """Returns task -> number of questions that will be left out, of tasks with any; takes seconds for all of CORE.

    Raises UserError if one does not fit and is not left out.
    """
    counts = {}
    for task in bundle.tasks:
        left_out = examples = 0
        for example, shots, name in _examples_with_shots(task, max_per_task):
            # cropping may remove the shots, so only the rest must fit
            texts, examples = build_texts(task, example, [] if limit.crop else shots), examples + 1
            # a token has at least one byte, so most questions need not be tokenized
            fits = max(len((SHOT_SEPARATOR + text).encode()) for text in texts) < limit.tokens
            if not fits or (task.kind == "language_modeling" and len(texts[1]) <= len(texts[0])):
                left_out += _build_question(task, example, shots, tokenizer, limit, name) is None
        _check_some_fit(task, left_out, examples)
        counts[task.label] = left_out
    return {label: count for label, count in counts.items() if count}


def _check_some_fit(task: CoreTask, left_out: int, examples: int) -> None:
    if left_out == examples:
        raise UserError(f"no example of {task.label} fits the model: leave it out, with evaluate.core_tasks or --tasks")


def _examples_with_shots(task: CoreTask, max_per_task: int) -> Iterator[tuple[dict, list[dict], str]]:
    """Yields each example, its shots and its name for messages."""
    examples = shuffle_examples(task, max_per_task)
    if len(examples) <= task.shots:
        raise UserError(
            f"{task.label} needs {task.shots} shots, but has only {len(examples)} examples: use more examples"
        )
    for number, example in enumerate(examples):
        others = [index for index in range(len(examples)) if index != number]
        shots = [examples[index] for index in random.Random(SHOTS_SEED + number).sample(others, task.shots)]
        yield example, shots, f"example {number + 1} of {task.label}"


def _build_question(
    task: CoreTask, example: dict, shots: Sequence[dict], tokenizer: Tokenizer, limit: RowLimit, name: str
) -> Question | None:
    rows, gold = _build_rows(task, example, shots, tokenizer), example.get("gold")
    for row in rows:
        if problem := _find_problem(row, limit, exact=gold is None):
            if limit.leave_out:
                return None
            raise UserError(f"{name} {problem}: set evaluate.core_unfit=leave_out, or leave the task out")
    ambiguous = task.kind == "multiple_choice" and not all(choice.strip() for choice in example["choices"])
    ambiguous |= len(set(rows)) < len(rows) or any(row.start == len(row.tokens) for row in rows)
    return Question(tuple(_crop(row, limit) for row in rows), gold, ambiguous)


def build_texts(task: CoreTask, example: dict, shots: Sequence[dict]) -> list[str]:
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


def _build_rows(task: CoreTask, example: dict, shots: Sequence[dict], tokenizer: Tokenizer) -> list[PromptRow]:
    encoded = [tuple(tokenizer.encode(text, bos=True).tolist()) for text in build_texts(task, example, shots)]
    if task.kind == "multiple_choice":  # the answer is where the texts differ
        start = common_prefix(encoded)
        return [PromptRow(tokens, start) for tokens in encoded]
    if task.kind == "schema":  # the answer is the common ending
        answer = common_prefix([tokens[::-1] for tokens in encoded])
        if answer == len(encoded[0]):  # all choices are equal: to nanochat, none has an answer
            answer = 0
        return [PromptRow(tokens, len(tokens) - answer) for tokens in encoded]
    return [PromptRow(encoded[1], common_prefix(encoded))]


def _find_problem(row: PromptRow, limit: RowLimit, *, exact: bool) -> str | None:
    """Returns why a row does not fit the model, or None if it does."""
    length, answer = len(row.tokens), len(row.tokens) - row.start
    if not limit.crop and length > limit.tokens:
        return f"has {length:,} tokens, but the model takes at most {limit.tokens:,}"
    if row.start - max(0, length - limit.tokens) < 1:
        return (
            f"has an answer of {answer:,} tokens, but the model takes {limit.tokens:,}, including at least one before "
            "the answer"
        )
    return "has an answer without any tokens" if exact and not answer else None


def _crop(row: PromptRow, limit: RowLimit) -> PromptRow:
    excess = max(0, len(row.tokens) - limit.tokens)
    return PromptRow(row.tokens[excess:], row.start - excess, excess)
