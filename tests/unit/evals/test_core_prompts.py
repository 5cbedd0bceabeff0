"""Texts of CORE's examples, where their answers start, shots, limit and cropping.

The comparison with nanochat's answers is in tests/ranks/test_core.py.
"""

import random

import numpy as np
import pytest

from megachat.errors import UserError
from megachat.evals.core_bundle import Bundle, CoreTask
from megachat.evals.core_prompts import (
    PromptRow,
    RowLimit,
    build_questions,
    build_texts,
    check_questions,
    common_prefix,
    row_limit,
    shuffle_examples,
)
from megachat.planning.plan import resolve_plan
from megachat.settings import EvaluateConfig
from tests.training import small_config
from tests.unit.evals.bundle import examples


class Letters:
    """A tokenizer with one token per letter, which includes a space before it, as in real tokenizers."""

    def encode(self, text: str, *, bos: bool = False) -> np.ndarray:
        pieces = text.replace(" ", "\x01").replace("\x01", " ")
        ids, space = [], False
        for letter in pieces:
            if letter == " " and not space:
                space = True
                continue
            ids.append(ord(letter) + 1000 * space)
            space = False
        return np.array(([0] if bos else []) + ids + ([32] if space else []))


def task(kind: str, shots: int = 0, count: int = 6, delimiter: str = " ", given: tuple = ()) -> CoreTask:
    return CoreTask("some_task", kind, shots, delimiter, 0.25, given or tuple(examples(kind, count)))


def test_the_texts_of_each_kind():
    shot, example = (
        {"query": "1+1", "choices": ["3", "2"], "gold": 1},
        {"query": "2+2", "choices": ["5", "4"], "gold": 1},
    )
    assert build_texts(task("multiple_choice", delimiter="\nA: "), example, [shot]) == [
        "1+1\nA: 2\n\n2+2\nA: 5",
        "1+1\nA: 2\n\n2+2\nA: 4",
    ]
    shot = {"context_options": ["a", "b"], "continuation": "runs", "gold": 0}
    example = {"context_options": ["c", "d"], "continuation": "sits", "gold": 0}
    assert build_texts(task("schema"), example, [shot, shot]) == [
        "a runs\n\na runs\n\nc sits",
        "a runs\n\na runs\n\nd sits",
    ]
    shot, example = {"context": " one \n", "continuation": "two"}, {"context": "three ", "continuation": "four"}
    assert build_texts(task("language_modeling"), example, [shot]) == ["one two\n\nthree", "one two\n\nthree four"]
    assert build_texts(task("language_modeling"), example, []) == ["three", "three four"]


def test_answers_begin_where_choices_differ_and_where_contexts_have_ended():
    given = ({"query": "ab", "choices": ["xyz", "xq"], "gold": 0},)
    (question,) = build_questions(task("multiple_choice", given=given), Letters(), RowLimit(64), -1)
    assert [(row.start, len(row.tokens)) for row in question.rows] == [
        (4, 6),
        (4, 5),
    ] and question.gold == 0  # BOS a b " x" | y z
    given = ({"context_options": ["abc", "dc"], "continuation": "xy", "gold": 1},)
    (question,) = build_questions(task("schema", given=given), Letters(), RowLimit(64), -1)
    assert [row.tokens[row.start :] for row in question.rows] == [
        (99, 1120, 121)
    ] * 2  # with the c that both contexts end with
    given = ({"context": "ab ", "continuation": "xyz"},)
    (question,) = build_questions(task("language_modeling", given=given), Letters(), RowLimit(64), -1)
    assert question.rows == (PromptRow((0, 97, 98, 1120, 121, 122), 3),) and question.gold is None


def test_shots_are_drawn_per_example_from_the_others_within_the_limit():
    shuffled = task("language_modeling", 2, 9)
    kept = list(shuffled.examples)
    random.Random(1337).shuffle(kept)
    assert shuffle_examples(shuffled, 4) == kept[:4] and shuffle_examples(shuffled, -1) == kept
    questions = build_questions(shuffled, Letters(), RowLimit(4096), 4)
    for number, question in enumerate(questions):
        drawn = random.Random(1234 + number).sample([index for index in range(4) if index != number], 2)
        text = build_texts(shuffled, kept[number], [kept[index] for index in drawn])[1]
        assert question.rows[0].tokens == tuple(Letters().encode(text, bos=True))
    with pytest.raises(UserError, match="some_task.* 2 shots.* 2 examples"):
        build_questions(shuffled, Letters(), RowLimit(4096), 2)


