"""A place that the system refuses to read is named with the system's answer; nothing is said to be wrong with it."""

import builtins
import errno
import io
import multiprocessing
import os
import re
from functools import partial
from pathlib import Path

import pytest

from megachat.checkpoint.facts import read_facts
from megachat.checkpoint.resume import choose_checkpoint, find_checkpoint
from megachat.config import load_config
from megachat.convert.formats import open_checkpoint
from megachat.data.loader_state import load_header
from megachat.data.shards import load_manifest, open_shards
from megachat.data.texts import read_batches
from megachat.data.tokenizer import load_tokenizer
from megachat.errors import UnreadableError, UserError, user_errors_end_the_program
from megachat.evals.comparison import load_side
from megachat.evals.core_bundle import open_bundle
from megachat.evals.results import load_results
from megachat.job.hosts import parse_hostfile
from megachat.prepare.sources import find_input_files
from megachat.programs.generate import read_prompts
from tests.training import load_model_weights
from tests.unit.checkpoint.test_checkpoint import ALONE, save

READERS = {
    "config": load_config,
    "run": lambda path: find_checkpoint(path, "auto"),
    "checkpoint": lambda path: find_checkpoint(Path("runs"), str(path)),
    "facts": read_facts,
    "weights": load_model_weights,
    "any checkpoint": open_checkpoint,
    "loader": load_header,
    "data": open_shards,
    "manifest": load_manifest,
    "texts": lambda path: next(read_batches(path, 1)),
    "tokenizer": load_tokenizer,
    "bundle": open_bundle,
    "evaluation": load_results,
    "evaluations": lambda path: load_side([path]),
    "hostfile": parse_hostfile,
    "prompts": lambda path: read_prompts(str(path)),
    "input": lambda path: find_input_files([path], (".txt",)),
}
MISLEADING = re.compile("train it again|another step|--overwrite|get the bundle|download|create it|does not exist|copy")


def check(read, path: Path, answer: str, kind: type[UserError] = UnreadableError) -> None:
    with pytest.raises(kind) as refused:
        read(path)
    text = str(refused.value)
    assert str(path) in text and f"({answer})" in text and "\n" not in text, text
    assert not MISLEADING.search(text.replace(str(path), "")), text


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_a_path_that_cannot_exist_is_named(read, tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").write_text("")
    check(read, tmp_path / ("n" * 256), "File name too long")
    check(read, tmp_path / "loop", "Too many levels of symbolic links")
    check(read, tmp_path / "file" / "below", "Not a directory")


def refused_to_nobody(read, path: Path, answers) -> None:
    os.seteuid(65534)
    try:
        read(path)
        answers.send("no error")
    except BaseException as error:
        answers.send(f"{type(error).__name__}: {error}")


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs root")
@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_a_folder_that_the_user_may_not_enter_is_named(read, tmp_path):
    (tmp_path / "closed").mkdir(mode=0o700)
    path = tmp_path / "closed" / "place"
    path.mkdir()
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=refused_to_nobody, args=(read, path, sender))
    process.start()
    text = receiver.recv()
    process.join()
    assert text.startswith("UnreadableError: ") and str(path) in text and "(Permission denied)" in text, text
    assert not MISLEADING.search(text.replace(str(path), "")), text


@pytest.fixture
def fail_at(monkeypatch):
    """Makes the system refuse a path and all below it."""

    def fail(path: Path, number: int) -> None:
        for module, name in ((os, "stat"), (os, "listdir"), (io, "open"), (builtins, "open")):
            real = getattr(module, name)

            def refusing(place, *args, real=real, **how):
                text = os.fspath(place) if isinstance(place, str | os.PathLike) else ""
                if text == str(path) or text.startswith(f"{path}/"):
                    raise OSError(number, os.strerror(number), text)
                return real(place, *args, **how)

            monkeypatch.setattr(module, name, refusing)

    return fail


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
@pytest.mark.parametrize("read", [read for name, read in READERS.items() if name != "texts"])  # opened in C++
def test_a_storage_that_fails_is_named(read, number, tmp_path, fail_at):
    (tmp_path / "place").mkdir()
    fail_at(tmp_path / "place", number)
    check(read, tmp_path / "place", os.strerror(number))


@pytest.mark.parametrize("part", ["", "checkpoint.json", "__0_0.distcp", "tensors.json"])
def test_auto_does_not_pass_over_a_checkpoint_that_cannot_be_read_now(part, tmp_path, fail_at):
    tmp_path = tmp_path / "run"
    tmp_path.mkdir()
    for step in (2, 4):
        save(tmp_path / "checkpoints", step)
    newest = tmp_path / "checkpoints" / "step_000004"
    fail_at(newest / part if part else newest, errno.EIO)
    for resume in ("auto", str(newest)):
        choose = partial(choose_checkpoint, resume=resume, world=ALONE)
        check(lambda _, choose=choose: choose(tmp_path), newest / part, "Input/output error", UserError)


def test_auto_takes_the_newest_although_an_older_one_cannot_be_read(tmp_path, fail_at):
    for step in (2, 4):
        save(tmp_path / "checkpoints", step)
    fail_at(tmp_path / "checkpoints" / "step_000002", errno.EIO)
    assert choose_checkpoint(tmp_path, "auto", ALONE) == (tmp_path / "checkpoints" / "step_000004", [])


def test_auto_does_not_pass_over_a_link_to_a_storage_that_is_not_there(tmp_path):
    save(tmp_path / "checkpoints", 2)
    link = tmp_path / "checkpoints" / "step_000004"
    link.symlink_to(tmp_path / "store" / "step_000004")
    with pytest.raises(UnreadableError, match="step_000004 is a link to .*/store/step_000004, which is not there"):
        find_checkpoint(tmp_path, "auto")


def test_whatever_else_a_program_may_not_open_is_named(tmp_path, capsys):
    @user_errors_end_the_program
    def main():
        (tmp_path / ("n" * 256)).exists()

    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert re.fullmatch(r"error: \S+/n{256} cannot be read \(File name too long\): use .+\n", capsys.readouterr().err)
