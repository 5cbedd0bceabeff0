import random
from collections import Counter

import pyarrow.parquet as pq
import pytest

from megachat.data.shards import open_shards
from megachat.data.texts import BadTexts
from megachat.errors import UserError
from megachat.prepare.python_source import cut_module, read_standard_library
from megachat.prepare.sources import cut_text, find_input_files, read_parquet_files, read_text_files, write_shards
from tests.unit.data.corpus import random_texts, write_folder


def test_texts_are_cut_at_paragraphs_then_lines_then_spaces():
    assert list(cut_text("aaaa bbbb\ncccc\n\ndddd", 100)) == ["aaaa bbbb\ncccc\n\ndddd"]
    assert list(cut_text("aaaa bbbb\ncccc\n\ndddd", 18)) == ["aaaa bbbb\ncccc", "dddd"]
    assert list(cut_text("aaaa bbbb\ncccc\n\nddddd", 10)) == ["aaaa bbbb", "cccc", "ddddd"]
    assert list(cut_text("aaaa bbbb\ncccc", 8)) == ["aaaa ", "bbbb", "cccc"]
    assert list(cut_text("aaaabbbb", 4)) == ["aaaa", "bbbb"]
    assert list(cut_text("\n\n  \n", 4)) == []


def test_no_character_is_lost_or_cut():
    rng = random.Random(0)
    text = "".join(rng.choice("aé日🙂 \n") for _ in range(3000))
    for limit in (4, 7, 64, 1000):
        pieces = list(cut_text(text, limit))
        assert all(len(piece.encode()) <= limit for piece in pieces)
        assert "".join(pieces).replace("\n", "").replace(" ", "") == text.replace("\n", "").replace(" ", "")


def test_inputs_are_files_by_name_and_folders_by_suffix(tmp_path):
    (tmp_path / "deep").mkdir()
    for name in ("b.txt", "a.md", "deep/c.txt", "skipped.html"):
        (tmp_path / name).write_text(name)
    named = tmp_path / "skipped.html"
    files = find_input_files([tmp_path, named, tmp_path / "b.txt"], (".txt", ".md"))
    assert [path.name for path in files] == ["a.md", "b.txt", "c.txt", "skipped.html"]
    assert list(read_text_files(files, 1000)) == ["a.md", "b.txt", "deep/c.txt", "skipped.html"]
    with pytest.raises(UserError, match="nowhere does not exist"):
        find_input_files([tmp_path / "nowhere"], (".txt",))
    with pytest.raises(UserError, match="has no .rst file"):
        find_input_files([tmp_path], (".rst",))
    with pytest.raises(UserError, match="no --input"):
        find_input_files([], (".txt",))


