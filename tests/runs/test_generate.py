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


def said(capsys, *arguments) -> tuple[str, str]:
    main([*map(str, arguments), *EXACT])
    return capsys.readouterr()


def lines(capsys, *arguments) -> list[dict]:
    return [json.loads(line) for line in said(capsys, *arguments, "--json")[0].splitlines()]


def test_a_process_continues_prompts_from_standard_input_as_the_run_did(one):
    """The run's own sample is greedy, through the engine."""
    sample = json.loads((one / "samples" / "step_000006.json").read_text())["the old"]
    line = [sys.executable, "tools/generate.py", "--checkpoint", one, "--temperature", 0, "--tokens", 4, *EXACT]
    done = subprocess.run(
        [*map(str, line)], cwd=ROOT, env=environment(), input=b"the old\nthe\n", capture_output=True, timeout=limit_s()
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.decode().startswith(f"{sample}\n\nthe") and done.stdout.endswith(b"\n")


def test_on_a_terminal_prompts_are_asked_for_and_a_bad_one_is_asked_for_again(made):
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
    assert err.decode() == "error: prompt 2 has 401 tokens and the model can take 160: shorten it\n"
    first, empty, bad, second, end = out.decode().split("> ")[1:]
    assert first.startswith("abab") and second.startswith("abab") and first != second, (
        "the same prompt was not continued in another way"
    )
    assert (empty, bad, end) == ("", "", "\n")


def test_a_batch_is_what_each_prompt_gives_alone_in_any_order_of_batches(made, capsys, tmp_path):
    (tmp_path / "prompts").write_text("abcdefgh\nzz\n\nab\nab\n")
    asked = ["--checkpoint", made, "--prompts", tmp_path / "prompts", "--tokens", 8, "--seed", 5]
    found = lines(capsys, *asked)
    assert [line["prompt"] for line in found] == ["abcdefgh", "zz", "", "ab", "ab"]
    assert (
        all(len(line["tokens"]) == 8 or line["why"] == "stop" for line in found)
        and found[3]["text"] != found[4]["text"]
    )
    assert lines(capsys, *asked, "--batch", 2) == found, "a row depends on the batch"
    assert lines(capsys, "--checkpoint", step_folder(made), *asked[2:]) == found
    assert lines(capsys, *asked[:-1], 6) != found
    told, _ = said(capsys, *asked)
    assert told == "\n".join(f"{line['prompt']}{line['text']}\n" for line in found), (
        "what is shown on the way is not the text"
    )
    most_likely = [lines(capsys, *asked[:-2], "--temperature", 0, *more) for more in ([], ["--seed", 9])]
    assert most_likely[0] == most_likely[1]


def test_it_ends_where_it_is_told_to(made, capsys):
    asked = ["--checkpoint", made, "--prompt", "abcdefgh", "--tokens", 40, "--temperature", 1.5]
    (whole,) = lines(capsys, *asked)
    stop = whole["text"][8:10]
    (found,) = lines(capsys, *asked, "--stop", stop, "--stop", "no such text")
    assert (
        found["why"] == "stop"
        and found["text"] == whole["text"][: whole["text"].index(stop)]
        and len(found["tokens"]) < len(whole["tokens"])
    )
    told, err = said(capsys, "--checkpoint", made, "--prompt", "ab" * 75, "--tokens", 200, "--seed", 3)
    assert err.startswith("remark: prompt 1 and its continuation fill the model's 160 tokens") and err.count("\n") == 1
    assert len(lines(capsys, "--checkpoint", made, "--prompt", "ab" * 300, "--slide", "--tokens", 3)[0]["tokens"]) == 3


def test_checkpoints_of_early_formats_continue_with_a_tokenizer_given(capsys):
    found = [
        lines(
            capsys, "--checkpoint", FIXTURES / f / "step_000003", "--tokenizer", FIXTURES / "tokenizer", "--prompt", "x"
        )
        for f in ("format_1", "format_2")
    ]
    assert found[0] == found[1] and found[0][0]["tokens"]


def test_a_checkpoint_without_its_tokenizer_is_refused(tmp_path, capsys):
    run = make_run(tmp_path / "run")
    shutil.rmtree(run / "tokenizer")
    assert "the tokenizer of" in refused(capsys, "--checkpoint", run, "--prompt", "x")
    told = refused(capsys, "--checkpoint", run, "--prompt", "x", "--tokenizer", FIXTURES / "tokenizer")
    assert "is not the checkpoint's tokenizer: its fingerprint is" in told


def refused(capsys, *arguments) -> str:
    with pytest.raises(SystemExit) as ended:
        main([*map(str, arguments)])
    out, err = capsys.readouterr()
    assert ended.value.code == 2 and out == "" and err.count("\n") == 1 and err.startswith("error: ")
    return err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--checkpoint", "nowhere"], "nowhere is not a folder: give a checkpoint's step folder"),
        (["--checkpoint", FIXTURES], "is not a complete checkpoint: it has no checkpoint.json"),
        (["--temperature", "-0.5"], "the temperature is -0.5: give 0"),
        (["--top-p", "0"], "top-p is 0.0: give a probability"),
        (["--tokens", "0"], "--tokens is 0: give 1 or more"),
        (["--batch", "0"], "--batch is 0: give 1 or more"),
        (["--stop", ""], "a stop text is empty"),
        (["--prompt", "é" * 200, "--batch", "1"], "prompt 2 has 401 tokens and the model can take 160: shorten it"),
        (["--prompts", "nowhere"], "prompts cannot be read from nowhere .*: give UTF-8 text"),
        (["--prompts", ROOT / "tests" / "fixtures" / "tokenizer"], "prompts cannot be read from .*Is a directory"),
    ],
)
def test_what_cannot_be_continued_is_told_in_one_sentence(made, capsys, arguments, told):
    err = refused(capsys, "--checkpoint", made, "--prompt", "x", *arguments)
    assert re.search(told, err), err
