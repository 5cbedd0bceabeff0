import contextlib
import os
import runpy
import subprocess
import sys
from functools import partial
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from megachat.data.shards import MANIFEST, UNFINISHED_FILE, check_data_folder, load_manifest
from megachat.files import file_sha256
from megachat.prepare.manifest import begin_preparation
from tests.refusals import refused_by
from tests.unit.data.corpus import SHARED, random_texts, write_folder
from tests.unit.prepare.test_download import mirror  # noqa: F401
from tools.prepare_data import main

ROOT = Path(__file__).parents[3]
refused = partial(refused_by, main)


@pytest.fixture
def texts(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for index, text in enumerate(random_texts(40, 0)):
        (folder / f"{index}.txt").write_text(text)
    return folder


def run(*arguments):
    main([str(argument) for argument in arguments])


def content_of(folder):
    return {path.name: (path.stat().st_mtime_ns, file_sha256(path)) for path in folder.iterdir()}


@pytest.mark.slow
def test_python_source_in_a_separate_process(tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "tools/prepare_data.py", "--source", "python", "--out", str(out)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    first = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (
        first.returncode == 0
        and first.stderr == ""
        and "4 train shards and shard_00004.parquet for validation" in first.stdout
    ), first.stderr
    summary = check_data_folder(out, hashes=True)
    assert summary.train_documents > 1000 and summary.source == "python" and summary.validation_documents > 50
    before = content_of(out)
    second = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert second.returncode == 0 and "nothing to do" in second.stdout and content_of(out) == before
    document = pq.read_table(out / "shard_00004.parquet")["text"].to_pylist()[0]
    assert isinstance(document, str) and len(document) > 20


def test_text_with_its_manifest(tmp_path, texts, capsys):
    out = tmp_path / "out"
    run("--source", "text", "--input", texts, "--out", out, "--shards", 3, "--seed", 5)
    manifest = load_manifest(out)
    assert sorted(path.name for path in out.iterdir()) == [
        MANIFEST,
        *(f"shard_{index:05d}.parquet" for index in range(4)),
    ]
    assert (manifest["source"], manifest["seed"], manifest["documents"], len(manifest["shards"])) == ("text", 5, 40, 4)
    documents = sum((pq.read_table(out / entry["name"])["text"].to_pylist() for entry in manifest["shards"]), [])
    assert sorted(documents) == sorted(random_texts(40, 0))
    assert manifest["chars"] == sum(map(len, documents)) and manifest["bytes"] == sum(
        len(text.encode()) for text in documents
    )
    assert all(entry["sha256"] == file_sha256(out / entry["name"]) for entry in manifest["shards"])
    assert "40 documents" in capsys.readouterr().out


def test_parquet_is_cut_anew(tmp_path):
    documents = random_texts(90, 1)
    tables = write_folder(tmp_path / "tables", [documents[:50], documents[50:]])
    run(
        "--source",
        "parquet",
        "--input",
        tables / "shard_00000.parquet",
        "--input",
        tables,
        "--out",
        tmp_path / "out",
        "--shards",
        2,
    )
    written = [
        text
        for path in sorted((tmp_path / "out").glob("*.parquet"))
        for text in pq.read_table(path)["text"].to_pylist()
    ]
    assert sorted(written) == sorted(documents) and written != documents


def test_another_request_is_refused_unless_overwritten(tmp_path, texts, capsys):
    out = tmp_path / "out"
    arguments = ["--source", "text", "--input", texts, "--out", out, "--shards"]
    run(*arguments, 3)
    before = content_of(out)
    run(*arguments, 3)
    assert "nothing to do" in capsys.readouterr().out and content_of(out) == before
    assert "shards is 3 there, but 1" in refused(capsys, *arguments, 1) and content_of(out) == before
    (texts / "new.txt").write_text("more text")
    assert "input_files is 40 there, but 41" in refused(capsys, *arguments, 3)
    run(*arguments, 1, "--overwrite")
    assert check_data_folder(out, hashes=True).train_shards == 1


def test_a_folder_of_someone_else_is_refused(tmp_path, texts, capsys):
    out = write_folder(tmp_path / "out", [["mine"]])
    assert "not made by this program" in refused(capsys, "--source", "text", "--input", texts, "--out", out)
    assert pq.read_table(out / "shard_00000.parquet")["text"].to_pylist() == ["mine"]
    (tmp_path / "file").write_text("")
    assert "is a file" in refused(capsys, "--source", "text", "--input", texts, "--out", tmp_path / "file")


def test_a_folder_that_was_damaged_later_is_noticed(tmp_path, texts, capsys):
    out = tmp_path / "out"
    arguments = ["--source", "text", "--input", texts, "--out", out]
    run(*arguments)
    (out / "shard_00001.parquet").unlink()
    assert "shard_00001.parquet is missing" in refused(capsys, *arguments)
    run(*arguments, "--overwrite")
    check_data_folder(out, hashes=True)


def test_an_interrupted_preparation_is_finished_by_the_same_call(tmp_path, texts, capsys, monkeypatch):
    out = tmp_path / "out"
    arguments = ["--source", "text", "--input", texts, "--out", out]

    def interrupted(*_):
        (out / "shard_00000.parquet.part").write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("megachat.prepare.sources._write_shard", interrupted)
        with pytest.raises(SystemExit):
            run(*arguments)
    assert "interrupted" in capsys.readouterr().err
    assert (out / UNFINISHED_FILE).exists() and not (out / MANIFEST).exists()
    run(*arguments)
    assert check_data_folder(out, hashes=True).train_shards == 4 and not list(out.glob("*.part"))


def test_download_and_growing_it(tmp_path, mirror, capsys):  # noqa: F811
    out = tmp_path / "out"
    mirror.files["shard_01822.parquet"] = mirror.files["shard_00009.parquet"]
    arguments = ["--source", "fineweb-edu", "--base-url", mirror.source.base_url, "--out", out, "--shards"]
    mirror.faults["shard_00001.parquet"] = ["404"]
    assert "shard_00001.parquet answers HTTP 404" in refused(capsys, *arguments, 2, "--workers", 1)
    assert (out / UNFINISHED_FILE).exists() and (out / "shard_00000.parquet").exists()
    run(*arguments, 2)
    assert [entry["name"] for entry in load_manifest(out)["shards"]] == [
        "shard_00000.parquet",
        "shard_00001.parquet",
        "shard_01822.parquet",
    ]
    assert check_data_folder(out, hashes=True).train_documents == 8000
    run(*arguments, 2)
    assert "nothing to do" in capsys.readouterr().out
    assert "shards is 2 there, but 3" in refused(capsys, *arguments, 3)
    run(*arguments, 3, "--overwrite")
    assert check_data_folder(out, hashes=True).train_shards == 3
    assert [mirror.requests[f"shard_{index:05d}.parquet"] for index in range(3)] == [1, 2, 1]
    run(*arguments, 1, "--overwrite")
    assert check_data_folder(out, hashes=True).train_shards == 1 and not (out / "shard_00002.parquet").exists()


def test_shards_of_another_address_are_not_reused(tmp_path):
    out = write_folder(tmp_path, [["a"], ["b"]])
    one, two = ({"source": "climbmix", "base_url": f"http://{name}", "shards": 1} for name in ("one", "two"))
    begin_preparation(out, one, keep_shards=True)
    assert [path.name for path in out.iterdir()] == [UNFINISHED_FILE]
    write_folder(out, [["a"]])
    begin_preparation(out, one | {"shards": 2}, keep_shards=True)
    assert (out / "shard_00000.parquet").exists()
    begin_preparation(out, two, keep_shards=True)
    assert not (out / "shard_00000.parquet").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--source", "climbmix", "--shards", 6543], "has 6542 train shards, not 6543"),
        (["--source", "climbmix", "--shards", 0], "--shards is 0: give 1 or more"),
        (["--source", "python", "--input", "x"], "--input is for the sources text and parquet"),
        (["--source", "python", "--base-url", "http://x"], "--base-url is for downloads"),
        (["--source", "text"], "no --input was given"),
        (["--source", "text", "--input", "nowhere"], "--input nowhere does not exist"),
        (["--source", "python", "--document-bytes", 5], "--document-bytes is 5: give 64 or more"),
    ],
)
def test_requests_that_make_no_sense(tmp_path, capsys, arguments, words):
    assert words in refused(capsys, *arguments, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_input_inside_out_is_refused(tmp_path, capsys):
    folder = write_folder(tmp_path / "data", [["a"] * 10])
    assert "would be replaced" in refused(
        capsys, "--source", "parquet", "--input", folder, "--out", folder, "--overwrite"
    )
    assert (folder / "shard_00000.parquet").exists()


def test_a_refused_call_changes_nothing_and_the_corrected_one_works(tmp_path, texts, capsys):
    """A bad input is noticed before anything is written, whatever the folder holds."""
    out, bad = tmp_path / "out", tmp_path / "bad.txt"
    bad.write_bytes(b"f\xfcr")
    many = [part for index in range(40) for part in ("--input", texts / f"{index}.txt")]
    arguments = ["--source", "text", *many, "--out", out]
    message = refused(capsys, *arguments, "--input", bad)
    assert f"{bad} is not UTF-8 text (byte 0xfc at position 1)" in message and "--on-bad-text skip" in message
    assert not out.exists()
    assert "too few for 90 train shards" in refused(capsys, *arguments, "--shards", 90) and not out.exists()
    run(*arguments)
    before = content_of(out)
    for overwrite in ([], ["--overwrite"]):
        refused(capsys, *arguments, "--input", bad, *overwrite)
        assert content_of(out) == before
    changed = texts / "0.txt"
    content = changed.read_text()
    changed.write_text(content[::-1])  # as many bytes
    assert "input_sha256" in refused(capsys, *arguments)
    changed.write_text(content)
    message = refused(capsys, "--source", "text", *many[:20], "--out", out)
    assert "input_files is 40 there, but 10" in message and len(message) < 700
    run(*arguments, "--input", bad, "--on-bad-text", "skip", "--overwrite")
    assert load_manifest(out)["skipped_texts"] == 1 and load_manifest(out)["documents"] == 40
    assert "1 texts that are not UTF-8 were left out" in capsys.readouterr().out
    run(*arguments, "--input", bad, "--on-bad-text", "skip")
    assert "nothing to do" in capsys.readouterr().out


def test_an_unfinished_folder_is_no_obstacle(tmp_path, texts, capsys, monkeypatch):
    """What earlier versions left after a refused input, or a killed call, is done again with any other request."""
    out = tmp_path / "out"
    write_folder(out, [["half"]])
    (out / "shard_00009.parquet.part").write_bytes(b"half")
    (out / UNFINISHED_FILE).write_text('{"source": "text", "seed": 3, "input": ["a name"]}')
    run("--source", "text", "--input", texts, "--out", out)
    assert check_data_folder(out, hashes=True).train_shards == 4 and len(list(out.iterdir())) == 6

    def full(*_):
        raise OSError(28, "No space left on device", str(out / "shard_00000.parquet.part"))

    with monkeypatch.context() as patch:
        patch.setattr("megachat.prepare.sources._write_shard", full)
        message = refused(capsys, "--source", "text", "--input", texts, "--out", out, "--seed", 1, "--overwrite")
    assert "shard_00000.parquet.part cannot be read or written (No space left on device)" in message
    run("--source", "text", "--input", texts, "--out", out, "--seed", 2)
    assert load_manifest(out)["seed"] == 2


def test_a_download_that_was_refused_is_corrected_and_complete_shards_are_kept(tmp_path, mirror, capsys):  # noqa: F811
    out = tmp_path / "out"
    mirror.files["shard_01822.parquet"] = mirror.files["shard_00009.parquet"]
    arguments = ["--source", "fineweb-edu", "--out", out, "--workers", 1, "--shards"]
    refused(capsys, *arguments, 2, "--base-url", mirror.source.base_url + "/wrong")
    assert (out / UNFINISHED_FILE).exists()
    address = ["--base-url", mirror.source.base_url]
    refused(capsys, *arguments, 9, *address)  # the mirror has three
    message = refused(capsys, "--source", "python", "--out", out)
    assert "unfinished download with complete shards that this call would remove (shard_00000.parquet, " in message
    assert "would remove (shard_00001.parquet, shard_00002.parquet)" in refused(capsys, *arguments, 1, *address)
    run(*arguments, 3, *address)
    assert check_data_folder(out, hashes=True).train_shards == 3 and mirror.requests["shard_00001.parquet"] == 1


CASES = SHARED / "cases" / "make_data.py"


@pytest.mark.skipif(not CASES.is_file(), reason="../shared with the maker of odd data folders is absent")
def test_folders_as_people_have_them(tmp_path, capsys):
    """Each odd folder is prepared, or refused in one sentence without a trace."""
    refusals = {
        "all_null_type": "`text` column of null",
        "binary": "`text` column of binary",
        "broken_link": "s2.parquet is a broken link to /nowhere/s2.parquet",
        "duplicate_text": "has 2 columns named `text`",
        "invalid_utf8": "s0.parquet, row group 0, row 0 (counted from 0) is not UTF-8 text",
        "invalid_utf8_val": "s1.parquet, row group 0, row 0 (counted from 0) is not UTF-8 text",
        "list_text": "`text` column of list",
        "nested": "has no `text` column (it has data)",
        "renamed": "has no `text` column (it has content)",
        "upper": "has no `text` column (it has Text)",
    }
    cases = tmp_path / "cases"
    with monkeypatched_argv(str(CASES), str(cases)):
        runpy.run_path(str(CASES))
    for folder in sorted(cases.iterdir()):
        out = tmp_path / "out" / folder.name
        arguments = ["--source", "parquet", "--input", folder, "--out", out]
        if folder.name in refusals:
            assert refusals[folder.name] in refused(capsys, *arguments)
            assert not out.exists()
        else:
            run(*arguments)
            assert check_data_folder(out).train_documents > 0
    run(
        "--source", "parquet", "--input", cases / "invalid_utf8", "--out", tmp_path / "skipped", "--on-bad-text", "skip"
    )
    assert load_manifest(tmp_path / "skipped")["skipped_texts"] == 200


@contextlib.contextmanager
def monkeypatched_argv(*arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", list(arguments))
        yield
