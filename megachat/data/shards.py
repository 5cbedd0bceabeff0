"""Parquet shards of text: checking a data folder, reading texts, and the order in which the documents are visited.

A data folder has `*.parquet` files with a string column `text`; the suffix may be in upper case, and hidden files are
not read. Sorted by name, the last file is the validation split and the others are the train split, as in nanochat,
whose folders can be used as they are. If there is a manifest.json, the files must agree with it.
"""

import hashlib
import itertools
import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from megachat.data.texts import REFUSE, BadTexts, decode_texts, holds_strings, read_batches, row_location
from megachat.errors import UserError
from megachat.files import file_sha256, lfs_problem, list_folder, path_kind, refuse_damaged
from megachat.text import neighbor_ranges, shortened

MANIFEST = "manifest.json"
# Marks a folder whose preparation was interrupted, so that nothing trains on half of it.
UNFINISHED_FILE = "unfinished.json"
_OPEN_THREADS = 16
_LISTED = 6  # missing shards that are listed one by one
_CHECKED_BYTES = 1 << 28  # of a validation shard's text, which are read before training: less than a second


@dataclass(frozen=True)
class Shard:
    """One parquet file with a checked footer and `text` column."""

    path: Path
    size_bytes: int
    group_rows: tuple[int, ...]  # documents in each row group
    footer: str  # SHA-256 (hex) of the file's footer, which has sizes and extremes of the texts in each row group

    @property
    def documents(self) -> int:
        return sum(self.group_rows)


@dataclass(frozen=True)
class DataSummary:
    """The content of a data folder. source: from the manifest, None if there is no manifest."""

    folder: Path
    train_shards: int
    train_documents: int
    validation_documents: int
    size_bytes: int
    source: str | None
    train_fingerprint: str

    def __str__(self) -> str:
        source = f" from {self.source}" if self.source else ""
        return (
            f"{self.folder}: {self.train_shards} train shards with {self.train_documents:,} documents and "
            f"a validation shard with {self.validation_documents:,}, {self.size_bytes / 1e6:,.1f} MB{source}"
        )


def open_shard(path: Path) -> Shard:
    """Reads and checks one file's footer. Raises UserError, with the path, if the file is damaged or has no texts."""
    if path.is_symlink() and not path.exists():
        raise UserError(f"{path} is a broken link to {path.readlink()}: restore that file, or remove the link")
    if path.is_dir():
        raise UserError(f"{path} is a folder, not a parquet file: move its files up, or rename it")
    with refuse_damaged(path, "cannot be read as parquet ({}): download or prepare it again", pa.ArrowException):
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(4)
            file.seek(max(0, size - 8))
            footer_size, tail = int.from_bytes(file.read(4), "little"), file.read(4)
            if head != b"PAR1":
                problem = lfs_problem(path) or "is not a parquet file: download or prepare it again, or remove it"
                raise UserError(f"{path} {problem}")
            if tail != b"PAR1" or size < 12:
                raise UserError(f"{path} is truncated after {size:,} bytes: download or prepare it again")
            file.seek(size - 8 - footer_size)
            footer = hashlib.sha256(file.read(footer_size)).hexdigest()
        with pq.ParquetFile(path) as file:
            schema, metadata = file.schema_arrow, file.metadata
    if "text" not in schema.names:
        raise UserError(
            f"{path} has no `text` column (it has {shortened(schema.names) or 'none'}): "
            "rename the column with the documents to `text`"
        )
    if schema.names.count("text") > 1:
        raise UserError(f"{path} has {schema.names.count('text')} columns named `text`: keep one and rename the others")
    kind = schema.field("text").type
    if not holds_strings(kind):
        fix = "cast it to string" if "binary" in str(kind) else "write it again with one string per document"
        raise UserError(f"{path} has a `text` column of {kind}: {fix}")
    return Shard(path, size, tuple(metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)), footer)