def test_links_upper_case_and_hidden_files_below_an_input(tmp_path):
    folder, elsewhere = tmp_path / "input", tmp_path / "elsewhere"
    for name in (
        "input/a.TXT",
        "input/.hidden.txt",
        "input/._a.txt",
        "input/.ipynb_checkpoints/a.txt",
        "elsewhere/b.txt",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (folder / "linked").symlink_to(elsewhere)
    (folder / "b.txt").symlink_to(elsewhere / "b.txt")
    (elsewhere / "circle").symlink_to(folder)
    (folder / "lib.so").symlink_to("/nowhere/lib.so")  # no text in any case
    assert [path.name for path in find_input_files([folder, folder / "linked"], (".txt",))] == ["a.TXT", "b.txt"]
    assert find_input_files([folder / ".hidden.txt"], (".txt",)) == [folder / ".hidden.txt"]  # by its name
    for name in ("c.TXT", "books"):
        (elsewhere / name).symlink_to(f"/nowhere/{name}")
        with pytest.raises(UserError, match=f"{name} is a broken link to /nowhere/{name}: restore its target"):
            find_input_files([folder], (".txt",))
        (elsewhere / name).unlink()


def test_files_that_are_not_utf8_can_be_skipped(tmp_path):
    for name, content in (("a", b"one"), ("b", b"f\xfcr"), ("c", b"two\r\nlines\rhere")):
        (tmp_path / name).write_bytes(content)
    lines: list[str] = []
    bad_texts = BadTexts("skip", log=lines.append)
    files = [tmp_path / name for name in "abc"]
    assert list(read_text_files(files, 1000, bad_texts)) == ["one", "two\nlines\nhere"]
    assert bad_texts.count == 1 and f"{tmp_path}/b is not UTF-8 text (byte 0xfc at position 1)" in lines[0]


def test_text_that_is_not_utf8_is_refused(tmp_path):
    path = tmp_path / "latin.txt"
    path.write_bytes("für".encode("latin-1"))
    with pytest.raises(UserError, match="latin.txt is not UTF-8 text .byte 0xfc at position 1."):
        list(read_text_files([path], 1000))
    path.write_bytes(b"\xef\xbb\xbfmarked\r\nline")
    assert list(read_text_files([path], 1000)) == ["marked\nline"]


def test_parquet_documents_without_empty_ones(tmp_path):
    folder = write_folder(tmp_path, [["a", "", "b"], ["c"]])
    assert list(read_parquet_files(sorted(folder.iterdir()))) == ["a", "b", "c"]


def texts_of(folder):
    return [pq.read_table(path)["text"].to_pylist() for path in sorted(folder.glob("*.parquet"))]


@pytest.mark.parametrize("train_shards", [1, 3, None])
def test_shards_hold_every_document_once_in_a_seeded_order(tmp_path, train_shards):
    documents = random_texts(400, 0) + ["twice", "twice"]
    written = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        (tmp_path / name).mkdir()
        entries = write_shards(tmp_path / name, iter(documents), seed, train_shards)
        written.append(texts_of(tmp_path / name))
        assert [entry.documents for entry in entries] == [len(texts) for texts in written[-1]]
    assert written[0] == written[1] != written[2]
    sizes = [len(texts) for texts in written[0]]
    assert len(sizes) == (train_shards or 4) + 1 and sizes[-1] == 20 and max(sizes[:-1]) - min(sizes[:-1]) <= 1
    assert all(Counter(sum(shards, [])) == Counter(documents) and sum(shards, []) != documents for shards in written)


def test_layout_of_a_shard(tmp_path):
    write_shards(tmp_path, (str(index) for index in range(20_000)), 0, 1)
    train, validation = open_shards(tmp_path)
    assert (
        train.group_rows[:-1] == (1024,) * 18 and max(validation.group_rows) == 125 and len(validation.group_rows) == 8
    )
    metadata = pq.ParquetFile(train.path)
    assert metadata.schema_arrow.field("text").type == "string"
    assert metadata.metadata.row_group(0).column(0).compression == "ZSTD"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shard_00000.parquet", "shard_00001.parquet"]


def test_too_few_documents(tmp_path):
    assert len(write_shards(tmp_path, ["a", "b"], 0, None)) == 2
    with pytest.raises(UserError, match="2 documents, too few for 2 train shards"):
        write_shards(tmp_path, ["a", "b"], 0, 2)
    with pytest.raises(UserError, match="0 documents"):
        write_shards(tmp_path, [], 0, None)


MODULE = '''"""What it is."""
import os


# about f
def f():
    return 1
\x0c

@decorated
class Long:
    """About it."""

    def first(self):
        return "long enough to be cut"

    # about second
    def second(self):
        return "long enough to be cut"


TABLE = {
    0x0000: 0x0001, 0x0002: 0x0003, 0x0004: 0x0005, 0x0006: 0x0007,
    "bytes": "\\x00\\x01\\x02\\x03\\x04",
}
'''


def test_modules_are_cut_at_definitions():
    whole = cut_module(MODULE, 10_000)
    assert len(whole) == 1 and "0x0002" not in whole[0] and "x01" not in whole[0] and "\x0c" not in whole[0]
    pieces = cut_module(MODULE, 120)
    assert [piece.strip().splitlines()[0] for piece in pieces] == [
        '"""What it is."""',
        "def first(self):",
        "# about second",
    ]
    assert "\n".join(line for piece in pieces for line in piece.split("\n") if line) == "\n".join(
        line for line in whole[0].split("\n") if line
    )
    assert cut_module("def broken(:", 100) == []


def test_large_tables_are_left_out():
    table = "NAMES = {\n" + "".join(f"    'name{index}': 'value',\n" for index in range(100)) + "}\n"
    assert cut_module("import os\n\n" + table + "\n\ndef f():\n    pass\n", 200) == [
        "import os\n\n\n\ndef f():\n    pass"
    ]


def test_folders_and_files_that_are_left_out(tmp_path):
    for name, text in {
        "b.py": "def b():\n    pass\n",
        "a.py": "def a():\n    pass\n",
        "copy.py": "def a():\n    pass\n",
        "test/x.py": "def x():\n    pass\n",
        "site-packages/y.py": "def y():\n    pass\n",
        "made.py": "# Generated from a table.\ndef made():\n    pass\n",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "latin.py").write_bytes("# für".encode("latin-1"))
    assert list(read_standard_library(100, tmp_path)) == ["def a():\n    pass", "def b():\n    pass"]
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="no source of its standard library"):
        list(read_standard_library(100, tmp_path / "none"))
