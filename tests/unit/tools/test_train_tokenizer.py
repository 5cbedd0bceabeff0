import json
import re
from functools import partial

import pytest

from megachat.data.tokenizer import METADATA_FILE, RANK_FILE, load_origin, load_tokenizer
from megachat.files import file_sha256
from tests.refusals import refused_by
from tests.unit.data.corpus import ENGLISH, NANOCHAT, needs_shared, random_texts, write_folder, write_texts
from tools.train_tokenizer import main

refused = partial(refused_by, main)


@pytest.fixture
def data(tmp_path):
    texts = random_texts(300, 0)
    return write_folder(tmp_path / "data", [texts[:150], texts[150:250], texts[250:]])


def run(*arguments):
    main([str(argument) for argument in arguments])


def test_training_saves_reports_and_does_nothing_the_second_time(tmp_path, data, capsys):
    out = tmp_path / "tokenizer"
    run("--data", data, "--vocab-size", 300, "--out", out)
    out_text = capsys.readouterr().out
    assert (
        "trained 300 tokens" in out_text
        and re.search(r"^read [\d,]+ documents, [\d,]+ characters; learning 35 merges \.\.\.$", out_text, re.MULTILINE)
        and "train: 1." in out_text
        and "validation: 1." in out_text
        and "bytes per token" in out_text
    )
    assert load_tokenizer(out).vocab_size == 300
    assert sorted(path.name for path in out.iterdir()) == [RANK_FILE, METADATA_FILE]
    metadata = json.loads((out / METADATA_FILE).read_text())
    assert metadata["origin"] | {"data": None} == {
        "data": None,
        "vocab_size": 300,
        "max_chars": 2_000_000_000,
        "doc_cap": 10_000,
    }
    before = (out / METADATA_FILE).stat().st_mtime_ns
    run("--data", data, "--vocab-size", 300, "--out", out)
    assert "nothing to do" in capsys.readouterr().out and (out / METADATA_FILE).stat().st_mtime_ns == before


def test_another_tokenizer_is_refused_unless_overwritten(tmp_path, data, capsys):
    out = tmp_path / "tokenizer"
    run("--data", data, "--vocab-size", 300, "--out", out)
    assert "holds another tokenizer" in refused(capsys, "--data", data, "--vocab-size", 290, "--out", out)
    assert load_tokenizer(out).vocab_size == 300
    run("--data", data, "--vocab-size", 290, "--out", out, "--overwrite", "--max-chars", 3000, "--doc-cap", 50)
    assert load_tokenizer(out).vocab_size == 290


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--vocab-size", 300], "neither --data to train on nor --import-nanochat"),
        (["--import-nanochat", "nowhere", "--vocab-size", 300], "--vocab-size is for training"),
        (["--import-nanochat", "nowhere", "--shards", "0-1"], "--shards is for training"),
        (["--import-nanochat", "nowhere"], "tokenizer.pkl is missing"),
        (["--data", "nowhere"], "nowhere does not exist"),
        (["--data", "DATA", "--vocab-size", 264], "264 tokens is too small"),
        (["--data", "DATA", "--vocab-size", 3000], "give more text, or give --vocab-size"),
        (["--data", "DATA", "--vocab-size", 30000], "bytes, too few for a vocabulary of 30,000 tokens"),
        (["--data", "DATA", "--max-chars", 0], "--max-chars is 0"),
    ],
)
def test_requests_that_make_no_sense(tmp_path, data, capsys, arguments, words):
    arguments = [data if argument == "DATA" else argument for argument in arguments]
    assert words in refused(capsys, *arguments, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_stated_range_of_shards_is_what_it_learns_from_and_is_recorded(tmp_path, capsys):
    texts = [[f"{word} {word}s {word}ing " * 40] * 20 for word in ("river", "harbor", "mountain", "signal", "last")]
    data, out, alone = write_folder(tmp_path / "data", texts), tmp_path / "range", tmp_path / "alone"
    run("--data", data, "--shards", "1-2", "--vocab-size", 270, "--out", out)
    run("--data", write_folder(tmp_path / "two", [*texts[1:3], texts[4]]), "--vocab-size", 270, "--out", alone)
    assert load_tokenizer(out).fingerprint == load_tokenizer(alone).fingerprint
    run("--data", data, "--vocab-size", 270, "--out", tmp_path / "all")
    assert load_tokenizer(out).fingerprint != load_tokenizer(tmp_path / "all").fingerprint
    assert load_origin(out)["shards"] == {
        name: file_sha256(data / name) for name in ("shard_00001.parquet", "shard_00002.parquet")
    }
    assert "shards" not in load_origin(tmp_path / "all")
    capsys.readouterr()
    run("--data", data, "--shards", "1-2", "--vocab-size", 270, "--out", out)
    assert "nothing to do" in capsys.readouterr().out
    assert "another tokenizer" in refused(capsys, "--data", data, "--shards", "0-2", "--vocab-size", 270, "--out", out)
    (data / "shard_00002.parquet").unlink()
    for given, words in {
        "0-3": f"{data} lacks shard 2 of 0-3: its train shards are 0 to 1, 3 (4 is for validation); download what is",
        "3-6": "lacks shards 5, 6 of 3-6",
        "3-999999999": "lacks shards 5, 6, 7, 8, 9, 10, ... of 3-999999999",
        "3-4": "shard_00004.parquet is the last shard of its folder, which is for validation: its train shards are 0 ",
        "3-1": "--shards is '3-1', but must be two numbers of shards in order, such as 0-7",
        "0:3": "--shards is '0:3', but must be",
    }.items():
        assert words in refused(capsys, "--data", data, "--shards", given, "--out", tmp_path / "no"), given
    assert "(of a speedrun: --set model.vocab_size=" in refused(
        capsys, "--data", data, "--shards", "0", "--vocab-size", 3000, "--out", tmp_path / "no"
    )
    (data / "other_00001.parquet").write_bytes((data / "shard_00001.parquet").read_bytes())
    assert "two shards 00001" in refused(capsys, "--data", data, "--shards", "0-1", "--out", tmp_path / "no")
    assert not (tmp_path / "no").exists()


@needs_shared
def test_import_of_nanochats_tokenizer(tmp_path, capsys):
    run("--import-nanochat", NANOCHAT, "--data", ENGLISH, "--out", tmp_path, "--max-chars", 200_000)
    assert load_tokenizer(tmp_path).vocab_size == 1024
    out_text = capsys.readouterr().out
    assert "1,024 tokens" in out_text and "validation: 2." in out_text


def test_texts_that_are_not_utf8_are_refused_or_left_out(tmp_path, capsys):
    contents = [text.encode() for text in random_texts(40, 0)]
    for index in range(2):
        write_texts(tmp_path / f"shard_{index}.parquet", [*contents, b"\xff"])
    arguments = ["--data", tmp_path, "--vocab-size", 270, "--out", tmp_path / "tokenizer"]
    message = refused(capsys, *arguments)
    assert "shard_0.parquet, row group 5, row 5 (counted from 0) is not UTF-8" in message
    assert "--on-bad-text skip" in message and not (tmp_path / "tokenizer").exists()
    run(*arguments, "--on-bad-text", "skip")
    assert "1 texts that are not UTF-8 were left out" in capsys.readouterr().out
    assert load_tokenizer(tmp_path / "tokenizer").vocab_size == 270


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path, data, capsys):
    (tmp_path / "file").write_text("")
    message = refused(capsys, "--data", data, "--vocab-size", 270, "--out", tmp_path / "file" / "tokenizer")
    assert "file/tokenizer cannot be written (Not a directory): give another --out" in message
