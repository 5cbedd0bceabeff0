"""Evaluation files, and tools/compare_runs.py on them."""

import hashlib
import json
import re
import subprocess
import sys
from functools import partial

import numpy as np
import pytest

from megachat.data.tokenizer import Tokenizer
from megachat.errors import UserError
from megachat.evals.core_bundle import CORE_TASKS, Bundle, CoreTask, open_bundle
from megachat.evals.core_prompts import RowLimit, build_questions
from megachat.evals.results import (
    HARNESS_VERSION,
    Answers,
    core_lines,
    core_section,
    core_table,
    evaluation_stamp,
    find_newest_results,
    load_results,
    newest_results,
    results_path,
    save_results,
)
from megachat.evals.uncertainty import SIGMAS
from megachat.installation import version_text
from tests.refusals import refused_by
from tests.unit.evals.bundle import write_bundle
from tools.compare_runs import main

EXAMPLES = 200
refused = partial(refused_by, main)


def bundle(labels=CORE_TASKS, digest: str = "0") -> Bundle:
    tasks = tuple(CoreTask(label, "schema", 0, " ", 0.5, ({},) * EXAMPLES, f"{label}{digest}") for label in labels)
    return Bundle(tasks, tuple(label for label in CORE_TASKS if label not in labels), digest)


def evaluated(
    path,
    chance: float,
    seed: int,
    labels=CORE_TASKS,
    digest: str = "0",
    step: int = 7,
    examples: int = EXAMPLES,
    crop=False,
    **stamp,
):
    """Writes the file of a model that is right with that probability; equal seeds make the same examples hard."""
    hard = np.random.default_rng(seed).random((len(labels), examples))
    right = {label: Answers(tuple(map(bool, row < chance))) for label, row in zip(labels, hard, strict=True)}
    section = core_section(bundle(labels, digest), right, examples if examples < EXAMPLES else -1, crop=crop, **stamp)
    save_results(path, {"run": "x", "step": step, "core": section})
    return path


def compared(capsys, *arguments) -> dict:
    main([str(argument) for argument in (*arguments, "--json")])
    return json.loads(capsys.readouterr().out)


def test_a_file_has_the_metric_its_error_and_the_verdict(tmp_path):
    section = load_results(evaluated(tmp_path / "a.json", 0.7, 1))["core"]
    assert section["core_metric"] == pytest.approx(0.4, abs=0.05) and section["verdict"]["word"] == "above"
    assert section["mean_centered"] == pytest.approx(section["core_metric"], abs=1e-12)
    assert section["deviation"]["both"] == pytest.approx(np.hypot(0.0052, 2 * np.sqrt(0.21 / EXAMPLES / 22)), rel=0.05)
    assert section["tasks"]["copa"]["examples"] == EXAMPLES == len(section["tasks"]["copa"]["right"])
    lines = core_table(section)
    assert (
        len(lines) == 1 + 22 + 2
        and lines[0].split()[:2] == ["task", "examples"]
        and lines[-1] == "against GPT-2's: above"
    )
    few = load_results(evaluated(tmp_path / "few.json", 0.7, 1, examples=50))["core"]
    assert section["whole"] and not few["whole"] and "not the full metric" in core_lines(few)[-1]
    part = load_results(evaluated(tmp_path / "b.json", 0.7, 1, labels=("copa", "other task")))["core"]
    assert part["core_metric"] is None and part["verdict"] is None and "21 of its 22 tasks" in core_lines(part)[0]
    more = load_results(evaluated(tmp_path / "c.json", 0.7, 1, labels=(*CORE_TASKS, "other task")))["core"]
    assert (
        more["mean_centered"] == pytest.approx(more["core_metric"], abs=1e-12) and len(more["tasks"]) == 23
    )  # the 23rd is not part of CORE