def shard_paths(folder: Path) -> list[Path]:
    """Returns the paths of a folder that are named like a shard, sorted by name, without hidden ones."""
    return [path for path in list_folder(folder) if path.suffix.lower() == ".parquet" and not path.name.startswith(".")]


def open_shards(folder: str | Path, *, min_shards: int = 2) -> list[Shard]:
    """Opens and checks every shard of a data folder, sorted by name.

    min_shards: training needs 2, one of them for validation; an evaluation needs 1. Raises UserError.
    """
    folder = Path(folder)
    if path_kind(folder) != "folder":
        raise UserError(
            f"the data folder {folder} does not exist: create it with `megachat data --source KIND --out {folder}`"
        )
    if path_kind(folder / UNFINISHED_FILE):
        raise UserError(f"the preparation of {folder} has not finished: run the same `megachat data` command again")
    paths = shard_paths(folder)
    if not paths:
        raise UserError(
            f"the data folder {folder} has no .parquet file: "
            f"create it with `megachat data --source KIND --out {folder} --overwrite`"
        )
    if len(paths) < min_shards:
        raise UserError(
            f"the data folder {folder} has only one shard, {paths[0].name}: "
            "at least 2 are needed, because the last one is for validation"
        )
    # In parallel: opening thousands of shards on a network disk one by one takes minutes.
    with ThreadPoolExecutor(_OPEN_THREADS) as pool:
        return list(pool.map(open_shard, paths))


def split_shards(shards: list[Shard], split: str) -> list[Shard]:
    """Returns the shards of "train" (all but the last) or "validation" (the last)."""
    return {"train": shards[:-1], "validation": shards[-1:]}[split]


def shard_range(shards: list[Shard], first: int, last: int) -> list[Shard]:
    """Returns the train shards with the numbers `first` to `last`, by the digits at the end of their names.

    shards: all of a data folder. Raises UserError if one of them is missing, is there twice, or is for validation.
    """
    folder, numbered = shards[0].path.parent, dict[int, Shard]()
    for shard in shards:
        if not (digits := re.search(r"[0-9]+$", shard.path.stem)):
            continue
        other = numbered.setdefault(int(digits[0]), shard)
        if other is not shard and first <= int(digits[0]) <= last:
            raise UserError(f"{folder} has two shards {digits[0]}, {other.path.name} and {shard.path.name}: remove one")
    absent = (str(number) for number in range(first, last + 1) if number not in numbered)
    if missing := list(itertools.islice(absent, _LISTED)):
        listed = ", ".join(missing) + ", ..." * (len(missing) == _LISTED)
        raise UserError(
            f"{folder} lacks shard{'s' * (len(missing) > 1)} {listed} of {first}-{last}: {_train_numbers(shards)}; "
            "download what is missing, or give another range"
        )
    chosen = [numbered[number] for number in range(first, last + 1)]
    if shards[-1] in chosen:
        raise UserError(
            f"{shards[-1].path} is the last shard of its folder, which is for validation: {_train_numbers(shards)}; "
            "give a range of these, or add shards"
        )
    return chosen


def _train_numbers(shards: list[Shard]) -> str:
    """Returns which train shards a range may have: "its train shards are 0 to 3, 7 (8 is for validation)"."""
    names = [re.search(r"[0-9]+$", shard.path.stem) for shard in shards]
    numbers = sorted(int(name[0]) for name in names[:-1] if name)
    if not numbers:
        return "no name of its train shards ends with a number"
    runs = [" to ".join(map(str, dict.fromkeys(run))) for run in neighbor_ranges(numbers)]
    listed = ", ".join(runs[:_LISTED]) + ", ..." * (len(runs) > _LISTED)
    validation = f" ({int(names[-1][0])} is for validation)" if names[-1] else ""
    return f"its train shards are {listed}{validation}"


def shards_fingerprint(shards: list[Shard]) -> str:
    """Returns a SHA-256 (hex) over names, sizes and document counts, which distinguishes data sets without reading."""
    listed = [[shard.path.name, shard.size_bytes, shard.documents] for shard in shards]
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()


