"""Bits per byte by source: every token of a source is predicted once, whatever the number of ranks."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megachat.data.shards import load_manifest
from megachat.data.tokenizer import Tokenizer
from megachat.errors import UserError
from megachat.evals.sources import SourceRows, source_names
from tests.unit.data.corpus import write_texts
from tests.unit.evals.test_bpb import mesh_of
from tools.prepare_data import main

TOKENIZER = Tokenizer({bytes([byte]): byte for byte in range(256)})


@pytest.fixture
def folder(tmp_path):
    """Two sources with different letters; one document in twenty is validation."""
    inputs = []
    for name, letter in (("novels", "n"), ("notes", "o")):
        (tmp_path / name).mkdir()
        for number in range(100):
            (tmp_path / name / f"{number:03d}.txt").write_text(letter * (2 + number % 30))
        inputs += ["--input", f"{name}={tmp_path / name}"]
    main(["--source", "text", *inputs, "--out", str(tmp_path / "data"), "--shards", "2"])
    return tmp_path / "data"


def of(folder, source, **changes) -> SourceRows:
    return SourceRows(
        folder,
        source,
        TOKENIZER,
        **({"tokens": 8, "most_rows": 1000, "micro_rows": 2, "mesh": mesh_of(1, 0)} | changes),
    )


def validation(folder, letter: str) -> list[str]:
    return [
        text for text in pq.read_table(sorted(folder.glob("*.parquet"))[-1])["text"].to_pylist() if text[0] == letter
    ]


def test_the_manifest_and_the_shards_name_the_sources(folder, tmp_path):
    assert source_names(folder) == ("novels", "notes") and load_manifest(folder)["documents"] == 200
    for path in folder.glob("*.parquet"):
        table = pq.read_table(path)
        assert table.column_names == ["text", "source"]
        assert all(
            (source == "novels") == (text[0] == "n") for text, source in zip(*table.to_pydict().values(), strict=True)
        )
    main(["--source", "text", "--input", str(tmp_path / "notes"), "--out", str(tmp_path / "plain")])
    assert source_names(tmp_path / "plain") == () and pq.read_table(
        tmp_path / "plain" / "shard_00000.parquet"
    ).column_names == ["text"]


def test_every_token_of_a_source_is_predicted_once(folder):
    for source, letter in (("novels", "n"), ("notes", "o")):
        expected = np.concatenate([TOKENIZER.encode(text, bos=True) for text in validation(folder, letter)])
        rows = of(folder, source)
        targets = np.concatenate([targets.numpy().flatten() for _, targets in rows.micro_batches])
        assert targets[targets >= 0].tolist() == expected[1:].tolist() and rows.rows == -(-(len(expected) - 1) // 8)
        ids = np.concatenate([ids.numpy().flatten() for ids, _ in rows.micro_batches])
        assert ids[: len(expected) - 1].tolist() == expected[:-1].tolist()
        assert of(folder, source, most_rows=1).rows == min(1, rows.rows)


def test_ranks_share_the_rows(folder):
    alone = of(folder, "notes", micro_rows=1)
    for ranks in (2, 3):
        shares = [of(folder, "notes", mesh=mesh_of(ranks, rank)).micro_batches for rank in range(ranks)]
        assert len({len(share) for share in shares}) == 1
        rows = [
            targets[slot].tolist() for each in zip(*shares, strict=True) for slot in range(2) for _, targets in each
        ]
        assert [row for row in rows if max(row) >= 0] == [targets[0].tolist() for _, targets in alone.micro_batches]


def test_bad_input(folder, tmp_path, capsys):
    last = sorted(folder.glob("*.parquet"))[-1]
    assert of(folder, "films").rows == 0 and of(folder, "films").micro_batches == []
    pq.write_table(pq.read_table(last).select(["text"]), last)
    with pytest.raises(UserError, match="no `source` column.*--overwrite"):
        source_names(folder)
    for inputs, why in (
        ([f"a={tmp_path / 'notes'}", str(tmp_path / "novels")], "has no name, but others have"),
        ([f"a={tmp_path / 'notes'}", f"b={tmp_path / 'notes'}"], "two names"),
        ([f"a={tmp_path / 'none'}"], "does not exist"),
    ):
        with pytest.raises(SystemExit) as caught:
            main(
                [
                    "--source",
                    "text",
                    "--out",
                    str(tmp_path / "other"),
                    *(part for each in inputs for part in ("--input", each)),
                ]
            )
        assert caught.value.code == 2 and why in capsys.readouterr().err and not (tmp_path / "other").exists()


def test_texts_that_are_not_utf8_are_refused_or_skipped(tmp_path):
    contents = [b"n" * 5, b"o" * 3, b"n\xff", b"o\xff", b"n" * 4]
    path = write_texts(tmp_path / "shard.parquet", contents)
    names = pa.array(["novels" if content[:1] == b"n" else "notes" for content in contents])
    pq.write_table(pq.read_table(path).append_column("source", names), path, row_group_size=3)
    with pytest.raises(UserError, match="shard.parquet, row group 0, row 2 .* is not UTF-8 text"):
        of(tmp_path, "novels")
    with pytest.raises(UserError, match="shard.parquet, row group 1, row 0 .* is not UTF-8 text"):
        of(tmp_path, "notes")
    table = pq.read_table(path)
    path = write_texts(path, contents, dictionary=True)
    pq.write_table(pq.read_table(path).append_column("source", table["source"].dictionary_encode()), path)
    rows = of(tmp_path, "novels", on_bad_text="skip", tokens=4)
    targets = np.concatenate([targets.numpy().flatten() for _, targets in rows.micro_batches])
    assert TOKENIZER.decode(targets[targets >= 0]) == "nnnnn<|bos|>nnnn"