def test_sections_of_one_checkpoint_are_kept_and_those_of_another_are_not(tmp_path):
    path = tmp_path / "evaluations" / "a.json"
    save_results(path, {"step": 1, "checkpoint_sha256": "one", "core": {"tasks": {}}})
    save_results(path, {"step": 1, "checkpoint_sha256": "one", "bpb": {"bpb": 1.0}})
    assert {"core", "bpb"} < load_results(path).keys()
    save_results(path, {"step": 1, "checkpoint_sha256": "two", "bpb": {"bpb": 2.0}})
    assert "core" not in load_results(path) and load_results(path)["bpb"]["bpb"] == 2.0
    path.write_text("{")
    save_results(path, {"step": 1, "checkpoint_sha256": "two"})
    assert load_results(path)["step"] == 1


def test_the_last_evaluation_of_a_run_counts(tmp_path):
    evaluated(results_path(tmp_path, 10), 0.6, 1, step=10)
    expected = evaluated(results_path(tmp_path, 20), 0.6, 1, step=20)
    evaluated(results_path(tmp_path, 20, in_training=True), 0.6, 1, step=20, examples=50)
    save_results(results_path(tmp_path, 30), {"step": 30, "bpb": {"bpb": 1.0}})
    assert newest_results(tmp_path) == expected
    with pytest.raises(UserError, match="none.*megachat evaluate --checkpoint .*none --core"):
        newest_results(tmp_path / "none")
    part = evaluated(results_path(tmp_path, 25), 0.6, 1, labels=CORE_TASKS[:2], step=25)
    assert newest_results(tmp_path) == part and find_newest_results(tmp_path, whole_core=True) == expected
    results_path(tmp_path, 10).write_text("{")
    assert newest_results(tmp_path) == part, "an older file that is damaged changes nothing"
    results_path(tmp_path, 30).write_text("{")
    with pytest.raises(UserError, match="step_000030.json is not a valid evaluation"):
        newest_results(tmp_path)


def test_real_differences_are_detected(tmp_path, capsys):
    a = evaluated(tmp_path / "a.json", 0.62, 1)
    b = evaluated(tmp_path / "b.json", 0.60, 1)
    result = compared(capsys, a, b)
    assert (
        result["is_core"]
        and result["same_examples"]
        and result["verdict"] == "the first is better"
        and result["tasks"]["copa"]["paired"]
    )
    assert result["deviation"]["runs"] == pytest.approx(0.0052 * 2**0.5)
    reverse = compared(capsys, b, a)
    assert reverse["verdict"] == "the second is better"
    assert reverse["difference"] == pytest.approx(-result["difference"])
    weights = compared(capsys, a, b, "--same-weights")
    assert weights["deviation"]["runs"] == 0 and weights["deviation"]["both"] < result["deviation"]["both"] / 2
    close = evaluated(tmp_path / "close.json", 0.606, 1)
    assert compared(capsys, close, b)["verdict"] == "cannot tell"
    assert compared(capsys, close, b, "--same-weights")["verdict"] == "the first is better"
    other = evaluated(tmp_path / "other.json", 0.60, 2, digest="1")
    unpaired = compared(capsys, a, other, "--same-weights")
    assert not unpaired["same_examples"] and unpaired["deviation"]["both"] > 3 * weights["deviation"]["both"]
    assert compared(capsys, a, a)["difference"] == 0


def test_several_runs_on_each_side(tmp_path, capsys):
    first = [evaluated(tmp_path / f"a{seed}.json", 0.62, seed) for seed in range(3)]
    second = [evaluated(tmp_path / f"b{seed}.json", 0.60, 10 + seed) for seed in range(2)]
    result = compared(capsys, *first, "--against", *second)
    assert result["deviation"]["runs"] == pytest.approx(0.0052 * (1 / 3 + 1 / 2) ** 0.5) and len(result["runs"][0]) == 3
    assert result["tasks"]["copa"]["means"][0] == pytest.approx(0.62, abs=0.08)


def test_runs_of_a_recipe_against_gpt2(tmp_path, capsys):
    runs = [evaluated(tmp_path / f"a{seed}.json", 0.65, seed) for seed in range(3)]
    result = compared(capsys, *runs, "--against", "gpt2")
    assert result["core_metric"] == pytest.approx(0.3, abs=0.03) and result["deviation"]["runs"] == pytest.approx(
        0.0052 / 3**0.5
    )
    assert result["verdict"]["word"] == "above" and result["whole"]
    main([str(evaluated(tmp_path / "near.json", 0.635, 1)), "--against", "gpt2"])
    assert "against GPT-2's 0.256525: cannot tell: " in capsys.readouterr().out
    part = evaluated(tmp_path / "part.json", 0.65, 1, labels=("copa",))
    assert re.search("part.json.*22 tasks", refused(capsys, part, "--against", "gpt2"))


