"""A job that is told to stop finishes its step, saves and ends with a status of its own; the next start goes on as if
nothing had been.
"""

import os
import re
import signal
from pathlib import Path

import pytest

from megachat.checkpoint.resume import newest_complete
from megachat.errors import SAVED_STATUS, STOPPED_STATUS
from tests.runs.forked import Ranks
from tests.runs.job import (
    bits_per_byte,
    command,
    different,
    facts,
    free_port,
    logged,
    losses,
    train,
    until,
)
from tests.runs.pause import Pause

# an evaluation after every step, so that every stop comes before one that is due
LONG = {"horizon": {"steps": 5000}, "evaluate": {"every": 1, "prompts": []}, "checkpoint": {"every": 0}}


@pytest.mark.parametrize("world, rank, number", [(1, 0, signal.SIGINT), (2, 1, signal.SIGHUP), (2, 0, signal.SIGUSR1)])
def test_a_stop_costs_nothing(world, rank, number, place):
    name = f"stopped_{world}_{rank}_{number.name}"
    run = place.runs / name
    by_speedrun = number == signal.SIGUSR1
    started_by = ["--started-by", "speedrun"] if by_speedrun else []
    again = "the same `megachat speedrun` command" if by_speedrun else "--resume auto"
    with Ranks(command(place, name, *started_by, config=LONG), world) as ranks:
        until(lambda: not ranks.alive or len(logged(run)) > 6, "step 3")
        os.kill(ranks.pids[rank], number)
        assert ranks.end() == [SAVED_STATUS] * world, ranks.printed
    assert re.fullmatch(
        rf"rank {rank} \(.*pid {ranks.pids[rank]}\) was requested to stop \({number.name}\): "
        "the job saves after this step or the next, and ends"
        rf"{'; a second Ctrl-C ends it at once' * (number == signal.SIGINT)}\n",
        ranks.err,
    )
    saved, _ = newest_complete(run / "checkpoints")
    step = facts(saved)["step"]
    assert (
        f"stopped after step {step}, which is saved: continue with {again}" in ranks.out
        and facts(saved)["loop"]["pending"][0] == "validation"
    )
    summary = ranks.out.partition("which is saved")[2]
    assert f" in {step} steps" in summary and f"run folder      {run}\n" in summary
    continued = "pretrain --config" if world == 1 else "the command that started the job"
    continued = again if by_speedrun else rf".*{continued}.* {again}"
    assert re.search(rf"\nnext:\n  {continued}\n", summary), summary
    assert max(bits_per_byte(run)) == step - 1 and max(losses(run)) == step - 1
    until_step = {"horizon": LONG["horizon"] | {"stop_step": step + 2}}
    train(place, name, "--resume", "auto", world=world, config=LONG | until_step)
    whole = train(place, name + "_whole", world=world, config=LONG | until_step)
    assert losses(run) == losses(whole) and bits_per_byte(run) == bits_per_byte(whole)
    last = f"step_{step + 2:06d}"
    assert different(run / "checkpoints" / last, whole / "checkpoints" / last) == []


def test_a_step_that_takes_too_long_is_not_waited_for(place):
    slow = LONG | {"checkpoint": {"every": 0, "stop_s": 0.1}}
    run, pause = place.runs / "slow_step", Pause(place.runs / "slow_step_pause", 1)
    with Ranks(command(place, "slow_step", config=slow), variables=pause.variables) as job:
        until(lambda: not job.alive or pause.ranks, "step 1, which takes minutes")
        job.processes[0].terminate()
        assert job.end() == [STOPPED_STATUS], job.printed
    (error,) = job.errors
    assert error.endswith(
        "was requested to stop (SIGTERM), and step and save took longer than checkpoint.stop_s=0.1, so the job "
        "stops: continue with --resume auto"
    )
    assert not list((run / "checkpoints").glob("step_*"))


def test_before_it_trains_a_job_ends_at_once(place):
    port = free_port()
    program = command(place, "early", "--started-by", "speedrun", config={"parallel": {"rendezvous_s": 600}})
    with Ranks(program, 2, start=[0], variables={"MASTER_PORT": str(port)}) as job:
        until(lambda: not job.alive or listens(job.pids[0], port), "rank 0 to listen")
        os.kill(job.pids[0], signal.SIGUSR1)
        assert job.end() == [STOPPED_STATUS], job.printed
    assert "(SIGUSR1), so the job stops: continue with the same `megachat speedrun` command" in job.errors[0]
    assert not (place.runs / "early").exists()


def listens(pid: int, port: int) -> bool:
    """Whether somebody listens at the port: the watch of a rank starts before it meets the others."""
    tables = Path(f"/proc/{pid}/net/tcp").read_text() + Path(f"/proc/{pid}/net/tcp6").read_text()
    return any(f":{port:04X} " in line and " 0A " in line for line in tables.splitlines())
