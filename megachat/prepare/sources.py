"""Local sources of text (text files, parquet files; the Python standard library is in python_source) and how documents become shards."""

import hashlib
import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megachat.data.shards import open_shard
from megachat.errors import UserError
from megachat.files import PART, sync_and_rename
from megachat.prepare.manifest import ShardEntry, measure_shard, shard_name

_SHARD_BYTES = 100_000_000  # of text in a train shard where the number of shards is not given: near that of nanochat's
_LEAST_SHARDS = 4
_GROUP_DOCUMENTS = 1024
_GROUPS = 8  # at least, in a shard of a small corpus: shuffling works on row groups
_VALIDATION_SHARE = 0.05


def find_input_files(inputs: Iterable[str | Path], suffixes: tuple[str, ...]) -> list[Path]:
    """Files given by name, and those with a suffix in folders (at any depth, by path). Raises UserError for what is missing or empty."""
    files: list[Path] = []
    for given in map(Path, inputs):
        if given.is_file():
            files.append(given)
            continue
        found = sorted(path for path in given.rglob("*") if path.suffix in suffixes and path.is_file())
        if not found:
            why = f"holds no {' or '.join(suffixes)} file" if given.is_dir() else "does not exist"
            raise UserError(f"--input {given} {why}: give a file, or a folder that holds some")
        files += found
    if not files:
        raise UserError(f"no --input was given: name the files or folders ({', '.join(suffixes)}) to read")
    return list(dict.fromkeys(files))


def read_text_files(files: Iterable[Path], document_bytes: int) -> Iterator[str]:
    """Documents of UTF-8 text files: a whole file, or pieces of at most `document_bytes` where it is longer."""
    for path in files:
        try:
            text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 text (byte {error.start}): convert it or leave it out") from None
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror}): leave it out") from None
        yield from cut_text(text, document_bytes)


def cut_text(text: str, document_bytes: int) -> Iterator[str]:
    """Pieces of at most `document_bytes` UTF-8 bytes (4 or more), cut at the last empty line, else line, else space, else character."""
    data, start = text.encode("utf-8", "replace"), 0
    while start < len(data):
        end = min(len(data), start + document_bytes)
        if end < len(data):
            for mark in (b"\n\n", b"\n", b" "):
                at = data.rfind(mark, start, end)
                if at > start:
                    end = at + len(mark)
                    break
            else:
                while data[end] & 0xC0 == 0x80:  # inside a character
                    end -= 1
        piece = data[start:end].decode("utf-8").strip("\n")
        if piece and not piece.isspace():
            yield piece
        start = end


def read_parquet_files(files: Iterable[Path]) -> Iterator[str]:
    """The documents of parquet files with a `text` column; empty ones are left out."""
    for path in files:
        open_shard(path)
        try:
            with pq.ParquetFile(path) as file:
                for batch in file.iter_batches(batch_size=1024, columns=["text"]):
                    yield from filter(None, batch.column("text").to_pylist())
        except (pa.ArrowException, OSError) as error:
            raise UserError(
                f"{path} is damaged ({str(error).splitlines()[0]}): leave it out or write it again"
            ) from None


def write_shards(
    folder: Path, documents: Iterable[str], seed: int, train_shards: int | None, sources: list[str] | None = None
) -> list[ShardEntry]:
    """Shuffle documents and write them as train shards of equal numbers and a validation shard with 5 % of them (1 at least).

    sources: of each document, complete when all documents were read; becomes the column `source`. The order is a pure function of the texts and
    the seed. All documents are in memory at once. Raises UserError for fewer documents than shards.
    """
    table, size = _in_memory(documents)
    if train_shards is None:
        train_shards = max(_LEAST_SHARDS, math.ceil(size / _SHARD_BYTES))
        train_shards = max(1, min(train_shards, len(table) - 1))
    if len(table) < train_shards + 1:
        raise UserError(
            f"the input has {len(table)} documents, too few for {train_shards} train shards and a validation shard: give more text, "
            "or a smaller --document-bytes or --shards"
        )
    order = _shuffled(table, seed)
    validation = min(max(1, round(len(order) * _VALIDATION_SHARE)), len(order) - train_shards)
    ends = [*np.linspace(0, len(order) - validation, train_shards + 1).astype(int).tolist(), len(order)]
    columns = {"text": table}
    if sources is not None:
        columns["source"] = pa.chunked_array([pa.array(sources, pa.string()).dictionary_encode()])
    shares = [pa.array(order[ends[index] : ends[index + 1]]) for index in range(train_shards + 1)]
    return [
        _write_shard(folder, index, {name: column.take(share) for name, column in columns.items()})
        for index, share in enumerate(shares)
    ]


def _in_memory(documents: Iterable[str]) -> tuple[pa.ChunkedArray, int]:
    """All documents as one Arrow column, and their UTF-8 bytes; far smaller than as Python strings."""
    chunks: list[pa.Array] = []
    batch: list[str] = []
    for document in documents:
        batch.append(document)
        if len(batch) == 4096:
            chunks.append(pa.array(batch, pa.large_string()))
            batch = []
    chunks.append(pa.array(batch, pa.large_string()))
    table = pa.chunked_array(chunks)
    return table, table.nbytes


def _shuffled(table: pa.ChunkedArray, seed: int) -> np.ndarray:
    """Indices in the order of a hash of (seed, index): the same for every version of every library."""
    keys = [hashlib.sha256(f"{seed} {index}".encode()).digest()[:8] for index in range(len(table))]
    return np.argsort(np.frombuffer(b"".join(keys), dtype=">u8"), kind="stable")


def _write_shard(folder: Path, index: int, columns: dict[str, pa.ChunkedArray]) -> ShardEntry:
    path = folder / shard_name(index)
    part = path.with_name(path.name + PART)
    documents = len(columns["text"])
    group = max(1, min(_GROUP_DOCUMENTS, math.ceil(documents / _GROUPS)))
    with pq.ParquetWriter(part, pa.schema([(name, pa.string()) for name in columns]), compression="zstd") as writer:
        for start in range(0, documents, group):
            rows = {name: column.slice(start, group).cast(pa.string()) for name, column in columns.items()}
            writer.write_table(pa.table(rows), row_group_size=group)
    sync_and_rename(part, path)
    return measure_shard(path)