def footers_digest(shards: list[Shard]) -> str:
    """Returns a SHA-256 (hex) over the footers.

    Unlike the fingerprint, it also differs when shards of the same names and sizes were written with other texts. It
    misses only a file that was changed in place under an unchanged footer; `check_data_folder` with hashes finds that.
    """
    return hashlib.sha256("".join(shard.footer for shard in shards).encode()).hexdigest()


def check_data_folder(
    folder: str | Path,
    *,
    hashes: bool = False,
    min_shards: int = 2,
    validation_streams: int = 0,
    bad_texts: BadTexts = REFUSE,
) -> DataSummary:
    """Checks a data folder before a run: all footers, and names and sizes against the manifest.

    hashes: compare the SHA-256 of each file as well, which reads everything. validation_streams: the packing streams
    for which the validation shard must have text. bad_texts: what happens to texts in it that are not UTF-8. Raises
    UserError with the first bad file.
    """
    folder = Path(folder)
    shards = open_shards(folder, min_shards=min_shards)
    manifest = load_manifest(folder)
    if manifest is not None:
        _check_against_manifest(folder, shards, manifest, hashes)
    train, validation = split_shards(shards, "train"), split_shards(shards, "validation")
    if validation_streams:
        _check_validation_texts(validation[0], validation_streams, bad_texts)
    return DataSummary(
        folder=folder,
        train_shards=len(train),
        train_documents=sum(shard.documents for shard in train),
        validation_documents=validation[0].documents,
        size_bytes=sum(shard.size_bytes for shard in shards),
        source=manifest["request"]["source"] if manifest else None,
        train_fingerprint=shards_fingerprint(train),
    )


def _check_validation_texts(shard: Shard, streams: int, bad_texts: BadTexts) -> None:
    """Raises UserError unless each packing stream has a text, or if the start of the shard has a text that is refused.

    Without this check, a run would train until its first validation and fail there.
    """
    if not shard.documents:
        raise UserError(f"the validation shard {shard.path} has no document: put text in the last shard")
    if shard.documents < streams:
        raise UserError(
            f"the validation shard of {shard.path.parent} has {shard.documents} documents, fewer than "
            f"{streams} packing streams: set data.streams to {max(1, shard.documents)} or "
            "fewer, or put more text in the last shard"
        )
    missing, number, checked_bytes = set(range(streams)), 0, 0
    for group, first, batch in read_batches(shard.path, 1024):
        for row, text in enumerate(decode_texts(batch.column("text")), first):
            if isinstance(text, str) and text:
                missing.discard(number % streams)
            elif isinstance(text, bytes) and bad_texts.policy == "refuse":
                bad_texts.add(row_location(shard.path, group, row), text)
            number += 1
        checked_bytes += batch.nbytes
        if not missing and (bad_texts.policy == "skip" or checked_bytes > _CHECKED_BYTES):
            return
    if missing:
        which = f"for {len(missing)} of {streams} packing streams" if len(missing) < streams else "at all"
        kinds = "null or empty" if bad_texts.policy == "refuse" else "null, empty or skipped"
        raise UserError(
            f"the validation shard {shard.path} has no text {which}, only {kinds} documents: put more text in the last "
            "shard, or prepare the data again"
        )


def load_manifest(folder: Path) -> dict | None:
    """Reads the manifest of a data folder, None if there is none. Raises UserError if it is not valid."""
    path = folder / MANIFEST
    if not path_kind(path):
        return None
    with refuse_damaged(path, "is not a valid manifest ({}): prepare the folder again with --overwrite"):
        manifest = json.loads(path.read_text(encoding="utf-8"))
        _ = manifest["request"]["source"], [(e["name"], e["bytes"], e["sha256"]) for e in manifest["shards"]]
    return manifest


