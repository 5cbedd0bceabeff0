"""The texts of CORE's examples, the places of their answers, shots, cap and cropping. Against nanochat's own answers: tests/ranks/test_core.py."""

import random

import numpy as np
import pytest

from megachat.errors import UserError
from megachat.evals.core_bundle import Task
from megachat.evals.core_prompts import Row, build_questions, build_texts, common_prefix, shuffle_examples
from tests.unit.evals.bundle import examples


class Letters:
    """A tokenizer with a token a letter; a space goes with the letter behind it, as in real ones."""

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


def task(kind: str, shots: int = 0, count: int = 6, delimiter: str = " ", own: tuple = ()) -> Task:
    return Task("some_task", kind, shots, delimiter, 0.25, own or tuple(examples(kind, count)))


def test_the_texts_of_each_kind():
    shot, asked = {"query": "1+1", "choices": ["3", "2"], "gold": 1}, {"query": "2+2", "choices": ["5", "4"], "gold": 1}
    assert build_texts(task("multiple_choice", delimiter="\nA: "), asked, [shot]) == [
        "1+1\nA: 2\n\n2+2\nA: 5",
        "1+1\nA: 2\n\n2+2\nA: 4",
    ]
    shot = {"context_options": ["a", "b"], "continuation": "runs", "gold": 0}
    asked = {"context_options": ["c", "d"], "continuation": "sits", "gold": 0}
    assert build_texts(task("schema"), asked, [shot, shot]) == [
        "a runs\n\na runs\n\nc sits",
        "a runs\n\na runs\n\nd sits",
    ]
    shot, asked = {"context": " one \n", "continuation": "two"}, {"context": "three ", "continuation": "four"}
    assert build_texts(task("language_modeling"), asked, [shot]) == ["one two\n\nthree", "one two\n\nthree four"]
    assert build_texts(task("language_modeling"), asked, []) == ["three", "three four"]


def test_answers_begin_where_choices_differ_and_where_contexts_have_ended():
    own = ({"query": "ab", "choices": ["xyz", "xq"], "gold": 0},)
    (found,) = build_questions(task("multiple_choice", own=own), Letters(), 64, -1)
    assert [(row.start, len(row.tokens)) for row in found.rows] == [
        (4, 6),
        (4, 5),
    ] and found.gold == 0  # BOS a b " x" | y z
    own = ({"context_options": ["abc", "dc"], "continuation": "xy", "gold": 1},)
    (found,) = build_questions(task("schema", own=own), Letters(), 64, -1)
    assert [row.tokens[row.start :] for row in found.rows] == [
        (99, 1120, 121)
    ] * 2  # c too, which both contexts end with
    own = ({"context": "ab ", "continuation": "xyz"},)
    (found,) = build_questions(task("language_modeling", own=own), Letters(), 64, -1)
    assert found.rows == (Row((0, 97, 98, 1120, 121, 122), 3),) and found.gold is None


def test_shots_are_others_drawn_for_each_example_and_the_cap_comes_first():
    asked = task("language_modeling", 2, 9)
    kept = list(asked.examples)
    random.Random(1337).shuffle(kept)
    assert shuffle_examples(asked, 4) == kept[:4] and shuffle_examples(asked, -1) == kept
    found = build_questions(asked, Letters(), 4096, 4)
    for number, question in enumerate(found):
        drawn = random.Random(1234 + number).sample([index for index in range(4) if index != number], 2)
        text = build_texts(asked, kept[number], [kept[index] for index in drawn])[1]
        assert question.rows[0].tokens == tuple(Letters().encode(text, bos=True))
    with pytest.raises(UserError, match="some_task has 2 shots and 2 examples to draw them from: take more examples"):
        build_questions(asked, Letters(), 4096, 2)


def test_long_texts_lose_their_beginning():
    own = ({"query": "abcdef", "choices": ["x", "yzw"], "gold": 0},)
    (found,) = build_questions(task("multiple_choice", own=own), Letters(), 8, -1)
    assert found.rows == (
        Row((0, 97, 98, 99, 100, 101, 102, 1120), 7),
        Row((98, 99, 100, 101, 102, 1121, 122, 119), 5, 2),
    )


@pytest.mark.parametrize(
    ("kind", "example", "told"),
    [
        (
            "language_modeling",
            {"context": "a", "continuation": "bcdefghij"},
            "an answer of 9 tokens and the model takes 8, one of them in front",
        ),
        ("language_modeling", {"context": "ab", "continuation": ""}, "an answer without tokens of its own"),
        (
            "schema",
            {"context_options": ["a", "b"], "continuation": "cdefghij", "gold": 0},
            "an answer of 8 tokens and the model takes 8",
        ),
    ],
)
def test_what_cannot_be_asked_is_told(kind, example, told):
    with pytest.raises(UserError, match=f"^example 1 of some_task has {told}"):
        build_questions(
            task(kind, own=(example,), delimiter="" if example.get("continuation") == "" else " "), Letters(), 8, -1
        )


def test_the_common_prefix():
    assert (common_prefix([(1, 2, 3), (1, 2, 4)]), common_prefix([(1, 2), (1, 2, 4)]), common_prefix([(1,), (2,)])) == (
        2,
        2,
        0,
    )
