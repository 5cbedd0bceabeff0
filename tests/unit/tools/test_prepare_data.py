import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from megachat.data.shards import MANIFEST, UNFINISHED, check_data_folder, load_manifest
from megachat.files import file_sha256
from megachat.prepare.manifest import begin_preparation
from tests.unit.data.corpus import random_texts, write_folder
from tests.unit.prepare.test_download import mirror  # noqa: F401
from tools.prepare_data import main

ROOT = Path(__file__).parents[3]


@pytest.fixture
def texts(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for index, text in enumerate(random_texts(40, 0)):
        (folder / f"{index}.txt").write_text(text)
    return folder


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    message = capsys.readouterr().err
    assert caught.value.code == 2 and message.startswith("error: ") and message.count("\n") == 1, message
    return message


def run(*arguments):
    main([str(argument) for argument in arguments])


def content_of(folder):
    return {path.name: (path.stat().st_mtime_ns, file_sha256(path)) for path in folder.iterdir()}


@pytest.mark.slow
def test_python_source_in_a_process_of_its_own(tmp_path):
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
        patch.setattr("tools.prepare_data.write_shards", interrupted)
        with pytest.raises(SystemExit):
            run(*arguments)
    assert "interrupted" in capsys.readouterr().err
    assert (out / UNFINISHED).exists() and not (out / MANIFEST).exists()
    assert "seed is 0 there, but 1" in refused(capsys, *arguments, "--seed", 1)
    run(*arguments)
    assert check_data_folder(out, hashes=True).train_shards == 4 and not list(out.glob("*.part"))


def test_download_and_growing_it(tmp_path, mirror, capsys):  # noqa: F811
    out = tmp_path / "out"
    mirror.files["shard_01822.parquet"] = mirror.files["shard_00009.parquet"]
    arguments = ["--source", "fineweb-edu", "--base-url", mirror.source.base_url, "--out", out, "--shards"]
    mirror.faults["shard_00001.parquet"] = ["404"]
    assert "shard_00001.parquet answers HTTP 404" in refused(capsys, *arguments, 2, "--workers", 1)
    assert (out / UNFINISHED).exists() and (out / "shard_00000.parquet").exists()
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
    begin_preparation(
        out, {"source": "climbmix", "base_url": "http://one", "shards": 1}, overwrite=True, keep_shards=True
    )
    assert [path.name for path in out.iterdir()] == [UNFINISHED]
    write_folder(out, [["a"]])
    begin_preparation(
        out, {"source": "climbmix", "base_url": "http://one", "shards": 2}, overwrite=True, keep_shards=True
    )
    assert (out / "shard_00000.parquet").exists()
    begin_preparation(
        out, {"source": "climbmix", "base_url": "http://two", "shards": 2}, overwrite=True, keep_shards=True
    )
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
