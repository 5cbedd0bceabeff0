"""Ranks that die, stop or hang, and launchers that are ended: the job names the cause in one sentence and leaves no
process behind.
"""

import contextlib
import os
import re
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from megachat.checkpoint.resume import newest_complete
from megachat.errors import LOST_RANK_STATUS, STALL_STATUS
from tests.limits import limit_s
from tests.runs.forked import Ranks
from tests.runs.job import ROOT, Done, Place, begin, command, finish, launched, logged, processes_of, until
from tests.runs.warm import Launcher

LONG = {
    "horizon": {"steps": 50_000},
    "evaluate": {"every": 0},
    "checkpoint": {"every": 0},
    "log": {"every": 20},
}  # ended by the test
HOST = socket.gethostname()
OUR_FRAME = re.compile(
    rf'File "{re.escape(str(ROOT))}/(megachat|launch)/'
)  # in a traceback; packages may lie in the clone too


def until_training(process: subprocess.Popen | Launcher, run: Path) -> None:
    """The first step, in which the watch is more patient, is over."""
    until(lambda: process.poll() is not None or len(logged(run)) > 1, "step 20")
    assert process.poll() is None, finish(process)


class Job:
    """A job of two ranks that trains; `end` leaves nothing of it behind, whatever the test found."""

    def __init__(self, place: Place, name: str, launcher: str, warm: bool):
        program = command(place, name, config=LONG)
        self.config, self.run = program[2], place.runs / name
        self.launcher = (Launcher if warm else begin)(launched(launcher, 2, program))
        try:
            until_training(self.launcher, self.run)
        except BaseException:
            self.end()
            raise

    def rank(self, rank: int) -> int:
        (pid,) = [pid for pid, place in processes_of(self.config).items() if place == str(rank)]
        return pid

    def done(self) -> Done:
        """The job's end, which must come by itself, to the last process."""
        try:
            self.launcher.wait(limit_s())
            until(lambda: not processes_of(self.config), "end of the ranks")
            return finish(self.launcher)
        finally:
            self.end()

    def end(self) -> None:
        for pid in processes_of(self.config):
            os.kill(pid, signal.SIGKILL)
        self.launcher.kill()


@pytest.mark.parametrize(
    "launcher, rank", [("deepspeed", 0), ("deepspeed", 1), ("torchrun", 0), ("torchrun", 1), ("mpirun", 1)]
)
def test_a_killed_rank_is_named_first_and_once(launcher, rank, place):
    job = Job(place, f"killed_{launcher}_{rank}", launcher, warm=launcher != "mpirun")
    pid = job.rank(rank)
    os.kill(pid, signal.SIGKILL)
    done = job.done()
    assert done.status != 0
    if launcher == "mpirun":  # it names the rank itself, and no longer forwards what others say
        assert f"rank {rank} with PID {pid} on node" in done.err
        return
    (error,) = done.errors
    assert error.startswith(
        f"error: rank {rank} (host {HOST}, pid {pid}) died or cannot be reached; the other ranks stop: "
    )
    assert error.endswith("continue with --resume auto")
    assert "Traceback" not in done.err.split(error)[0] and "RuntimeError" not in done.out + done.err


@pytest.mark.parametrize(
    "launcher, kill",
    [(launcher, kill) for launcher in ("deepspeed", "torchrun", "mpirun") for kill in (signal.SIGTERM, signal.SIGKILL)]
    + [("deepspeed", signal.SIGINT), ("torchrun", signal.SIGINT)],
)
def test_an_ended_launcher_leaves_no_rank_behind(launcher, kill, place):
    """Of each launcher, the one that gets SIGTERM is executed; mpirun, a program in C, always is."""
    warm = launcher != "mpirun" and kill != signal.SIGTERM
    job = Job(place, f"ended_{launcher}_{kill.name}", launcher, warm)
    assert len(processes_of(job.config)) >= 3, "two ranks and a launcher"
    if kill == signal.SIGINT:
        os.killpg(job.launcher.pid, kill)  # a terminal's Ctrl-C
    else:
        os.kill(job.launcher.pid, kill)
    done = job.done()
    assert done.status != 0 and not OUR_FRAME.search(done.err), done.err
    if launcher == "mpirun":  # its ranks speak through it
        return
    notices = [
        line for line in done.err.splitlines() if ": the job saves after this step or the next, and ends" in line
    ]
    assert len(notices) == 1 and done.errors == [], done.err
    assert re.match(
        r"(rank \d .+ was requested to stop \(SIG(TERM|INT)\)|the launcher \w+ \(pid \d+\) of rank \d .+ has ended): ",
        notices[0],
    )
    newest, passed_over = newest_complete(job.run / "checkpoints")
    assert newest is not None and passed_over == []
    assert f"stopped after step {int(newest.name[5:])}, which is saved: continue with --resume auto" in done.out


@contextlib.contextmanager
def ranks_alone(place: Place, name: str, **parallel) -> Iterator[tuple[Ranks, Path]]:
    """Two ranks without a launcher that train, whose exit statuses can be read."""
    run = place.runs / name
    with Ranks(command(place, name, config=LONG | {"parallel": parallel}), 2) as ranks:
        until(lambda: not ranks.alive or len(logged(run)) > 1, "step 20")
        yield ranks, run


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_the_other_where_nobody_launched_them(rank, place):
    """As with ranks on two hosts, whose launchers do not know of each other."""
    with ranks_alone(place, f"alone_{rank}") as (ranks, _):
        ranks.processes[rank].kill()
        assert ranks.end()[1 - rank] == LOST_RANK_STATUS, ranks.printed
    (error,) = ranks.err.splitlines()
    assert error.startswith(
        f"error: rank {rank} (host {HOST}, pid {ranks.pids[rank]}) died or cannot be reached; the other ranks stop: "
    )


@pytest.mark.parametrize("rank", [0, 1])
def test_a_stopped_rank_is_named_and_all_end(rank, place):
    """Stopped, it answers nobody; rank 0 is also the one that asks the others."""
    with ranks_alone(place, f"frozen_{rank}", stall_s=6) as (ranks, run):
        os.kill(ranks.pids[rank], signal.SIGSTOP)
        statuses = ranks.end()
    assert (statuses[1 - rank], statuses[rank]) == (STALL_STATUS, -signal.SIGKILL), ranks.printed
    errors = [line for line in ranks.err.splitlines() if line.startswith("error:")]
    table, error = (run / "stall.txt").read_text().splitlines()[1:-1], errors[0]
    assert error.startswith(
        f"error: rank {rank} (host {HOST}, pid {ranks.pids[rank]}) does not answer, stopped or stuck "
        f"in C code, while the other"
    )
    assert error in (run / "stall.txt").read_text() and len(errors) == 1
    assert (
        re.match(rf"{rank} +{HOST} +{ranks.pids[rank]} +no answer", table[1 + rank]) and " waits in " in table[2 - rank]
    )