def test_tasks_that_not_all_have_are_left_out_and_named(tmp_path, capsys):
    a = evaluated(tmp_path / "a.json", 0.62, 1, labels=("copa", "piqa"))
    b = evaluated(tmp_path / "b.json", 0.60, 1, labels=("copa", "boolq"))
    result = compared(capsys, a, b)
    assert list(result["tasks"]) == ["copa"] and result["left_out"] == ["boolq", "piqa"] and not result["is_core"]


def test_modes_of_long_prompts_are_shown_and_not_mixed(tmp_path, capsys):
    long = evaluated(tmp_path / "long.json", 0.62, 1)
    cropped = evaluated(tmp_path / "cropped.json", 0.60, 1, crop=True)
    older = evaluated(tmp_path / "older.json", 0.60, 2, crop=True)
    content = json.loads(older.read_text())
    del content["core"]["crop"]  # of a version that always cropped
    older.write_text(json.dumps(content))
    for pair in ((long, cropped), (long, older), (cropped, long)):
        message = refused(capsys, *pair)
        assert str(pair[0]) in message and str(pair[1]) in message and "core_crop" in message
        assert "core_crop" in refused(capsys, *pair, "--against", "gpt2")
        assert "core_crop" in refused(capsys, *pair, "--against", long)
    assert compared(capsys, cropped, older)["crop"] == [True, True]
    assert compared(capsys, long, older, "--same-weights")["crop"] == [False, True]
    main([str(long), str(cropped), "--same-weights"])
    assert "cropped to the model's sequence_len in the second evaluation only" in capsys.readouterr().out
    for arguments in ((cropped, older), (cropped, "--against", "gpt2")):
        main(list(map(str, arguments)))
        assert "prompts are cropped to the model's sequence_len" in capsys.readouterr().out
    main([str(long), "--against", "gpt2"])
    assert "cropped" not in capsys.readouterr().out


def test_what_a_value_depends_on_besides_the_weights_is_compared(tmp_path, capsys):
    stamp = evaluation_stamp("a" * 64)
    assert stamp["harness"] == HARNESS_VERSION and stamp["megachat"].startswith(version_text()[:12])
    one, same = (evaluated(tmp_path / f"{name}.json", 0.62, 1, **stamp) for name in ("one", "same"))
    assert compared(capsys, one, same)["warnings"] == []
    older = evaluated(tmp_path / "older.json", 0.62, 1)
    assert compared(capsys, older, older)["warnings"] == [], "nothing is known to differ"
    for key, value in {"tokenizer": "b" * 64, "harness": 99, "megachat": "megachat 0.1"}.items():
        other = evaluated(tmp_path / "other.json", 0.62, 1, **stamp | {key: value})
        (warning,) = compared(capsys, one, other)["warnings"]
        assert warning.startswith(f"{key} of CORE: {one} has ") and f"{other} has {str(value)[:12]}" in warning
        assert compared(capsys, one, other, "--against", "gpt2")["warnings"] == [warning]
    main([str(one), str(evaluated(tmp_path / "tasks.json", 0.62, 1, digest="1", **stamp))])
    assert f"warning: bundle digest of CORE: {one} has 0, " in capsys.readouterr().out
    warnings = compared(capsys, one, older)["warnings"]
    assert len(warnings) == 3 and all("none recorded" in warning for warning in warnings)
    document = json.loads(older.read_text()) | {"tokenizer": "a" * 64}  # where older evaluations have it
    older.write_text(json.dumps(document))
    assert len(compared(capsys, one, older)["warnings"]) == 2


