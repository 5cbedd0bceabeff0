"""What counterfactual controls exchange between examples, and how they are scored."""

import pytest

from megachat.commands import main as cli
from megachat.errors import UserError
from megachat.evals.controls import control_section, swap_examples, swapped_part
from megachat.evals.core_bundle import CoreTask
from megachat.evals.results import Answers


def task(kind: str, *examples: dict, baseline: float = 0.0) -> CoreTask:
    return CoreTask("some", kind, 0, " ", baseline, examples)


def test_each_kind_takes_its_part_from_the_next_example():
    choices = {"choices": ["a", "b"], "gold": 1}
    stems = task("multiple_choice", *({"query": f"Question: {n}?\nAnswer:"} | choices for n in "123"))
    assert swapped_part(stems) == "stem"
    swapped = swap_examples(stems, stems.examples)
    assert [example["query"][10] for example in swapped] == ["2", "3", "1"]
    assert all(example["choices"] == ["a", "b"] and example["gold"] == 1 for example in swapped)
    schema = task("schema", *({"context_options": ["x", "y"], "continuation": n, "gold": 0} for n in "12"))
    assert (swapped_part(schema), swap_examples(schema, schema.examples)[0]["continuation"]) == ("continuation", "2")
    text = task("language_modeling", *({"context": f"a {n}", "continuation": n} for n in "12"))
    assert (swapped_part(text), swap_examples(text, text.examples)[1]) == (
        "context",
        {"context": "a 1", "continuation": "2"},
    )


def test_a_passage_is_exchanged_and_its_question_stays():
    passages = ("one\nQuestion: old?\nMore.", "one\nQuestion: old?\nMore.", "two", "three")
    reading = task(
        "language_modeling",
        *({"context": f"{text}\nQuestion: {n}?\nAnswer:", "continuation": str(n)} for n, text in enumerate(passages)),
    )
    assert swapped_part(reading) == "passage"
    swapped = [example["context"] for example in swap_examples(reading, reading.examples)]
    assert [text.rpartition("\nQuestion: ")[0] for text in swapped] == ["two", "two", "three", passages[0]]
    assert [text.rpartition("\nQuestion: ")[2][0] for text in swapped] == ["0", "1", "2", "3"]
    alike = task("language_modeling", *({"context": "same", "continuation": n} for n in "12"))
    assert swap_examples(alike, alike.examples) == list(alike.examples), "nothing else is there"


def test_only_examples_that_both_have_are_compared():
    some = task("schema", *({},) * 5, baseline=0.5)
    plain = {"some": Answers((True, True, True, False), left_out=(1,))}  # of examples 0, 2, 3, 4
    swapped = {"some": Answers((False, True, False, False), left_out=(2,))}  # of examples 0, 1, 3, 4
    section = control_section((some,), plain, swapped)
    of_task = section["tasks"]["some"]
    assert (of_task["right"], of_task["examples"]) == ("000", 3)
    assert section["difference"] == pytest.approx(2 / 3 / 0.5) == of_task["difference"] and section["deviation"] > 0
    assert control_section((some,), plain, {"some": Answers((), left_out=tuple(range(5)))}) == {"tasks": {}}


def test_controls_need_core(tmp_path):
    with pytest.raises(UserError, match="give --core"):
        cli._run(["evaluate", "--checkpoint", str(tmp_path), "--controls", "--bpb"])
