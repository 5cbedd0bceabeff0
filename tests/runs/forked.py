"""launch/pretrain.py on forked ranks: real processes that can be killed, without the seconds that a launcher and its imports take at each start."""

import multiprocessing
import os
import runpy
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path

from tests.harness import PRELOADED, end_with_the_tests
from tests.runs.job import ROOT, environment, free_port


class Ranks:
    """The ranks of one job, started without a launcher. log: what they print, both streams of all."""

    def __init__(self, program: list[str], world: int, log: Path):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        log.unlink(missing_ok=True)
        port, self.log = free_port(), log
        self.processes: list[BaseProcess] = [
            context.Process(target=_rank, args=(program, rank, world, port, str(log))) for rank in range(world)
        ]
        for process in self.processes:
            process.start()

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()
            process.join()

    @property
    def told(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    @property
    def errors(self) -> list[str]:
        """What a user would see of the errors: a launcher ends the ranks after the first before they repeat them."""
        return [
            line
            for line in self.told.splitlines()
            if line.startswith("error:") and not line.startswith("error: [rank ")
        ]

    @property
    def alive(self) -> bool:
        return any(process.is_alive() for process in self.processes)

    def end(self, timeout_s: float = 60) -> list[int | None]:
        """The exit statuses, a signal as its negative, once all have ended by themselves."""
        for process in self.processes:
            process.join(timeout_s)
        statuses = [process.exitcode for process in self.processes]
        assert None not in statuses, f"no end in {timeout_s} s: {statuses}; they had said:\n{self.told}"
        return statuses


def _rank(program: list[str], rank: int, world: int, port: int, log: str) -> None:
    end_with_the_tests()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.chdir(ROOT)
    told = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": world,
        "LOCAL_WORLD_SIZE": world,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    os.environ.clear()
    os.environ.update(environment() | {key: str(value) for key, value in told.items()})
    sys.argv = program
    runpy.run_path(program[0], run_name="__main__")
