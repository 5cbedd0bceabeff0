"""Parts of the failure monitor: rank addresses, launchers above a process, code lines of a thread."""

import contextlib
import os
import signal
import socket
import sys
import sysconfig
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import psutil  # a dependency of DeepSpeed

from megachat.installation import PACKAGE

_LIBRARIES = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")} | {"<"})
_COLLECTIVES = str(PACKAGE / "parallel" / "collectives.py")  # every wait is there, so its caller says more
_LAUNCHER_PROGRAMS = frozenset(
    "deepspeed deepspeed.launcher.launch deepspeed.launcher.runner torchrun torch.distributed.run supervise.py "
    "supervise mpirun mpiexec prterun prted orted".split()
)


class RankAddress(NamedTuple):
    """Where a rank runs. machine: equal for ranks that see each other's process ids."""

    rank: int
    host: str
    pid: int
    machine: str

    def __str__(self) -> str:
        return f"rank {self.rank} (host {self.host}, pid {self.pid})"


def local_address(toward: str) -> str | None:
    """Returns this host's address on the route to the host `toward`, None without a route; nothing is sent."""
    with contextlib.suppress(OSError):
        family, kind, protocol, _, target = socket.getaddrinfo(toward, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(target)
            return probe.getsockname()[0]
    return None


def machine_id() -> str:
    """Returns a string that is equal for two processes if they see each other's process ids."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    return " ".join(parts)


def launchers_above() -> list[tuple[int, str]]:
    """Returns (pid, name) of the launchers among this process's ancestors, the nearest first."""
    launchers = []
    with contextlib.suppress(psutil.Error):
        for process in psutil.Process().parents():
            names = [Path(word).name for word in process.cmdline()[:5]]
            launchers += [(process.pid, name) for name in names if name in _LAUNCHER_PROGRAMS][:1]
    return launchers


def handled_signals(numbers: Iterable[signal.Signals]) -> list[signal.Signals]:
    """Returns the signals without those that the process inherited as ignored: SIGHUP under nohup, SIGINT under `&`."""
    inherited = {number for number in (signal.SIGHUP, signal.SIGINT) if signal.getsignal(number) is signal.SIG_IGN}
    return [number for number in numbers if number not in inherited]


def code_lines(thread: int | None) -> tuple[str, str]:
    """Returns a thread's innermost line in megachat or the user's code, and its innermost line.

    They look like "data/loader.py:88 __next__".
    """
    frame, innermost = sys._current_frames().get(thread or 0), ""
    while frame:
        file = frame.f_code.co_filename
        line = f"{_short_path(file)}:{frame.f_lineno} {frame.f_code.co_name}"
        innermost = innermost or line
        if file != _COLLECTIVES and (file.startswith(str(PACKAGE)) or not file.startswith(_LIBRARIES)):
            return line, innermost
        frame = frame.f_back
    return innermost or "unknown", innermost or "unknown"


def _short_path(file: str) -> str:
    for root in (str(PACKAGE), os.getcwd(), *_LIBRARIES):
        if root != "<" and file.startswith(root + os.sep):
            return file[len(root) + 1 :]
    return file


def write_stderr(text: str) -> None:
    """Writes to stderr past Python's buffers, whose locks a hanging thread may hold."""
    with contextlib.suppress(OSError):
        os.write(2, text.encode(errors="backslashreplace") + b"\n")


def end_process(status: int) -> None:
    """Ends now, whatever the other threads do. What Python has buffered is written first if that is quick."""

    def flush():
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()

    flusher = threading.Thread(target=flush, daemon=True)
    flusher.start()
    flusher.join(1.0)
    os._exit(status)


def kill_process(pid: int) -> None:
    """Kills a process of this job that cannot end itself."""
    with contextlib.suppress(OSError):
        os.kill(pid, signal.SIGKILL)


def is_alive(pid: int) -> bool:
    """Returns whether a process of this machine runs (a zombie does not)."""
    with contextlib.suppress(psutil.Error):
        return psutil.Process(pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    return False
