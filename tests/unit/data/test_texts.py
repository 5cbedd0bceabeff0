"""Columns and files as people have them: string types, texts that are not UTF-8, hidden files, links, empty texts."""

import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import regex  # a dependency of tiktoken

from megachat.data.shards import check_data_folder, open_shard, open_shards
from megachat.data.texts import BadTexts, count_words, decode_texts, read_shard_texts
from megachat.data.tokenizer import SPLIT_PATTERN
from megachat.errors import UserError
from megachat.prepare.manifest import measure_shard
from tests.unit.data.corpus import write_folder, write_texts

TEXTS = ["für", None, "", "two", "two"]


@pytest.mark.parametrize("kind", ["string", "large_string", "string_view", "dictionary"])
def test_columns_of_strings_are_read(tmp_path, kind):
    column = pa.array(TEXTS)
    column = column.dictionary_encode() if kind == "dictionary" else column.cast(getattr(pa, kind)())
    path = tmp_path / "shard.parquet"
    pq.write_table(pa.table({"text": column, "other": pa.array(range(5))}), path, row_group_size=3)
    assert open_shard(path).documents == 5
    assert sum(read_shard_texts(path, 2, BadTexts()), []) == ["für", "two", "two"]
    entry = measure_shard(path)
    assert (entry.text_chars, entry.text_bytes) == (9, 10)


@pytest.mark.parametrize(
    ("table", "words"),
    [
        (pa.table({"text": pa.array([b"bytes"])}), "`text` column of binary: cast it to string"),
        (pa.table({"text": pa.nulls(3)}), "`text` column of null"),
        (pa.table({"text": pa.array([1, 2]).dictionary_encode()}), "`text` column of int64"),
        (pa.Table.from_arrays([pa.array(["a"])] * 2, names=["text", "text"]), "has 2 columns named `text`: keep one"),
        (
            pa.table({f"column {n}": [1] for n in range(500)}),
            "it has column 0, column 1, column 2, column 3, column 4 ",
        ),
    ],
)
def test_other_columns_are_refused_in_one_sentence(tmp_path, table, words):
    pq.write_table(table, tmp_path / "shard.parquet")
    with pytest.raises(UserError) as caught:
        open_shard(tmp_path / "shard.parquet")
    message = str(caught.value)
    assert words in message and "\n" not in message and len(message) < 400


BAD = [b"good", b"abc \xff\xfe", None, b"", b"also good", b"\xed\xa0\x80"]


def test_a_text_that_is_not_utf8_is_refused_with_its_place(tmp_path):
    path = write_texts(tmp_path / "shard.parquet", [b"fine"] * 7 + BAD, group=5)
    with pytest.raises(UserError) as caught:
        list(read_shard_texts(path, 2, BadTexts()))
    message = str(caught.value)
    assert f"{path}, row group 1, row 3 (counted from 0) is not UTF-8 text (byte 0xff at position 4)" in message
    assert "data.on_bad_text=skip" in message and "\n" not in message


@pytest.mark.parametrize("dictionary", [False, True])
def test_texts_that_are_not_utf8_are_skipped_counted_and_listed(tmp_path, dictionary):
    path = write_texts(tmp_path / "shard.parquet", BAD * 20, group=7, dictionary=dictionary)
    lines: list[str] = []
    bad_texts = BadTexts("skip", log=lines.append)
    assert sum(read_shard_texts(path, 4, bad_texts), []) == ["good", "also good"] * 20
    assert bad_texts.count == 40 and len(lines) == 11 and "row group 0, row 1 (counted" in lines[0]
    assert "further ones are counted" in lines[-1]
    bad_texts = BadTexts("skip", log=lines.append)
    for _ in range(2):
        bad_texts.add("a place", b"\xff")
    assert bad_texts.count == 2 and lines[11:] == ["skipped: a place is not UTF-8 text (byte 0xff at position 0)"]
    assert measure_shard(path).documents == 120  # a downloaded shard with such texts is complete


def test_only_the_bad_texts_stay_bytes():
    column = pa.chunked_array([pa.array(["a", None]), bad_array([b"\xff", b"b"])])
    assert decode_texts(column) == ["a", None, b"\xff", "b"]


