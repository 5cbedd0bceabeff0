"""Ranks of our programs, forked from a warm process: real processes that can be killed, without the seconds that a
launcher and imports take.

A test of a launcher starts that launcher (tests/runs/job.py, `begin`); every other test of a job starts its ranks here.
"""

import contextlib
import os
import runpy
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

from megachat import activity
from megachat.job.launch import free_port
from tests.harness import end_with_the_tests, warm_context
from tests.limits import limit_s
from tests.variables import is_of_launcher

ROOT = Path(__file__).resolve().parents[2]
STUBS = ROOT / "tests" / "runs" / "stubs"  # programs in place of others


@dataclass(frozen=True)
class Done:
    """A program that has ended."""

    status: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        """The lines of stderr that a user takes for errors."""
        return [line for line in self.err.splitlines() if line.startswith("error:")]


def environment() -> dict[str, str]:
    """Returns the variables without those of a launcher or a GPU, and with STUBS first in PATH."""
    clean = {key: value for key, value in os.environ.items() if not is_of_launcher(key)}
    path = f"{STUBS}{os.pathsep}{clean['PATH']}"
    return clean | {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "PATH": path}


class Output:
    """One stream of all ranks, read while they write."""

    def __init__(self, context):
        self.receiver, self.sender = context.Pipe(duplex=False)
        self.bytes = bytearray()
        self.reader = threading.Thread(target=self._read, daemon=True)

    def _read(self) -> None:
        with contextlib.suppress(OSError):
            while data := os.read(self.receiver.fileno(), 1 << 16):
                self.bytes += data

    def text(self) -> str:
        return bytes(self.bytes).decode(errors="replace")


class Ranks:
    """The ranks of one job, started without a launcher. One rank alone gets no launch variables, as under plain python.

    extra: more arguments for single ranks. start: the ranks to start, all by default. variables: more environment
    variables.
    """

    def __init__(
        self,
        program: list,
        world: int = 1,
        *,
        extra: dict[int, list[str]] | None = None,
        start: list[int] | None = None,
        variables: dict[str, str] | None = None,
    ):
        context = warm_context()
        self.world, port, self.processes, self.pids = world, free_port(), [], []
        self._out, self._err = Output(context), Output(context)
        for rank in range(world) if start is None else start:
            launch = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
            launch |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            launch_variables = {key: str(value) for key, value in launch.items()} if world > 1 else {}
            line = [str(part) for part in [*program, *(extra or {}).get(rank, [])]]
            process: BaseProcess = context.Process(
                target=_rank,
                args=(line, launch_variables | (variables or {}), self._out.sender, self._err.sender),
            )
            process.start()
            self.processes.append(process)
            self.pids.append(process.pid)
        for output in (self._out, self._err):
            output.sender.close()
            output.reader.start()

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *_) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()

    @property
    def out(self) -> str:
        return self._out.text()

    @property
    def err(self) -> str:
        return self._err.text()

    @property
    def printed(self) -> str:
        """Both streams."""
        return self.out + self.err

    @property
    def errors(self) -> list[str]:
        """What a user would see of the errors: a launcher ends the ranks after the first before they repeat them."""
        return [
            line for line in self.err.splitlines() if line.startswith("error:") and not line.startswith("error: [rank ")
        ]

    @property
    def alive(self) -> bool:
        return any(process.is_alive() for process in self.processes)

    def end(self) -> list[int | None]:
        """Returns the exit statuses, a signal as its negative, once all ranks have ended by themselves."""
        deadline = time.monotonic() + limit_s()
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        statuses = [process.exitcode for process in self.processes]
        assert None not in statuses, f"no end in {limit_s():.0f} s: {statuses}; they printed:\n{self.printed}"
        for output in (self._out, self._err):
            output.reader.join(limit_s(1))
        return statuses

    def done(self) -> Done:
        """Waits for the end. The status is the first one that is not 0; errors that later ranks repeat are left out."""
        status = next((status for status in self.end() if status), 0)
        err = "".join(line for line in self.err.splitlines(True) if self.world == 1 or "error: [rank " not in line)
        return Done(status, self.out, err)


def run_forked(program: list, world: int = 1, **how) -> Done:
    """Runs a program of ours on forked ranks to its end."""
    with Ranks(program, world, **how) as ranks:
        return ranks.done()


_run_process = subprocess.run


def run_without_torchrun(line: list, **how) -> subprocess.CompletedProcess:
    """Stands in for subprocess.run where a tool starts ranks by torchrun: they are forked instead."""
    if "torch.distributed.run" not in line:
        return _run_process(line, **how)
    start = line.index("torch.distributed.run")
    world, program = int(line[start + 1].removeprefix("--nproc-per-node=")), line[start + 3 :]
    done = run_forked(program, world, variables={"TORCHELASTIC_RUN_ID": "forked"})
    return subprocess.CompletedProcess(line, done.status, done.out, done.err)


def print_to(out, err) -> None:
    """Sends what this process prints to two open files, and closes these."""
    os.dup2(out.fileno(), 1)
    os.dup2(err.fileno(), 2)
    out.close()
    err.close()


def _rank(program: list[str], variables: dict[str, str], out, err) -> None:
    end_with_the_tests()
    print_to(out, err)
    os.chdir(ROOT)
    variables = environment() | variables
    os.environ.clear()
    os.environ.update(variables)
    sys.path[:0] = variables.get("PYTHONPATH", "").split(os.pathsep) if "PYTHONPATH" in variables else []
    sys.argv = program
    subprocess.run = run_without_torchrun
    activity.ANNOUNCED_AFTER_S = 3600.0  # a busy machine adds no lines
    exec(variables.get("TESTS_FIRST", ""))  # tests/runs/pause.py
    runpy.run_path(program[0], run_name="__main__")
