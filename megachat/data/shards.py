"""Parquet shards of text: checking a data folder, and the order in which a split's documents are visited.

A data folder holds `*.parquet` files with a string column `text`; in the order of their names the last is validation, the others are for training
(nanochat's layout, which is read as it is). A `manifest.json` beside them, where there is one, must agree with the files.
"""

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from megachat.errors import UserError
from megachat.files import file_sha256

MANIFEST = "manifest.json"
# Lies in a folder as long as its preparation has not ended, so that half a data set is never trained on.
UNFINISHED = "unfinished.json"


@dataclass(frozen=True)
class Shard:
    """One parquet file whose footer and `text` column have been checked."""

    path: Path
    size_bytes: int
    group_rows: tuple[int, ...]  # documents in each row group
    footer: str  # SHA-256 (hex) of the file's footer: sizes and extremes of the text of each row group

    @property
    def documents(self) -> int:
        return sum(self.group_rows)


@dataclass(frozen=True)
class DataSummary:
    """What a data folder holds. source: from the manifest, None without one."""

    folder: Path
    train_shards: int
    train_documents: int
    validation_documents: int
    size_bytes: int
    source: str | None
    train_fingerprint: str

    def __str__(self) -> str:
        made_from = f" from {self.source}" if self.source else ""
        return (
            f"{self.folder}: {self.train_shards} train shards with {self.train_documents:,} documents and a validation shard with "
            f"{self.validation_documents:,}, {self.size_bytes / 1e6:,.1f} MB{made_from}"
        )


def open_shard(path: Path) -> Shard:
    """Read and check one file's footer. Raises UserError naming the file: not parquet, cut short, no `text` column, not strings."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(4)
            file.seek(max(0, size - 8))
            length, tail = int.from_bytes(file.read(4), "little"), file.read(4)
        if head == b"PAR1" and (tail != b"PAR1" or size < 12):
            raise UserError(f"{path} is a parquet file cut short after {size:,} bytes: download or prepare it again")
        if head != b"PAR1":
            raise UserError(f"{path} is not a parquet file: download or prepare it again, or move it out of the folder")
        with pq.ParquetFile(path) as file:
            schema, metadata = file.schema_arrow, file.metadata
        footer = _footer_hash(path, size, length)
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"{path} cannot be read as parquet ({_first_line(error)}): download or prepare it again"
        ) from None
    if "text" not in schema.names:
        raise UserError(
            f"{path} has no `text` column (it has {', '.join(schema.names) or 'none'}): rename the column that holds the documents to `text`"
        )
    kind = schema.field("text").type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise UserError(
            f"{path} has a `text` column of {kind}, not of strings: write it again with one string for each document"
        )
    return Shard(path, size, tuple(metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)), footer)


def _footer_hash(path: Path, size: int, length: int) -> str:
    with path.open("rb") as file:
        file.seek(size - 8 - length)
        return hashlib.sha256(file.read(length)).hexdigest()


def open_shards(folder: str | Path, *, min_shards: int = 2) -> list[Shard]:
    """Every shard of a data folder in the order of names, all footers checked. Raises UserError, also for fewer than `min_shards` shards: training
    needs 2, one of them for validation, which alone needs 1."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"the data folder {folder} does not exist: make it with tools/prepare_data.py --out {folder}")
    if (folder / UNFINISHED).exists():
        raise UserError(
            f"the preparation of {folder} has not ended: run the same tools/prepare_data.py command again to finish it"
        )
    paths = sorted(folder.glob("*.parquet"))
    if not paths:
        raise UserError(
            f"the data folder {folder} holds no .parquet file: make it with tools/prepare_data.py --out {folder} --overwrite"
        )
    if len(paths) < min_shards:
        raise UserError(
            f"the data folder {folder} holds one shard only, {paths[0].name}: at least 2 are needed, because the last one is for validation"
        )
    # Footers of thousands of shards on a network disk: waiting for them one by one would take minutes.
    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(open_shard, paths))


def split_shards(shards: list[Shard], split: str) -> list[Shard]:
    """The shards of "train" (all but the last) or of "validation" (the last)."""
    return {"train": shards[:-1], "validation": shards[-1:]}[split]


def shards_fingerprint(shards: list[Shard]) -> str:
    """SHA-256 (hex) over names, sizes and numbers of documents: tells data sets apart without reading them."""
    listed = [[shard.path.name, shard.size_bytes, shard.documents] for shard in shards]
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()