def shard_hashes(folder: Path) -> dict:
    """Returns what a record of a run has of its data: the source, and each shard's name -> SHA-256 by the manifest.

    SHA-256: None without a manifest. The last shard is for validation. Nothing is read but the manifest.
    """
    manifest = load_manifest(folder)
    hashes = {entry["name"]: entry["sha256"] for entry in manifest["shards"]} if manifest else {}
    return {
        "folder": str(folder),
        "source": manifest["request"]["source"] if manifest else None,
        "shards": {path.name: hashes.get(path.name) for path in shard_paths(folder)},
    }


def _check_against_manifest(folder: Path, shards: list[Shard], manifest: dict, hashes: bool) -> None:
    sizes = {shard.path.name: shard.size_bytes for shard in shards}
    listed = {entry["name"]: entry for entry in manifest["shards"]}
    for name in sorted(sizes.keys() | listed.keys()):
        if name not in listed:
            problem = f"is in the folder but not in {MANIFEST}"
        elif name not in sizes:
            problem = f"is missing but listed in {MANIFEST}"
        elif sizes[name] != listed[name]["bytes"]:
            problem = f"has {sizes[name]:,} bytes but {MANIFEST} has {listed[name]['bytes']:,}"
        elif hashes and file_sha256(folder / name) != listed[name]["sha256"]:
            problem = f"does not match its SHA-256 in {MANIFEST}"
        else:
            continue
        raise UserError(f"{folder / name} {problem}: prepare the folder again with --overwrite")


class Corpus:
    """The documents of one split in the order of each epoch.

    Without a seed the order is that of files and rows, as in nanochat. With a seed, each epoch visits the row groups in
    another order, which depends on (seed, epoch, shard name, row group) only and on no library's random numbers.
    `documents` counts one epoch. Document n of the endless sequence is document n % documents of epoch n // documents.
    """

    def __init__(self, shards: list[Shard], seed: int | None = None):
        self.shards, self.seed = shards, seed
        self.documents = sum(shard.documents for shard in shards)
        if not self.documents:
            names = shortened(shard.path.name for shard in shards)
            raise UserError(f"{shards[0].path.parent} has no document in {names}: add text")

    def groups(self, epoch: int) -> list[tuple[int, int]]:
        """Returns (shard, row group) pairs in the order of an epoch (counted from 0)."""

        def key(pair: tuple[int, int]) -> bytes:
            return hashlib.sha256(f"{self.seed} {epoch} {self.shards[pair[0]].path.name} {pair[1]}".encode()).digest()

        pairs = [(index, group) for index, shard in enumerate(self.shards) for group in range(len(shard.group_rows))]
        return pairs if self.seed is None else sorted(pairs, key=key)

    def read_from(self, number: int) -> Iterator[tuple[int, pa.ChunkedArray]]:
        """Reads row groups without end, from the one with document `number`: (number of the first document, texts)."""
        epoch = number // self.documents
        while True:
            first = epoch * self.documents
            for index, group in self.groups(epoch):
                rows = self.shards[index].group_rows[group]
                if rows and first + rows > number:
                    yield first, self._read_group(self.shards[index].path, group)
                first += rows
            epoch += 1

    def location(self, number: int) -> str:
        """Returns file, row group and row of a document, for messages."""
        epoch, row = divmod(number, self.documents)
        for index, group in self.groups(epoch):
            rows = self.shards[index].group_rows[group]
            if row < rows:
                return row_location(self.shards[index].path, group, row)
            row -= rows
        raise AssertionError("the groups hold all documents")

    @staticmethod
    def _read_group(path: Path, group: int) -> pa.ChunkedArray:
        problem = f"is damaged in row group {group} ({{}}): download or prepare it again"
        with refuse_damaged(path, problem, pa.ArrowException), pq.ParquetFile(path) as file:
            # large_string: Arrow cannot take rows from every type of string
            return file.read_row_group(group, columns=["text"]).column("text").cast(pa.large_string())
