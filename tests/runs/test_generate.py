"""tools/generate.py as a user runs it: a process on a run's checkpoint, batches, a terminal, and what is refused."""

import json
import os
import pty
import re
import shutil
import subprocess
import sys

import pytest

from tests.limits import limit_s
from tests.runs.job import ROOT, environment
from tests.unit.convert.checkpoints import make_run, step_folder
from tools.generate import main

FIXTURES = ROOT / "tests" / "fixtures"
EXACT = ["--dtype", "float32"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run of random weights, saved by three ranks."""
    return make_run(tmp_path_factory.mktemp("made") / "run", parts=3)


def run_main(capsys, *arguments) -> tuple[str, str]:
    main([*map(str, arguments), *EXACT])
    return capsys.readouterr()


def lines(capsys, *arguments) -> list[dict]:
    return [json.loads(line) for line in run_main(capsys, *arguments, "--json")[0].splitlines()]


def without_announcement(err: bytes) -> str:
    """What a process wrote without the line of a busy machine, on which loading takes more than a second."""
    return re.sub(r"\Aloading .* \.\.\.\n", "", err.decode())


def test_a_process_continues_standard_input_like_the_runs_samples(one):
    """The run's sample is greedy, through the engine."""
    sample = json.loads((one / "samples" / "step_000006.json").read_text())["the old"]
    line = [sys.executable, "tools/generate.py", "--checkpoint", one, "--temperature", 0, "--tokens", 4, *EXACT]
    done = subprocess.run(
        [*map(str, line)], cwd=ROOT, env=environment(), input=b"the old\nthe\n", capture_output=True, timeout=limit_s()
    )
    assert (done.returncode, without_announcement(done.stderr)) == (0, "")
    assert done.stdout.decode().startswith(f"{sample}\n\nthe") and done.stdout.endswith(b"\n")


def test_on_a_terminal_prompts_are_requested_and_a_bad_one_is_skipped(made):
    ours, theirs = pty.openpty()
    line = [sys.executable, "tools/generate.py", "--checkpoint", made, "--tokens", "3", *EXACT]
    process = subprocess.Popen(
        [*map(str, line)], cwd=ROOT, env=environment(), stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    os.close(theirs)
    os.write(ours, b"abab\n\n" + b"z " * 200 + b"\nabab\n\x04")
    out, err = process.communicate(timeout=limit_s())
    os.close(ours)
    assert process.returncode == 0, err.decode()
    assert re.fullmatch(r"error: prompt 2 has 401 tokens.* 160.*\n", without_announcement(err))
    first, empty, bad, second, end = out.decode().split("> ")[1:]
    assert first.startswith("abab") and second.startswith("abab") and first != second, (
        "the same prompt has the same continuation twice"
    )
    assert (empty, bad, end) == ("", "", "\n")


def test_continuations_do_not_depend_on_the_batch(made, capsys, tmp_path):
    (tmp_path / "prompts").write_text("abcdefgh\nzz\n\nab\nab\n")
    command = ["--checkpoint", made, "--prompts", tmp_path / "prompts", "--tokens", 8, "--seed", 5]
    results = lines(capsys, *command)
    assert [line["prompt"] for line in results] == ["abcdefgh", "zz", "", "ab", "ab"]
    assert (
        all(len(line["tokens"]) == 8 or line["why"] == "stop" for line in results)
        and results[3]["text"] != results[4]["text"]
    )
    assert lines(capsys, *command, "--batch", 2) == results, "a row must not depend on the batch"
    assert lines(capsys, "--checkpoint", step_folder(made), *command[2:]) == results
    assert lines(capsys, *command[:-1], 6) != results
    output, _ = run_main(capsys, *command)
    assert output == "\n".join(f"{line['prompt']}{line['text']}\n" for line in results), (
        "what is shown must be the text"
    )
    most_likely = [lines(capsys, *command[:-2], "--temperature", 0, *more) for more in ([], ["--seed", 9])]
    assert most_likely[0] == most_likely[1]


def test_it_ends_at_a_stop_and_at_the_models_length(made, capsys):
    command = ["--checkpoint", made, "--prompt", "abcdefgh", "--tokens", 40, "--temperature", 1.5]
    (whole,) = lines(capsys, *command)
    stop = whole["text"][8:10]
    (results,) = lines(capsys, *command, "--stop", stop, "--stop", "no such text")
    assert (
        results["why"] == "stop"
        and results["text"] == whole["text"][: whole["text"].index(stop)]
        and len(results["tokens"]) < len(whole["tokens"])
    )
    output, err = run_main(capsys, "--checkpoint", made, "--prompt", "ab" * 75, "--tokens", 200, "--seed", 3)
    assert re.fullmatch(r"remark: prompt 1 .* 160 tokens.*\n", err)
    assert len(lines(capsys, "--checkpoint", made, "--prompt", "ab" * 300, "--slide", "--tokens", 3)[0]["tokens"]) == 3


def test_checkpoints_of_early_formats_continue_with_the_given_tokenizer(capsys):
    results = [
        lines(
            capsys, "--checkpoint", FIXTURES / f / "step_000003", "--tokenizer", FIXTURES / "tokenizer", "--prompt", "x"
        )
        for f in ("format_1", "format_2")
    ]
    assert results[0] == results[1] and results[0][0]["tokens"]


def test_a_checkpoint_without_its_tokenizer_is_refused(tmp_path, capsys):
    run = make_run(tmp_path / "run")
    shutil.rmtree(run / "tokenizer")
    assert "the tokenizer of" in refused(capsys, "--checkpoint", run, "--prompt", "x")
    output = refused(capsys, "--checkpoint", run, "--prompt", "x", "--tokenizer", FIXTURES / "tokenizer")
    assert "is not the checkpoint's tokenizer: its fingerprint is" in output


def refused(capsys, *arguments) -> str:
    with pytest.raises(SystemExit) as ended:
        main([*map(str, arguments)])
    out, err = capsys.readouterr()
    assert ended.value.code == 2 and out == "" and err.count("\n") == 1 and err.startswith("error: ")
    return err


@pytest.mark.parametrize(
    ("arguments", "facts"),
    [
        (["--checkpoint", "nowhere"], "nowhere is not a folder: give a checkpoint's step folder"),
        (["--checkpoint", FIXTURES], "is not a complete checkpoint: it has no checkpoint.json"),
        (["--temperature", "-0.5"], "temperature is -0.5.*give 0"),
        (["--top-p", "0"], "top-p is 0.0.*above 0 and up to 1"),
        (["--tokens", "0"], "--tokens is 0: give 1 or more"),
        (["--batch", "0"], "--batch is 0: give 1 or more"),
        (["--stop", ""], "a stop text is empty"),
        (["--prompt", "é" * 200, "--batch", "1"], "prompt 2 has 401 tokens.* 160.*shorten it"),
        (["--prompts", "nowhere"], "prompts from nowhere .*UTF-8"),
        (["--prompts", ROOT / "tests" / "fixtures" / "tokenizer"], "prompts .*Is a directory"),
    ],
)
def test_bad_arguments_are_reported_in_one_sentence(made, capsys, arguments, facts):
    err = refused(capsys, "--checkpoint", made, "--prompt", "x", *arguments)
    assert re.search(facts, err), err
