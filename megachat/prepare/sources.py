"""Local sources of text (text files and parquet files), and writing documents as shards."""

import hashlib
import io
import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megachat.activity import ProgressBar
from megachat.data.shards import open_shard
from megachat.data.texts import REFUSE, BadTexts, read_shard_texts
from megachat.errors import UserError, raise_if_unreadable
from megachat.files import PART, lfs_problem, path_kind, sync_and_rename
from megachat.prepare.manifest import ShardEntry, measure_shard, shard_name

_SHARD_BYTES = 100_000_000  # of text per train shard if the number of shards is not given; about nanochat's size
_MIN_SHARDS = 4
_GROUP_DOCUMENTS = 1024
_MIN_GROUPS = 8  # in a shard of a small corpus, because shuffling works on row groups
_VALIDATION_SHARE = 0.05
_WRITTEN_DOCUMENTS = 4096


def find_input_files(inputs: Iterable[str | Path], suffixes: tuple[str, ...]) -> list[Path]:
    """Returns the files in `inputs`, and all files with one of the suffixes below its folders, sorted by path.

    Links are followed; hidden files and folders are left out. Raises UserError if an input does not exist or has no
    such file, or if a part of it cannot be read.
    """
    files: dict[Path, Path] = {}  # resolved -> as given: a file that links lead to twice is read once
    for path in map(Path, inputs):
        inside = [path] if path_kind(path) == "file" else sorted(_files_below(path, suffixes))
        if not inside:
            problem = f"has no {' or '.join(suffixes)} file" if path.is_dir() else "does not exist"
            raise UserError(f"--input {path} {problem}: give a file, or a folder with such files")
        for file in inside:
            files.setdefault(file.resolve(), file)
    if not files:
        raise UserError(f"no --input was given: give the files or folders ({', '.join(suffixes)}) to read")
    return list(files.values())


def _files_below(folder: Path, suffixes: tuple[str, ...]) -> Iterator[Path]:
    """Yields the files below a folder with one of the suffixes in any case, also behind links, without hidden ones.

    Raises UserError for a folder that cannot be read and for a broken link that may lead to such files.
    """

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename} cannot be read ({error.strerror}): make it readable, or move it away")

    visited: set[Path] = set()
    for place, folders, names in os.walk(folder, followlinks=True, onerror=refuse if folder.is_dir() else None):
        if (resolved := Path(place).resolve()) in visited:  # links may form a circle
            folders.clear()
            continue
        visited.add(resolved)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for path in (Path(place) / name for name in names if not name.startswith(".")):
            if path.is_symlink() and not path.exists() and path.suffix.lower() in ("", *suffixes):
                raise UserError(f"{path} is a broken link to {path.readlink()}: restore its target, or remove the link")
            if path.suffix.lower() in suffixes and path.is_file():
                yield path


def read_text_files(files: Iterable[Path], document_bytes: int, bad_texts: BadTexts = REFUSE) -> Iterator[str]:
    """Yields the texts of UTF-8 files, cut into pieces if they are longer than `document_bytes`."""
    for path in files:
        if pointer := lfs_problem(path):
            raise UserError(f"{path} {pointer}, or leave it out")
        try:
            content = path.read_bytes()
        except OSError as error:
            raise_if_unreadable(path, error)
            raise UserError(f"{path} cannot be read ({error.strerror}): leave it out") from None
        try:
            text = io.TextIOWrapper(io.BytesIO(content), encoding="utf-8-sig").read()  # any line end becomes \n
        except UnicodeDecodeError:
            bad_texts.add(str(path), content)
            continue
        yield from cut_text(text, document_bytes)


def cut_text(text: str, document_bytes: int) -> Iterator[str]:
    """Cuts a text into pieces of at most `document_bytes` UTF-8 bytes (4 or more).

    Each piece ends at its last empty line; without one at its last line, then space, then character.
    """
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


def read_parquet_files(files: Iterable[Path], bad_texts: BadTexts = REFUSE) -> Iterator[str]:
    """Yields the documents of parquet files with a `text` column, without empty ones."""
    for path in files:
        open_shard(path)
        for texts in read_shard_texts(path, 1024, bad_texts):
            yield from texts


def write_shards(
    folder: Path,
    documents: Iterable[str],
    seed: int,
    train_shards: int | None,
    sources: list[str] | None = None,
    before_writing: Callable[[], object] = lambda: None,
) -> list[ShardEntry]:
    """Shuffles documents and writes train shards of equal counts and a validation shard with 5 % of them (at least 1).

    train_shards: None chooses by size. sources: the source of each document, filled while `documents` is read; becomes
    the column `source`. before_writing: called when all documents were read and are enough. The order depends on the
    texts and the seed only. All documents are in memory at the same time. Raises UserError if there are fewer documents
    than shards.
    """
    texts = _to_arrow(documents)
    if train_shards is None:
        train_shards = max(_MIN_SHARDS, math.ceil(texts.nbytes / _SHARD_BYTES))
        train_shards = max(1, min(train_shards, len(texts) - 1))
    if len(texts) < train_shards + 1:
        raise UserError(
            f"the input has {len(texts)} documents, too few for {train_shards} train shards and a validation shard: "
            "give more text, or a smaller --document-bytes or --shards"
        )
    order = _shuffled_order(len(texts), seed)
    validation = min(max(1, round(len(order) * _VALIDATION_SHARE)), len(order) - train_shards)
    ends = [*np.linspace(0, len(order) - validation, train_shards + 1).astype(int).tolist(), len(order)]
    columns = {"text": texts}
    if sources is not None:
        columns["source"] = pa.chunked_array([pa.array(sources, pa.string()).dictionary_encode()])
    before_writing()
    entries = []
    with ProgressBar("writing documents", len(order), "") as progress:
        for index, (start, end) in enumerate(zip(ends, ends[1:], strict=False)):
            documents_of_shard = pa.array(order[start:end])
            shard = {name: column.take(documents_of_shard) for name, column in columns.items()}
            entries.append(_write_shard(folder / shard_name(index), shard))
            progress.update(end - start)
    return entries


def _to_arrow(documents: Iterable[str]) -> pa.ChunkedArray:
    """Collects all documents in one Arrow column, which is far smaller than Python strings."""
    documents, chunks = iter(documents), []
    while batch := list(itertools.islice(documents, _WRITTEN_DOCUMENTS)):
        chunks.append(pa.array(batch, pa.large_string()))
    return pa.chunked_array(chunks, pa.large_string())


def _shuffled_order(count: int, seed: int) -> np.ndarray:
    """Returns indices sorted by a hash of (seed, index), which is the same for every version of every library."""
    keys = [hashlib.sha256(f"{seed} {index}".encode()).digest()[:8] for index in range(count)]
    return np.argsort(np.frombuffer(b"".join(keys), dtype=">u8"), kind="stable")


def _write_shard(path: Path, columns: dict[str, pa.ChunkedArray]) -> ShardEntry:
    part = path.with_name(path.name + PART)
    documents = len(columns["text"])
    group = max(1, min(_GROUP_DOCUMENTS, math.ceil(documents / _MIN_GROUPS)))
    with pq.ParquetWriter(part, pa.schema([(name, pa.string()) for name in columns]), compression="zstd") as writer:
        for start in range(0, documents, group):
            rows = {name: column.slice(start, group).cast(pa.string()) for name, column in columns.items()}
            writer.write_table(pa.table(rows), row_group_size=group)
    sync_and_rename(part, path)
    return measure_shard(path)