def test_the_harness_has_the_version_of_its_prompts(tmp_path):
    """If this fails, prompts have changed, so answers may, too: raise HARNESS_VERSION."""
    letters = Tokenizer({bytes([byte]): byte for byte in range(256)})
    tasks = open_bundle(write_bundle(tmp_path)).tasks
    built = [
        build_questions(task, letters, limit, 5) for task in tasks for limit in (RowLimit(600), RowLimit(50, True))
    ]
    rows = [[question.gold, *((row.tokens, row.start) for row in question.rows)] for some in built for question in some]
    digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:12]
    assert (HARNESS_VERSION, digest) == (1, "65119e488cca")


def test_questions_that_are_left_out_or_odd_are_shown(tmp_path, capsys):
    right = {label: Answers((True, False) * 100) for label in CORE_TASKS}
    right["copa"] = Answers((True,) * 197, left_out=(3, 5, 9), ambiguous=2)
    section = core_section(bundle(), right, -1, crop=True)
    lines = core_lines(section)
    assert lines[0] == "prompts are cropped to the model's sequence_len, which nanochat does not do"
    assert lines[1].startswith("3 questions do not fit the model and are left out: ") and "(copa 3)" in lines[1]
    assert lines[2] == "2 questions have equal or empty choices; they are scored as in nanochat (copa 2)"
    assert not section["whole"]
    for number, answers in enumerate((right, {**right, "copa": Answers((True,) * 197, left_out=(3, 5, 8))})):
        section = core_section(bundle(), answers, -1, crop=False)
        save_results(tmp_path / f"{number}.json", {"step": 1, "core": section})
    assert not compared(capsys, tmp_path / "0.json", tmp_path / "1.json")["tasks"]["copa"]["paired"]


def test_bad_input(tmp_path, capsys):
    a = evaluated(tmp_path / "a.json", 0.62, 1)
    assert "1 runs" in refused(capsys, a) and "3 runs" in refused(capsys, a, a, a)
    assert "none does not exist" in refused(capsys, a, tmp_path / "none")
    assert f"--checkpoint {tmp_path} --core" in refused(capsys, a, tmp_path)
    (tmp_path / "text").write_text("[]")
    assert re.search("text is not a valid evaluation", refused(capsys, a, tmp_path / "text"))
    b = evaluated(tmp_path / "b.json", 0.6, 1, labels=("other task",))
    assert "no task in common" in refused(capsys, a, b)
    save_results(tmp_path / "c.json", {"step": 1, "bpb": {"bpb": 1.0}})
    assert "c.json has no CORE" in refused(capsys, a, tmp_path / "c.json")
    few = evaluated(tmp_path / "few.json", 0.6, 1, examples=50)
    message = refused(capsys, a, few, "--against", a)
    assert all(fact in message for fact in (str(few), str(a), "hellaswag_zeroshot", "--max-per-task"))
    assert f"{a} is given twice" in refused(capsys, a, a, "--against", few)
    result = json.loads(a.read_text())
    result["core"]["tasks"]["copa"]["right"] = "2" * EXAMPLES
    (tmp_path / "spoiled.json").write_text(json.dumps(result))
    assert "answers of copa" in refused(capsys, a, tmp_path / "spoiled.json")
    spoiled = tmp_path / "run" / "evaluations" / "spoiled.json"
    spoiled.parent.mkdir(parents=True)
    whole = json.loads(a.read_text())
    for change in ({"step": None}, {"core": whole["core"] | {"crop": "no"}}, {"core": whole["core"] | {"whole": 1}}):
        spoiled.write_text(json.dumps(whole | change))
        assert "spoiled.json is not a valid evaluation" in refused(capsys, a, tmp_path / "run")
    spoiled.write_text("[" * 200_000)
    assert "spoiled.json is not a valid evaluation" in refused(capsys, a, tmp_path / "run")


def test_as_a_process(tmp_path):
    a, b = evaluated(tmp_path / "a.json", 0.65, 1), evaluated(tmp_path / "b.json", 0.60, 1)
    done = subprocess.run([sys.executable, "tools/compare_runs.py", a, b], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    lines = done.stdout.splitlines()
    assert (
        lines[0].split()[:3] == ["task", "first", "second"]
        and len(lines) == 1 + 22 + 2
        and lines[-2].startswith("CORE: +0.")
    )
    assert re.match("the first is better .*95%", lines[-1]) and SIGMAS > 1.9
