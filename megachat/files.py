"""Durable file writes, so that a file is there complete or not at all; file hashes; files that cannot be read."""

import contextlib
import fcntl
import hashlib
import itertools
import json
import os
import stat
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from megachat.errors import UserError, raise_if_unreadable, summary

PART = ".part"  # suffix of a file that is not complete yet
# Names in a run folder and in a step's checkpoint that more than one module uses.
CONFIG_NAME, PLAN_NAME, METRICS_NAME = "config.json", "plan.json", "metrics.jsonl"
ENVIRONMENT_NAME, REPORT_NAME = "environment.json", "report.html"
CHECKPOINTS, EVALUATIONS, SAMPLES, TOKENIZER = "checkpoints", "evaluations", "samples", "tokenizer"
CAPSULES, SPIKES = "capsules", "spikes"
TENSORBOARD = "tensorboard"
LOADER, RANDOM, LOCK_NAME = "loader", "random", "lock"
_CHUNK_BYTES = 4 << 20
# What parsing a damaged file may raise, beside OSError.
_DAMAGE = (
    *(ValueError, LookupError, TypeError, AttributeError, ArithmeticError),
    *(RecursionError, EOFError, zipfile.BadZipFile),
)
_Content = TypeVar("_Content")
Log = Callable[[str], object]
_LFS_START = b"version https://git-lfs.github.com/spec/"


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file's whole content under a temporary name, forces it to disk and renames it."""
    part = path.with_name(path.name + PART)
    try:
        part.write_bytes(content)
        sync_and_rename(part, path)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: object) -> None:
    """Writes a value as indented JSON, atomically."""
    write_atomically(path, json.dumps(value, indent=1).encode() + b"\n")


def check_writable(out: Path, option: str = "--out") -> None:
    """Makes the folder of a file that will be written. Raises UserError, naming the option, if it cannot be written."""
    try:
        if out.is_dir():
            raise UserError(f"{option} {out} is a folder: give a file")
        out.parent.mkdir(parents=True, exist_ok=True)
        probe = out.with_name(f".{out.name}.probe")
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror}): give another file with {option}") from None


def is_locked(run_folder: Path) -> bool:
    """Returns whether a job holds the run folder. False where that cannot be seen."""
    with contextlib.suppress(OSError), open(run_folder / LOCK_NAME, "rb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def path_kind(path: Path) -> str:
    """Returns "folder", "file", or "" if nothing is there. Raises UnreadableError when the system refuses to say."""
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        raise_if_unreadable(path, error)
        return ""
    return "folder" if stat.S_ISDIR(mode) else "file"


def list_folder(path: Path) -> list[Path]:
    """Returns what is in a folder, sorted; [] if there is none. Raises UnreadableError, where Path.glob is silent."""
    try:
        return sorted(path / name for name in os.listdir(path))
    except OSError as error:
        raise_if_unreadable(path, error)
        return []


def free_name(path: Path, suffix: str) -> Path:
    """Returns the path with the suffix added, and .2, .3 and so on if that exists."""
    names = (path.name + suffix + (f".{number}" if number > 1 else "") for number in itertools.count(1))
    return next(free for name in names if not os.path.lexists(free := path.with_name(name)))


def set_aside(path: Path) -> Path:
    """Renames a file or folder to NAME.damaged, or to NAME.damaged.2 and so on if that exists; returns the new path."""
    return path.rename(free_name(path, ".damaged"))


def read_side_file(path: Path, parse: Callable[[bytes], _Content], log: Log) -> _Content | None:
    """Returns the content of a file beside a training, such as a record of its starts; None if there is none.

    A file that `parse` refuses must not end the training: it is set aside and reported in one line. Raises OSError when
    the storage fails.
    """
    try:
        return parse(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (IsADirectoryError, *_DAMAGE) as error:
        log(f"{path} is damaged ({summary(error)}): it is set aside as {set_aside(path).name} and a new one is started")
        return None


@contextlib.contextmanager
def refuse_damaged(path: Path, problem: str, *kinds: type[Exception]) -> Iterator[None]:
    """Raises what reading and parsing a file raises as UserError: "PATH PROBLEM", with the error in place of {}.

    kinds: further exceptions of the library that reads. A Git LFS pointer is called one. What the system refuses to
    read is an UnreadableError.
    """
    damage: tuple[type[Exception], ...] = (OSError, *_DAMAGE, *kinds)
    try:
        yield
    except damage as error:
        raise_if_unreadable(path, error)
        raise UserError(f"{path} {lfs_problem(path) or problem.format(summary(error))}") from None


def write_side_json(path: Path, value: object, log: Log) -> None:
    """Writes a JSON file beside a training. What cannot be read in its place, or in its folder's, is set aside."""
    if path.parent.exists() and not path.parent.is_dir():
        log(f"{path.parent} is not a folder: it is set aside as {set_aside(path.parent).name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    read_side_file(path, json.loads, log)
    write_atomically(path, json.dumps(value, indent=1, ensure_ascii=False).encode() + b"\n")


def readable_metrics(run_folder: Path, containing: str = "") -> Iterator[dict]:
    """Yields the lines of a run's metrics.jsonl that can be read, in order; none if the file cannot be read.

    containing: text without which a line is passed over unread.
    """
    with contextlib.suppress(OSError), (run_folder / METRICS_NAME).open(encoding="utf-8", errors="replace") as file:
        for line in file:
            if containing in line:
                with contextlib.suppress(ValueError, TypeError, RecursionError):
                    yield dict(json.loads(line))


def is_readable_json(path: Path) -> bool:
    """Returns whether there is a JSON file."""
    try:
        json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return True


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


def lfs_problem(file: Path | bytes) -> str | None:
    """Returns a phrase if a file, or its content, is a Git LFS pointer, which stands in for a file that was not
    fetched."""
    start = file if isinstance(file, bytes) else b""
    if isinstance(file, Path):
        with contextlib.suppress(OSError), open(file, "rb") as opened:
            start = opened.read(len(_LFS_START))
    if not start.startswith(_LFS_START):
        return None
    return "is a Git LFS pointer, not the file itself: run `git lfs pull` where it comes from, and copy it again"


def file_sha256(path: Path) -> str:
    """Returns the SHA-256 (hex) of a file's content. Raises OSError."""
    digest, buffer = hashlib.sha256(), bytearray(_CHUNK_BYTES)
    view = memoryview(buffer)
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(view):
            digest.update(view[:count])
    return digest.hexdigest()
