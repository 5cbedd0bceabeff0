"""One job at a time on a run folder: a lock that the kernel releases when its holder ends, however it ends."""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from megachat.checkpoint.save import repair_checkpoints_folder
from megachat.errors import UserError
from megachat.files import CHECKPOINTS, LOCK_NAME, set_aside
from megachat.parallel.collectives import on_all_ranks_or_raise
from megachat.parallel.mesh import Axis

_LOOK_S = 0.5  # a program that looks whether the folder is locked holds the lock for a moment
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


@contextlib.contextmanager
def run_lock(folder: Path) -> Iterator[str | None]:
    """Creates the run folder if needed and locks it; yields a remark where the storage does not support locks.

    Raises UserError when another job holds it, OSError when the folder cannot be created. On NFS the lock also holds
    between hosts (Linux, NFS 4).
    """
    created = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    descriptor, remark = _open_locked(folder)
    try:
        os.ftruncate(descriptor, 0)
        holder = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        os.pwrite(descriptor, json.dumps(holder).encode() + b"\n", 0)
        yield remark
    finally:
        with contextlib.suppress(OSError):
            if created and [path.name for path in folder.iterdir()] == [LOCK_NAME]:  # this job wrote nothing
                shutil.rmtree(folder)
        os.close(descriptor)  # releases the lock


def _open_locked(folder: Path) -> tuple[int, str | None]:
    """Returns the open and locked file, and a remark."""
    path = folder / LOCK_NAME
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except IsADirectoryError:
        aside = set_aside(path)
        return _open_locked(folder)[0], f"{path} is a folder: it is set aside as {aside.name}"
    try:
        _lock(descriptor)
        if path.exists() and os.stat(path).st_ino == os.fstat(descriptor).st_ino:
            return descriptor, None
        os.close(descriptor)  # its holder removed it between our open and lock
        folder.mkdir(parents=True, exist_ok=True)
        return _open_locked(folder)
    except BlockingIOError:
        holder = _describe_holder(descriptor)
        os.close(descriptor)
        raise UserError(
            f"{folder} is in use by {holder}: wait until that job has ended or end it, "
            "or start another with --set run.name=NAME"
        ) from None
    except OSError as error:
        if error.errno in _NO_LOCKS:
            why = f"the storage of {folder} does not support locks ({error.strerror})"
            return descriptor, f"{why}: a second job on this run folder would not be noticed"
        os.close(descriptor)
        raise


def _lock(descriptor: int) -> None:
    """Takes the lock. Raises BlockingIOError when another job holds it."""
    deadline = time.monotonic() + _LOOK_S
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def _describe_holder(descriptor: int) -> str:
    try:
        holder = json.loads(os.pread(descriptor, 1000, 0))
        return f"another job, with rank 0 on {holder['host']} (pid {holder['pid']}) since {holder['since']}"
    except (ValueError, KeyError, TypeError):  # it is being written at this moment
        return "another job"


@contextlib.contextmanager
def lock_run_folder(folder: Path, world: Axis) -> Iterator[list[str]]:
    """Locks the run folder on rank 0 and repairs its checkpoints folder; yields remarks. All ranks enter together.

    Raises UserError on all ranks when another job holds it.
    """
    with contextlib.ExitStack() as stack:
        remarks = []

        def lock() -> None:
            if world.rank == 0:
                try:
                    remark = stack.enter_context(run_lock(folder))
                except OSError as error:
                    raise UserError(
                        f"the run folder {folder} cannot be created or written ({error.strerror}): "
                        "set run.folder to a writable path"
                    ) from None
                remarks.extend([remark] if remark else [])
                repair_checkpoints_folder(folder / CHECKPOINTS)

        on_all_ranks_or_raise(lock, world)
        yield remarks
