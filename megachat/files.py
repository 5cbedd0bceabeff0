"""Durable file writes, so that a file is there complete or not at all, and file hashes."""

import hashlib
import json
import os
from pathlib import Path

PART = ".part"  # suffix of a file that is not complete yet
_CHUNK_BYTES = 4 << 20


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file's whole content under a temporary name, forces it to disk and renames it."""
    part = path.with_name(path.name + PART)
    part.write_bytes(content)
    sync_and_rename(part, path)


def write_json(path: Path, value: object) -> None:
    """Writes a value as indented JSON, atomically."""
    write_atomically(path, json.dumps(value, indent=1).encode() + b"\n")


def sync_and_rename(part: Path, path: Path) -> None:
    """Forces a complete file to disk, then gives it its final name."""
    sync_to_disk(part)
    os.replace(part, path)


def sync_to_disk(path: Path) -> None:
    """Forces a file's content, or the names in a folder, to disk, so that they survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(path: Path) -> str:
    """Returns the SHA-256 (hex) of a file's content. Raises OSError."""
    digest, buffer = hashlib.sha256(), bytearray(_CHUNK_BYTES)
    view = memoryview(buffer)
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(view):
            digest.update(view[:count])
    return digest.hexdigest()