def test_long_texts_lose_their_beginning():
    given = ({"query": "abcdef", "choices": ["x", "yzw"], "gold": 0},)
    (question,) = build_questions(task("multiple_choice", given=given), Letters(), RowLimit(8, crop=True), -1)
    assert question.rows == (
        PromptRow((0, 97, 98, 99, 100, 101, 102, 1120), 7),
        PromptRow((98, 99, 100, 101, 102, 1121, 122, 119), 5, 2),
    )


@pytest.mark.parametrize(
    ("kind", "example", "facts"),
    [
        (
            "language_modeling",
            {"context": "a", "continuation": "bcdefghij"},
            "answer of 9 tokens.* takes 8",
        ),
        ("language_modeling", {"context": "ab", "continuation": ""}, "answer without any tokens.*leave the task out"),
        (
            "schema",
            {"context_options": ["a", "b"], "continuation": "cdefghij", "gold": 0},
            "answer of 8 tokens.* takes 8.*leave the task out",
        ),
    ],
)
def test_unusable_examples_are_refused(kind, example, facts):
    with pytest.raises(UserError, match=f"^example 1 of some_task .*{facts}"):
        build_questions(
            task(kind, given=(example,), delimiter="" if example.get("continuation") == "" else " "),
            Letters(),
            RowLimit(8, crop=True),
            -1,
        )


def bundle_of(*tasks: CoreTask) -> Bundle:
    return Bundle(tasks, (), "")


def test_uncropped_questions_beyond_the_limit_are_refused_or_left_out_and_counted():
    """The check before a start and the building of questions agree, at the limit to the token."""
    given = tuple({"context": "a" * length, "continuation": "b"} for length in (3, 30, 5, 4))
    some = task("language_modeling", given=given)
    longest = 32  # BOS, 30 letters and the answer
    assert check_questions(bundle_of(some), Letters(), RowLimit(longest), -1) == {}
    assert None not in build_questions(some, Letters(), RowLimit(longest), -1)
    number = [len(example["context"]) for example in shuffle_examples(some, -1)].index(30)
    message = (
        f"^example {number + 1} of some_task has 32 tokens, but the model takes at most 31: set evaluate.core_unfit"
    )
    for function in (
        lambda limit: check_questions(bundle_of(some), Letters(), limit, -1),
        lambda limit: build_questions(some, Letters(), limit, -1),
    ):
        with pytest.raises(UserError, match=message):
            function(RowLimit(longest - 1))
        with pytest.raises(UserError, match="no example of some_task fits the model"):
            function(RowLimit(3, leave_out=True))
    limit = RowLimit(longest - 1, leave_out=True)
    assert check_questions(bundle_of(some), Letters(), limit, -1) == {"some_task": 1}
    questions = build_questions(some, Letters(), limit, -1)
    assert [question is None for question in questions] == [index == number for index in range(4)]
    empty = task("language_modeling", delimiter="", given=(*given, {"context": "a", "continuation": ""}))
    assert check_questions(bundle_of(empty), Letters(), RowLimit(99, leave_out=True), -1) == {"some_task": 1}
    with pytest.raises(UserError, match="answer without any tokens: set evaluate.core_unfit=leave_out, or leave"):
        check_questions(bundle_of(empty), Letters(), RowLimit(99), -1)


def test_the_limit_is_ten_rows_or_one_when_cropped():
    dims = resolve_plan(small_config(), 1, 97).dims
    assert row_limit(dims, EvaluateConfig()) == RowLimit(1600)
    assert row_limit(dims, EvaluateConfig(core_crop=True, core_unfit="leave_out")) == RowLimit(160, True, True)


def test_the_common_prefix():
    assert (common_prefix([(1, 2, 3), (1, 2, 4)]), common_prefix([(1, 2), (1, 2, 4)]), common_prefix([(1,), (2,)])) == (
        2,
        2,
        0,
    )