def bad_array(contents):
    binary = pa.array(contents, pa.binary())
    return pa.Array.from_buffers(pa.string(), len(binary), binary.buffers(), binary.null_count)


def test_hidden_files_are_not_shards_and_upper_case_ones_are(tmp_path):
    folder = write_folder(tmp_path, [["a"], ["b"]])
    (folder / "._shard_00000.parquet").write_bytes(b"\0\5\x16\7")
    (folder / ".s9.parquet").write_bytes((folder / "shard_00000.parquet").read_bytes())
    (folder / ".ipynb_checkpoints").mkdir()
    (folder / "shard_00001.parquet").rename(folder / "shard_00001.PARQUET")
    assert [shard.path.name for shard in open_shards(folder)] == ["shard_00000.parquet", "shard_00001.PARQUET"]


def test_broken_links_and_folders_named_like_shards_are_reported(tmp_path):
    folder = write_folder(tmp_path, [["a"], ["b"]])
    link = folder / "shard_00002.parquet"
    link.symlink_to("/nowhere/s2.parquet")
    with pytest.raises(UserError, match=r"shard_00002.parquet is a broken link to /nowhere/s2.parquet: restore"):
        open_shards(folder)
    link.unlink()
    link.symlink_to(folder / "shard_00000.parquet")
    assert len(open_shards(folder)) == 3
    link.unlink()
    link.mkdir()
    with pytest.raises(UserError, match=r"shard_00002.parquet is a folder, not a parquet file"):
        open_shards(folder)


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        ([None, b""] * 20, "has no text at all, only null or empty documents: put more text in the last shard"),
        ([b"a", None, b"c", b""] * 5, "has no text for 2 of 4 packing streams, only null or empty documents"),
        ([b"a"] * 2000 + [b"\xff"], "row group 285, row 5 (counted from 0) is not UTF-8 text"),
        ([b"\xff"] * 8, "row group 0, row 0 (counted from 0) is not UTF-8 text"),
    ],
)
def test_validation_without_usable_texts_is_refused_before_the_run(tmp_path, texts, words):
    path = write_texts(tmp_path / "shard.parquet", texts, group=7)
    with pytest.raises(UserError) as caught:
        check_data_folder(tmp_path, min_shards=1, validation_streams=4)
    assert words in str(caught.value) and str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_validation_with_skipped_texts(tmp_path):
    write_texts(tmp_path / "shard.parquet", [b"\xff"] * 9 + [b"a"] * 4, group=7)
    check_data_folder(tmp_path, min_shards=1, validation_streams=4, bad_texts=BadTexts("skip"))
    with pytest.raises(UserError, match="no text for 1 of 5 packing streams"):
        check_data_folder(tmp_path, min_shards=1, validation_streams=5, bad_texts=BadTexts("skip"))
    with pytest.raises(UserError, match="has 13 documents, fewer than 14 packing streams: set data.streams to 13"):
        check_data_folder(tmp_path, min_shards=1, validation_streams=14)
    write_texts(tmp_path / "shard.parquet", [], group=7)
    with pytest.raises(UserError, match="shard.parquet has no document"):
        check_data_folder(tmp_path, min_shards=1, validation_streams=1)


def test_no_text_has_fewer_pieces_than_words_are_counted():
    rng, letters = random.Random(3), "ab!'s1\x1c\x1d\x1e\x1f \t\n\r\x0b\x0c\x85\xa0\u1680\u2003\u3000é中"
    texts = ["".join(rng.choice(letters) for _ in range(rng.randint(0, 12))) for _ in range(5000)]
    column = pa.chunked_array([texts[:100], texts[100:]], pa.large_string())
    for first in (0, 30):
        counts = count_words(column.slice(first)).tolist()
        for text, count in zip(texts[first:], counts, strict=True):
            assert count <= len(regex.findall(SPLIT_PATTERN, text)), repr(text)  # a piece has one token or more
    texts = ["to be  or\nnot ", "", "to be", None, "café \xa0 olé"]
    assert count_words(pa.chunked_array([texts], pa.large_string())).tolist() == [3, 0, 2, 0, 1]
    assert not len(count_words(pa.chunked_array([], pa.large_string())))
