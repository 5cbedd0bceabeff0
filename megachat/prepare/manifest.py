"""How a data folder is prepared: marked unfinished first, files under temporary names, the manifest, which remembers the request, last."""

import json
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from megachat.data.shards import MANIFEST, UNFINISHED, check_data_folder, load_manifest, open_shard
from megachat.errors import UserError
from megachat.files import PART, file_sha256, write_atomically


@dataclass(frozen=True)
class ShardEntry:
    """A shard's line in the manifest. bytes and sha256 are of the file; text_bytes (UTF-8) and text_chars of its documents."""

    name: str
    sha256: str
    bytes: int
    documents: int
    text_bytes: int
    text_chars: int


def shard_name(index: int) -> str:
    """File name of shard `index`; names sort as shards follow each other."""
    return f"shard_{index:05d}.parquet"


def measure_shard(path: Path, name: str | None = None) -> ShardEntry:
    """Read a shard from end to end, which also proves that it is whole. Raises UserError naming it as `path`."""
    shard = open_shard(path)
    text_bytes = text_chars = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024, columns=["text"]):
                text_bytes += pc.sum(pc.binary_length(batch.column("text"))).as_py() or 0
                text_chars += pc.sum(pc.utf8_length(batch.column("text"))).as_py() or 0
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is damaged ({str(error).splitlines()[0]}): download or prepare it again") from None
    return ShardEntry(name or path.name, file_sha256(path), shard.size_bytes, shard.documents, text_bytes, text_chars)


def begin_preparation(folder: Path, request: dict, *, overwrite: bool, keep_shards: bool = False) -> bool:
    """Make `folder` ready for a request; False when it already holds exactly that, intact.

    keep_shards: finished shards may stay for reuse (downloads of the same address). Raises UserError when the folder holds anything else and
    `overwrite` is off.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: give --out a folder")
    manifest = None
    if not overwrite and folder.is_dir() and not (folder / UNFINISHED).exists():
        manifest = load_manifest(folder)
        if manifest is not None and manifest["request"] == request:
            check_data_folder(folder)
            return False
    if not overwrite and folder.is_dir() and any(folder.iterdir()):
        _refuse_other(folder, request, manifest)
    folder.mkdir(parents=True, exist_ok=True)
    reusable = keep_shards and _same_origin(folder, request)
    write_atomically(folder / UNFINISHED, json.dumps(request, indent=1).encode())
    (folder / MANIFEST).unlink(missing_ok=True)
    if not reusable:
        for path in (*folder.glob("*.parquet"), *folder.glob("*" + PART)):
            path.unlink()
    return True


def _refuse_other(folder: Path, request: dict, manifest: dict | None) -> None:
    """Raise UserError unless an earlier run of the same request was interrupted in `folder`."""
    interrupted = _unfinished(folder)
    if interrupted == request:
        return
    other = interrupted or (manifest or {}).get("request")
    if other is None:
        raise UserError(
            f"{folder} is not empty and was not made by this program: give another --out, or --overwrite to replace its .parquet files"
        )
    changed = [
        f"{key} {other.get(key)!r} there, {request.get(key)!r} asked"
        for key in sorted({*other, *request})
        if other.get(key) != request.get(key)
    ]
    raise UserError(
        f"{folder} holds another data set ({'; '.join(changed)}): give another --out, or --overwrite to replace it"
    )


def _unfinished(folder: Path) -> dict | None:
    try:
        return json.loads((folder / UNFINISHED).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _same_origin(folder: Path, request: dict) -> bool:
    """Whether the shards in `folder` come from the request's address, whatever their number."""
    try:
        earlier = _unfinished(folder) or (load_manifest(folder) or {}).get("request")
    except UserError:
        return False
    return isinstance(earlier, dict) and {**earlier, "shards": None} == {**request, "shards": None}


def finish_preparation(folder: Path, request: dict, entries: list[ShardEntry]) -> dict:
    """Write the manifest and take the unfinished mark away. Shards that do not belong to `entries` are removed. Returns the manifest."""
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
    write_atomically(folder / MANIFEST, json.dumps(manifest, indent=1).encode() + b"\n")
    (folder / UNFINISHED).unlink()
    return manifest
