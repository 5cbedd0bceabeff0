"""Preparing a data folder: it is marked unfinished first, and the manifest with the request is written last."""

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import pyarrow as pa
import pyarrow.compute as pc

from megachat.data.shards import MANIFEST, UNFINISHED_FILE, check_data_folder, load_manifest, open_shard, shard_paths
from megachat.data.texts import read_batches
from megachat.errors import UserError
from megachat.files import PART, file_sha256, write_atomically, write_json
from megachat.text import shortened


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
    for _, _, batch in read_batches(path, 1024):
        texts = batch.column("text").cast(pa.large_string())
        text_bytes += pc.sum(pc.binary_length(texts)).as_py() or 0
        text_chars += pc.sum(pc.utf8_length(texts)).as_py() or 0
    return ShardEntry(name or path.name, file_sha256(path), shard.size_bytes, shard.documents, text_bytes, text_chars)


def is_prepared(folder: Path, request: dict, *, overwrite: bool, names: Collection[str] = ()) -> bool:
    """Returns whether `folder` already holds exactly the requested data, undamaged. Nothing is written.

    names: of the shards that a download needs. Raises UserError if the folder holds anything else and `overwrite` is
    False. What an interrupted call left is no obstacle, except complete downloaded shards that the request does not
    use.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: give --out a folder")
    if overwrite or not folder.is_dir() or not any(folder.iterdir()):
        return False
    interrupted = _unfinished_request(folder)
    if interrupted is None:
        manifest = None if (folder / UNFINISHED_FILE).exists() else load_manifest(folder)
        # a manifest of an earlier version has no hash of its input
        before = manifest and {key: request[key] for key in ("input_sha256",) if key in request} | manifest["request"]
        if before != request:
            _refuse(folder, before, request)
        check_data_folder(folder)
        return True
    if "base_url" in interrupted:
        used = set(names) if _has_same_origin(folder, request) else set()
        if unused := [path.name for path in shard_paths(folder) if path.name not in used]:
            raise UserError(
                f"{folder} holds an unfinished download with complete shards that this call would remove "
                f"({shortened(unused)}): give another --out, or --overwrite to replace them"
            )
    return False


def begin_preparation(folder: Path, request: dict, *, keep_shards: bool = False) -> None:
    """Marks `folder` as unfinished and removes its shards and manifest.

    keep_shards: complete shards that were downloaded from the same address are kept.
    """
    folder.mkdir(parents=True, exist_ok=True)
    reuse = keep_shards and _has_same_origin(folder, request)
    write_atomically(folder / UNFINISHED_FILE, json.dumps(request, indent=1).encode())
    (folder / MANIFEST).unlink(missing_ok=True)
    if not reuse:
        for path in (*shard_paths(folder), *folder.glob("*" + PART)):
            path.unlink()


def _refuse(folder: Path, existing: dict | None, request: dict) -> NoReturn:
    if not existing:
        raise UserError(
            f"{folder} is not empty and was not made by this program: give another --out, "
            "or --overwrite to replace its .parquet files"
        )
    changed = [
        f"{key} is {_short_repr(existing.get(key))} there, but {_short_repr(request.get(key))} is requested"
        for key in sorted({*existing, *request})
        if existing.get(key) != request.get(key)
    ]
    raise UserError(
        f"{folder} holds another data set ({'; '.join(changed)}): give another --out, or --overwrite to replace it"
    )


def _short_repr(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text):,} characters)"


def _unfinished_request(folder: Path) -> dict | None:
    try:
        return json.loads((folder / UNFINISHED_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _has_same_origin(folder: Path, request: dict) -> bool:
    """Returns whether the shards in `folder` come from the request's address, whatever their number."""
    try:
        existing = _unfinished_request(folder) or (load_manifest(folder) or {}).get("request")
    except UserError:
        return False
    return isinstance(existing, dict) and {**existing, "shards": None} == {**request, "shards": None}


def finish_preparation(folder: Path, request: dict, entries: list[ShardEntry], skipped_texts: int = 0) -> dict:
    """Removes shards that are not in `entries`, writes the manifest and returns it, and removes the unfinished mark.

    skipped_texts: texts of the input that were left out because they are not UTF-8.
    """
    for path in set(shard_paths(folder)) - {folder / entry.name for entry in entries}:
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
        **({"skipped_texts": skipped_texts} if skipped_texts else {}),
        "shards": [vars(entry) for entry in entries],
    }
    write_json(folder / MANIFEST, manifest)
    (folder / UNFINISHED_FILE).unlink()
    return manifest