def footers_digest(shards: list[Shard]) -> str:
    """SHA-256 (hex) over the footers: differs as well where shards of the same names and sizes were written again with other texts. Only a file
    changed in place below an unchanged footer escapes it; `check_data_folder` with hashes reads everything."""
    return hashlib.sha256("".join(shard.footer for shard in shards).encode()).hexdigest()


def check_data_folder(folder: str | Path, *, hashes: bool = False, min_shards: int = 2) -> DataSummary:
    """Check a data folder before a run: every footer, at least `min_shards` shards, and names and sizes (with `hashes` also SHA-256) against its manifest.

    Raises UserError naming the first file that is wrong.
    """
    folder = Path(folder)
    shards = open_shards(folder, min_shards=min_shards)
    manifest = load_manifest(folder)
    if manifest is not None:
        _compare(folder, shards, manifest, hashes)
    train, validation = split_shards(shards, "train"), split_shards(shards, "validation")
    return DataSummary(
        folder=folder,
        train_shards=len(train),
        train_documents=sum(shard.documents for shard in train),
        validation_documents=validation[0].documents,
        size_bytes=sum(shard.size_bytes for shard in shards),
        source=manifest["request"]["source"] if manifest else None,
        train_fingerprint=shards_fingerprint(train),
    )


def load_manifest(folder: Path) -> dict | None:
    """The manifest of a data folder, None where there is none. Raises UserError when it cannot be understood."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        (
            manifest["request"]["source"],
            [(entry["name"], entry["bytes"], entry["sha256"]) for entry in manifest["shards"]],
        )
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise UserError(
            f"{path} cannot be understood ({_first_line(error)}): prepare the folder again with --overwrite"
        ) from None
    return manifest


def _compare(folder: Path, shards: list[Shard], manifest: dict, hashes: bool) -> None:
    found, listed = {shard.path.name: shard for shard in shards}, {entry["name"]: entry for entry in manifest["shards"]}
    for name in sorted(found.keys() ^ listed.keys()):
        why = "lies in the folder but not in" if name in found else "is missing but listed in"
        raise UserError(f"{folder / name} {why} {MANIFEST}: prepare the folder again with --overwrite")
    for name, entry in listed.items():
        if found[name].size_bytes != entry["bytes"]:
            raise UserError(
                f"{folder / name} has {found[name].size_bytes:,} bytes but {MANIFEST} says {entry['bytes']:,}: "
                "prepare the folder again with --overwrite"
            )
        if hashes and file_sha256(folder / name) != entry["sha256"]:
            raise UserError(
                f"{folder / name} differs from the SHA-256 in {MANIFEST}: prepare the folder again with --overwrite"
            )


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


class Corpus:
    """The documents of one split in the order of each epoch.

    Without a seed the order is that of files and rows, as in nanochat. With one, each epoch visits the row groups in another order, a pure function
    of (seed, epoch, shard name, row group) that depends on no library's random numbers. `documents` counts one epoch; document n of the endless
    sequence is document n % documents of epoch n // documents.
    """

    def __init__(self, shards: list[Shard], seed: int | None = None):
        self.shards, self.seed = shards, seed
        self.documents = sum(shard.documents for shard in shards)
        if not self.documents:
            raise UserError(
                f"{shards[0].path.parent} holds no document in {', '.join(shard.path.name for shard in shards)}: add text"
            )

    def groups(self, epoch: int) -> list[tuple[int, int]]:
        """(shard, row group) in the order of an epoch (counted from 0)."""
        pairs = [(index, group) for index, shard in enumerate(self.shards) for group in range(len(shard.group_rows))]
        if self.seed is None:
            return pairs
        return sorted(
            pairs,
            key=lambda pair: hashlib.sha256(
                f"{self.seed} {epoch} {self.shards[pair[0]].path.name} {pair[1]}".encode()
            ).digest(),
        )

    def read_from(self, number: int) -> Iterator[tuple[int, pa.ChunkedArray]]:
        """Row groups without end, from the one that holds document `number` on: (number of its first document, its `text` column)."""
        epoch = number // self.documents
        while True:
            first = epoch * self.documents
            for index, group in self.groups(epoch):
                rows = self.shards[index].group_rows[group]
                if rows and first + rows > number:
                    yield first, self._read(self.shards[index].path, group)
                first += rows
            epoch += 1

    @staticmethod
    def _read(path: Path, group: int) -> pa.ChunkedArray:
        try:
            with pq.ParquetFile(path) as file:
                return file.read_row_group(group, columns=["text"]).column("text")
        except (pa.ArrowException, OSError) as error:
            raise UserError(
                f"{path} is damaged in row group {group} ({_first_line(error)}): download or prepare it again"
            ) from None
