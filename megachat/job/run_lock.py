"""One job at a time on a run folder: a lock that the kernel gives back when its holder ends, however it ends."""

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

from megachat.checkpoint.resume import checkpoints_folder
from megachat.checkpoint.save import repair_checkpoints_folder
from megachat.errors import UserError
from megachat.parallel.collectives import on_all_ranks_or_raise
from megachat.parallel.mesh import Axis

LOCK_NAME = "lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


@contextlib.contextmanager
def run_lock(folder: Path) -> Iterator[str | None]:
    """Hold the run folder, which is made when it is not there; gives a remark, where the storage knows no locks.

    Raises UserError when another job holds it, and OSError when the folder cannot be made. On NFS the lock holds
    between hosts (Linux, NFS 4).
    """
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    descriptor, remark = _locked(folder)
    try:
        os.ftruncate(descriptor, 0)
        told = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        os.pwrite(descriptor, json.dumps(told).encode() + b"\n", 0)
        yield remark
    finally:
        with contextlib.suppress(OSError):
            if made and [path.name for path in folder.iterdir()] == [LOCK_NAME]:  # nothing came of this job
                shutil.rmtree(folder)
        os.close(descriptor)  # and with it the lock


def _locked(folder: Path) -> tuple[int, str | None]:
    """(the open and locked file, a remark)."""
    path = folder / LOCK_NAME
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if path.exists() and os.stat(path).st_ino == os.fstat(descriptor).st_ino:
            return descriptor, None
        os.close(descriptor)  # removed by its holder between our open and lock
        folder.mkdir(parents=True, exist_ok=True)
        return _locked(folder)
    except BlockingIOError:
        holder = _holder(descriptor)
        os.close(descriptor)
        raise UserError(
            f"{folder} is in use by {holder}: wait until that job has ended or end it, or start another with --set run.name=NAME"
        ) from None
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return (
                descriptor,
                f"the storage of {folder} knows no locks ({error.strerror}): a second job on this run folder would not be noticed",
            )
        os.close(descriptor)
        raise


def _holder(descriptor: int) -> str:
    try:
        told = json.loads(os.pread(descriptor, 1000, 0))
        return f"another job, with rank 0 on {told['host']} (pid {told['pid']}) since {told['since']}"
    except (ValueError, KeyError, TypeError):  # it is writing just now
        return "another job"


@contextlib.contextmanager
def lock_run_folder(folder: Path, world: Axis) -> Iterator[list[str]]:
    """The run folder locked by rank 0, and tidied; gives remarks. All ranks enter together. Raises UserError on all
    when another job has it.
    """
    with contextlib.ExitStack() as stack:
        remarks = []

        def hold() -> None:
            if world.rank == 0:
                try:
                    remark = stack.enter_context(run_lock(folder))
                except OSError as error:
                    raise UserError(
                        f"the run folder {folder} cannot be made or written ({error.strerror}): set run.folder to a place that can be written"
                    ) from None
                remarks.extend([remark] if remark else [])
                repair_checkpoints_folder(checkpoints_folder(folder))

        on_all_ranks_or_raise(hold, world, lambda text: text.partition(": ")[2])
        yield remarks
