import hashlib
import itertools
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megachat.data.shards import (
    UNFINISHED_FILE,
    Corpus,
    check_data_folder,
    open_shards,
    shards_fingerprint,
    split_shards,
)
from megachat.errors import UserError
from megachat.prepare.manifest import finish_preparation, measure_shard
from tests.unit.data.corpus import random_texts, write_folder


@pytest.fixture
def folder(tmp_path):
    texts = random_texts(50, 0)
    return write_folder(tmp_path / "data", [texts[:20], texts[20:40], texts[40:]])


def one_sentence(caught, *words):
    message = str(caught.value)
    assert "\n" not in message and all(str(word) in message for word in words), message


def test_summary(folder):
    summary = check_data_folder(folder)
    assert (summary.train_shards, summary.train_documents, summary.validation_documents, summary.source) == (
        2,
        40,
        10,
        None,
    )
    assert "40 documents" in str(summary) and len(summary.train_fingerprint) == 64


@pytest.mark.parametrize("check", [check_data_folder, open_shards])
def test_folders_that_are_refused(tmp_path, folder, check):
    with pytest.raises(UserError) as caught:
        check(tmp_path / "nowhere")
    one_sentence(caught, tmp_path / "nowhere", "does not exist", "megachat data")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError) as caught:
        check(tmp_path / "empty")
    one_sentence(caught, tmp_path / "empty", "no .parquet")
    with pytest.raises(UserError) as caught:
        check(write_folder(tmp_path / "one", [["a"]]))
    one_sentence(caught, "only one shard", "shard_00000.parquet", "at least 2")
    (folder / UNFINISHED_FILE).write_text("{}")
    with pytest.raises(UserError) as caught:
        check(folder)
    one_sentence(caught, folder, "has not finished")


def break_shard(path, kind):
    whole = path.read_bytes()
    if kind == "not parquet":
        path.write_bytes(b"<html>not found</html>" * 20)
    elif kind == "truncated":
        path.write_bytes(whole[: len(whole) // 2])
    elif kind == "nothing":
        path.write_bytes(b"")
    elif kind == "four bytes":
        path.write_bytes(b"PAR1")
    elif kind == "footer":
        path.write_bytes(whole[:-60] + b"\xff" * 52 + whole[-8:])
    elif kind == "other column":
        pq.write_table(pa.table({"body": ["a"]}), path)
    elif kind == "numbers":
        pq.write_table(pa.table({"text": [1, 2]}), path)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("not parquet", "is not a parquet file"),
        ("nothing", "is not a parquet file"),
        ("truncated", "truncated"),
        ("four bytes", "truncated"),
        ("footer", "cannot be read as parquet"),
        ("other column", "no `text` column (it has body)"),
        ("numbers", "`text` column of int64"),
    ],
)
def test_shards_that_are_refused_by_name(folder, kind, words):
    path = folder / "shard_00001.parquet"
    break_shard(path, kind)
    with pytest.raises(UserError) as caught:
        open_shards(folder)
    one_sentence(caught, path, words)


def test_manifest_must_agree_with_the_files(folder):
    entries = [measure_shard(path) for path in sorted(folder.glob("*.parquet"))]
    (folder / UNFINISHED_FILE).write_text("{}")
    finish_preparation(folder, {"source": "test"}, entries)
    assert check_data_folder(folder, hashes=True).source == "test"
    path = folder / "shard_00000.parquet"
    whole = path.read_bytes()
    path.write_bytes(whole[:50] + bytes([whole[50] ^ 1]) + whole[51:])
    check_data_folder(folder)
    with pytest.raises(UserError) as caught:
        check_data_folder(folder, hashes=True)
    one_sentence(caught, path, "SHA-256")
    write_folder(folder, [["another"] * 3])
    with pytest.raises(UserError) as caught:
        check_data_folder(folder)
    one_sentence(caught, path, f"{path.stat().st_size:,} bytes", f"{len(whole):,}")
    path.unlink()
    with pytest.raises(UserError) as caught:
        check_data_folder(folder)
    one_sentence(caught, path, "is missing but listed")
    path.write_bytes(whole)
    (folder / "shard_00009.parquet").write_bytes(whole)
    with pytest.raises(UserError) as caught:
        check_data_folder(folder)
    one_sentence(caught, "shard_00009.parquet", "not in manifest.json")
    (folder / "manifest.json").write_text(json.dumps({"shards": 3}))
    with pytest.raises(UserError) as caught:
        check_data_folder(folder)
    one_sentence(caught, "manifest.json is not a valid manifest")


def test_measure_counts_bytes_and_characters(tmp_path):
    path = write_folder(tmp_path, [["für", "", "日本"]]) / "shard_00000.parquet"
    entry = measure_shard(path)
    assert (entry.documents, entry.text_chars, entry.text_bytes) == (3, 5, 10)
    assert (entry.bytes, entry.sha256) == (path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())


def test_fingerprint_changes_with_the_train_shards(folder):
    before = check_data_folder(folder).train_fingerprint
    write_folder(folder, [["x"]])
    assert check_data_folder(folder).train_fingerprint != before == before


def read(corpus, number, count):
    texts_by_number = {}
    for first, texts in corpus.read_from(number):
        for offset, text in enumerate(texts.to_pylist()):
            texts_by_number[first + offset] = text
        if first + len(texts) >= number + count:
            return [texts_by_number[index] for index in range(number, number + count)]


def test_documents_come_in_file_order_epoch_after_epoch(folder):
    texts = random_texts(50, 0)[:40]
    corpus = Corpus(split_shards(open_shards(folder), "train"))
    assert corpus.documents == 40
    assert read(corpus, 0, 40) == texts
    first, texts_read = next(corpus.read_from(33))
    assert first <= 33 < first + len(texts_read)
    assert read(corpus, 33, 60) == list(itertools.islice(itertools.cycle(texts), 33, 93))


def test_a_seed_visits_row_groups_in_another_order_each_epoch(folder):
    shards = split_shards(open_shards(folder), "train")
    texts = random_texts(50, 0)[:40]
    epochs = [read(Corpus(shards, seed), epoch * 40, 40) for seed in (1, 2) for epoch in (0, 1)]
    assert all(sorted(epoch) == sorted(texts) and epoch != texts for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert read(Corpus(shards, 1), 40, 40) == epochs[1]
    # Written down once: another order would break every run that is resumed.
    assert Corpus(shards, 1).groups(0) == [(1, 1), (0, 1), (0, 2), (1, 2), (1, 0), (0, 0)]


def test_a_split_without_documents_is_refused(tmp_path):
    folder = write_folder(tmp_path, [["a"], []])
    with pytest.raises(UserError, match="no document in shard_00001.parquet"):
        Corpus(split_shards(open_shards(folder), "validation"))


def test_fingerprint_is_of_names_sizes_and_documents(folder):
    shards = open_shards(folder)
    listed = [[shard.path.name, shard.size_bytes, shard.documents] for shard in shards]
    assert shards_fingerprint(shards) == hashlib.sha256(json.dumps(listed).encode()).hexdigest()
