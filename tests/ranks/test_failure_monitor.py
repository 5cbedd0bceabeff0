"""The failure monitor over gloo processes: it names the rank that holds up the others and tolerates slow work."""

import functools
import os
import re
import signal
import time
from pathlib import Path

import pytest
import torch

from megachat.job.failure_monitor import FailureMonitor
from megachat.parallel.collectives import all_gather_objects, all_reduce, barrier
from megachat.parallel.mesh import build_mesh
from tests.harness import RankError, run_ranks
from tests.limits import calls_of

STALL_S = 2
CHILD_S = 20


def monitored(work, folder: str, slow_s: float = STALL_S):
    """Call `work(mesh)` under the failure monitor; stderr goes to one file per rank."""
    mesh = build_mesh(torch.device("cpu"))
    os.dup2(os.open(Path(folder, f"err{mesh.world.rank}"), os.O_WRONLY | os.O_CREAT), 2)
    with FailureMonitor(mesh.world.rank) as monitor:
        monitor.connect(mesh, address="127.0.0.1", stall_s=STALL_S, slow_s=slow_s, folder=Path(folder))
        return work(mesh)


def stall_of(function, world: int, folder: Path, *, ignored: str = "(?!)") -> tuple[list[str], str]:
    """Return (table, sentence) of a job that its monitor must end, printed by one rank and kept in the folder.

    ignored: a pattern of lines that ranks may print besides.
    """
    with pytest.raises(RankError, match="the process died"):
        run_ranks(function, world, str(folder))
    texts = [re.sub(f"(?m)^{ignored}.*\n", "", path.read_text()) for path in sorted(folder.glob("err*"))]
    printed = [text for text in texts if text]
    _, *table, sentence = (folder / "stall.txt").read_text().splitlines()
    assert printed == ["\n".join([*table, sentence]) + "\n"]
    return table[1:], sentence


def sleep_in_the_loader(mesh):
    all_reduce(torch.ones(1), mesh.world, name="first")
    if mesh.world.rank == 1:
        mesh.world.progress.note("rows of step 7")
        time.sleep(60)
    all_reduce(torch.ones(1), mesh.world, name="norm of the gradient")


def _loader(folder):
    monitored(sleep_in_the_loader, folder)


def test_a_rank_that_holds_up_the_others_is_named_with_its_line(tmp_path):
    table, sentence = stall_of(_loader, 3, tmp_path)
    line = next(
        number for number, text in enumerate(Path(__file__).read_text().splitlines(), 1) if "time.sleep(60)" in text
    )
    host = os.uname().nodename
    assert sentence.startswith(f"error: rank 1 (host {host}) is holding up the others: it is in {short_path()}:{line} ")
    assert f'sleep_in_the_loader while the other ranks wait in "norm of the gradient" for {STALL_S} s; ' in sentence
    assert f"the table above is also in {tmp_path / 'stall.txt'}; " in sentence
    assert [row.split()[0] for row in table] == ["0", "1", "2"]
    assert (
        'waits in "norm of the gradient" (world 4)' in table[0] and 'in "rows of step 7"' in table[1]
    )  # two are the monitor's


def short_path() -> str:
    return str(Path(__file__).relative_to(os.getcwd()))


def one_collective_less(mesh):
    if mesh.world.rank != 2:
        barrier(mesh.world, name="before the step")
    all_reduce(torch.ones(1), mesh.world, name="loss")


def _less(folder):
    monitored(one_collective_less, folder)


def test_the_rank_that_is_behind_is_named(tmp_path):
    _, sentence = stall_of(_less, 3, tmp_path)
    assert (
        sentence.startswith("error: rank 2 (host ")
        and 'waiting in "loss", while the other ranks wait in "before the step"' in sentence
    )


def answer_nobody(mesh):
    if mesh.world.rank == 0:
        os.kill(os.getpid(), signal.SIGSTOP)
    barrier(mesh.world, name="end of the step")


def _stopped(folder):
    monitored(answer_nobody, folder)


def test_a_stopped_rank_0_is_named_by_the_backup_monitor(tmp_path):
    # on a busy machine rank 0 may be stopped before the others have connected to its hub
    _, sentence = stall_of(_stopped, 3, tmp_path, ignored=r"rank \d cannot reach rank 0")
    assert (
        sentence.startswith("error: rank 0 (host ")
        and ") does not answer, stopped or stuck in C code, while the other ranks wait in" in sentence
    )


def slow_work(mesh):
    """Three ways to be slow: notes, a declared stretch, and all ranks at work with nobody waiting."""
    progress = mesh.world.progress
    for part in range(8):
        if mesh.world.rank == 1:
            time.sleep(0.3 * STALL_S)  # much less, for a busy machine may add to it
            progress.note(f"part {part}")
    barrier(mesh.world)
    with progress.long_running("saving"):
        if mesh.world.rank == 0:
            time.sleep(2 * STALL_S)
        barrier(mesh.world)
    time.sleep(1.5 * STALL_S)
    return all_gather_objects(mesh.world.rank, mesh.world)


def _slow(folder):
    return monitored(slow_work, folder, slow_s=60)


def test_slow_work_that_is_alive_is_left_alone(tmp_path):
    assert run_ranks(_slow, 2, str(tmp_path)) == [[0, 1]] * 2
    assert not (tmp_path / "stall.txt").exists() and not any(path.read_text() for path in tmp_path.glob("err*"))


def sleeping_child() -> int:
    """Returns once it sleeps: what Python does after a fork in the child is done."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.write(writer, b"here")
        time.sleep(CHILD_S)
        os._exit(0)
    os.close(writer)
    assert os.read(reader, 4) == b"here"
    os.close(reader)
    return child


def end_children(folder, mesh):
    """Forked children are ended by SIGTERM, and one outlives its rank: neither may be taken for the rank itself."""
    child = sleeping_child()
    os.kill(child, signal.SIGTERM)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
    barrier(mesh.world)
    sleeping_child()
    if mesh.world.rank == 1:
        Path(folder, "killed").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    barrier(mesh.world)


def _children(folder):
    return monitored(functools.partial(end_children, folder), folder)


def test_a_child_is_not_its_rank(tmp_path):
    with pytest.raises(RankError, match="the process died"):
        run_ranks(_children, 2, str(tmp_path))  # the harness, too, waits for the children
    printed = (tmp_path / "err0").read_text()
    assert printed.startswith("error: rank 1 (host ") and "died or cannot be reached" in printed
    seconds = (tmp_path / "err0").stat().st_mtime - (tmp_path / "killed").stat().st_mtime
    assert seconds < CHILD_S, "the child was taken for the rank"


def many_collectives(mesh):
    """Returns (calls that a record takes, how many were recorded)."""
    progress, times = mesh.world.progress, 20_000

    def record() -> None:
        for _ in range(times):
            progress.begin("all_reduce", "world", mesh.world.ranks)
            progress.end()

    return calls_of(record) / times, progress.counts["world"]


def _many(folder):
    return monitored(many_collectives, folder)


def test_a_record_takes_few_calls_and_a_short_job_ends_in_order(tmp_path):
    for calls, count in run_ranks(_many, 2, str(tmp_path)):
        assert calls < 30 and count == 20_002
    assert run_ranks(_many, 1, str(tmp_path))[0][1] == 20_000
    assert not any(path.read_text() for path in tmp_path.glob("err*"))
