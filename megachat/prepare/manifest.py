"""Preparing a data folder: it is marked unfinished first, and the manifest with the request is written last."""

import json
from dataclasses import dataclass
from pathlib import Path

import pyarrow.compute as pc

from megachat.data.shards import (
    MANIFEST,
    UNFINISHED,
    check_data_folder,
    load_manifest,
    open_shard,
    read_text_batches,
)
from megachat.errors import UserError
from megachat.files import PART, file_sha256, write_atomically, write_json


@dataclass(frozen=True)
class ShardEntry:
    """A shard in the manifest. bytes and sha256: of the file. text_bytes (UTF-8) and text_chars: of its documents."""

    name: str
    sha256: str
    bytes: int
    documents: int
    text_bytes: int
    text_chars: int


def shard_name(index: int) -> str:
    """Returns the file name of a shard. Names sort like indices."""
    return f"shard_{index:05d}.parquet"


def measure_shard(path: Path, name: str | None = None) -> ShardEntry:
    """Reads a whole shard, which also proves that it is complete. name: in the manifest. Raises UserError."""
    shard = open_shard(path)
    text_bytes = text_chars = 0
    for texts in read_text_batches(path, 1024):
        text_bytes += pc.sum(pc.binary_length(texts)).as_py() or 0
        text_chars += pc.sum(pc.utf8_length(texts)).as_py() or 0
    return ShardEntry(name or path.name, file_sha256(path), shard.size_bytes, shard.documents, text_bytes, text_chars)


def begin_preparation(folder: Path, request: dict, *, overwrite: bool, keep_shards: bool = False) -> bool:
    """Makes `folder` ready for a request. Returns False if it already holds exactly that data, undamaged.

    keep_shards: complete shards that were downloaded from the same address are reused. Raises UserError if the folder
    holds anything else and `overwrite` is False.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: give --out a folder")
    if not overwrite and folder.is_dir() and any(folder.iterdir()):
        interrupted = _unfinished_request(folder)
        if not (folder / UNFINISHED).exists() and (manifest := load_manifest(folder)) is not None:
            if manifest["request"] == request:
                check_data_folder(folder)
                return False
            _refuse(folder, manifest["request"], request)
        if interrupted != request:
            _refuse(folder, interrupted, request)
    folder.mkdir(parents=True, exist_ok=True)
    reuse = keep_shards and _has_same_origin(folder, request)
    write_atomically(folder / UNFINISHED, json.dumps(request, indent=1).encode())
    (folder / MANIFEST).unlink(missing_ok=True)
    if not reuse:
        for path in (*folder.glob("*.parquet"), *folder.glob("*" + PART)):
            path.unlink()
    return True


def _refuse(folder: Path, existing: dict | None, request: dict) -> None:
    if not existing:
        raise UserError(
            f"{folder} is not empty and was not made by this program: give another --out, "
            "or --overwrite to replace its .parquet files"
        )
    changed = [
        f"{key} is {existing.get(key)!r} there, but {request.get(key)!r} is requested"
        for key in sorted({*existing, *request})
        if existing.get(key) != request.get(key)
    ]
    raise UserError(
        f"{folder} holds another data set ({'; '.join(changed)}): give another --out, or --overwrite to replace it"
    )


def _unfinished_request(folder: Path) -> dict | None:
    try:
        return json.loads((folder / UNFINISHED).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _has_same_origin(folder: Path, request: dict) -> bool:
    """Returns whether the shards in `folder` come from the request's address, whatever their number."""
    try:
        existing = _unfinished_request(folder) or (load_manifest(folder) or {}).get("request")
    except UserError:
        return False
    return isinstance(existing, dict) and {**existing, "shards": None} == {**request, "shards": None}


def finish_preparation(folder: Path, request: dict, entries: list[ShardEntry]) -> dict:
    """Removes shards that are not in `entries`, write the manifest and returns it, and removes the unfinished mark."""
    for path in set(folder.glob("*.parquet")) - {folder / entry.name for entry in entries}:
        path.unlink()
    manifest = {
        "format": "megachat-data-1",
        "request": request,
        "source": request["source"],
        "seed": request.get("seed"),
        **({"sources": request["sources"]} if "sources" in request else {}),
        "documents": sum(entry.documents for entry in entries),
        "bytes": sum(entry.text_bytes for entry in entries),
        "chars": sum(entry.text_chars for entry in entries),
        "shards": [vars(entry) for entry in entries],
    }
    write_json(folder / MANIFEST, manifest)
    (folder / UNFINISHED).unlink()
    return manifest
