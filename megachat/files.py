"""Files that are there whole or not at all: written under a temporary name, forced to disk, renamed."""

import os
from pathlib import Path

PART = ".part"  # suffix of a file that is being written


def write_whole(path: Path, content: bytes) -> None:
    """Write a file's whole content."""
    part = path.with_name(path.name + PART)
    part.write_bytes(content)
    keep(part, path)


def keep(part: Path, path: Path) -> None:
    """Give a file that is complete its name."""
    with part.open("rb+") as file:
        os.fsync(file.fileno())
    os.replace(part, path)
