"""A conversion from beginning to end: written under a temporary name, read back, proved, renamed; or nothing is left."""

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from safetensors import SafetensorError

from megachat.convert.opened import Opened
from megachat.errors import UserError
from megachat.files import sync_to_disk, write_atomically


def certificate_path(target: Path) -> Path:
    """Beside the output."""
    return target.with_name(f"{target.name}.certificate.json")


def refuse_existing(target: Path) -> None:
    """Raise UserError when the target is there."""
    if target.exists() or target.is_symlink():
        raise UserError(f"{target} exists: give another name, or remove it")


@contextlib.contextmanager
def writing(path: Path):
    """What torch and safetensors raise when a file cannot be written, as OSError."""
    try:
        yield
    except (RuntimeError, SafetensorError) as error:
        raise OSError(errno.EIO, f"{path.name}: {str(error).splitlines()[0]}") from error


def _check_space(target: Path, needed_bytes: int) -> None:
    there = next(parent for parent in target.absolute().parents if parent.exists())
    free = shutil.disk_usage(there).free
    if free < needed_bytes:
        raise UserError(
            f"{target} takes {needed_bytes / 1e6:,.1f} MB and {there} has {free / 1e6:,.1f} MB free: free space there or choose another place"
        )


def convert(kind: str, source: Opened, target: Path, make: Callable[[Path], tuple[dict, str | None]]) -> dict:
    """Make the folder `target` of the source; returns its certificate, which is beside it.

    make: fills the folder it is given, reads it back, and returns what `proof.prove` says of it.
    Raises UserError when the target exists, cannot be written, or when the check fails; then there is no trace of it.
    """
    refuse_existing(target)
    _check_space(target, sum(entry.bytes for entry in source.entries.values()))
    made = [parent for parent in target.absolute().parents if not parent.exists()]
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    done = False
    try:
        temporary.mkdir(parents=True)
        told, problem = make(temporary)
        if problem:
            raise UserError(f"{target} was not written, because what was read back is not the source: {problem}")
        told["target"]["folder"] = told["target"]["folder"].replace(str(temporary), str(target))
        told = {"conversion": kind, **told}
        _sync(temporary)
        write_atomically(certificate_path(target), (json.dumps(told, indent=1) + "\n").encode())
        temporary.rename(target)
        done = True
    except OSError as error:
        raise UserError(
            f"{target} could not be written ({error.strerror or error}): free space there or choose another place"
        ) from error
    finally:
        if not done:
            shutil.rmtree(temporary, ignore_errors=True)
            certificate_path(target).unlink(missing_ok=True)
            for parent in made:
                if parent.is_dir() and not any(parent.iterdir()):
                    parent.rmdir()
    return told


def _sync(folder: Path) -> None:
    """Force the files and folders to disk, so that the rename is last."""
    for path in sorted(folder.rglob("*"), reverse=True):
        sync_to_disk(path)
    sync_to_disk(folder)


def adjusted(opened: Opened, names: list[str], change: Callable | None = None, facts: dict | None = None) -> Opened:
    """The checkpoint with the named tensors only, each as `change(name, tensor)` makes it, of the same shape and dtype; with other facts if given."""

    def read(wanted: list[str]) -> dict:
        return {name: change(name, tensor) if change else tensor for name, tensor in opened.read(wanted).items()}

    entries = {name: opened.entries[name] for name in names}
    return replace(opened, facts=opened.facts if facts is None else facts, entries=entries, read=read)
