"""A job that is told to stop finishes its step, saves and ends with a status of its own; the next start goes on as if nothing had been."""

import re
import signal
import subprocess
from pathlib import Path

import pytest

from megachat.checkpoint.resume import newest_complete
from megachat.errors import SAVED_STATUS, STOPPED_STATUS
from tests.runs.job import (
    begin,
    bits_per_byte,
    command,
    different,
    facts,
    finish,
    free_port,
    launched,
    losses,
    metrics,
    train,
    until,
)

# an evaluation after every step, so that every stop comes before one that is due
LONG = {"horizon": {"steps": 5000}, "evaluate": {"every": 1, "prompts": []}, "checkpoint": {"every": 0}}


def ranks_alone(place, name: str, world: int, config: dict) -> tuple[list[subprocess.Popen], Path]:
    """Ranks without a launcher, whose own exit statuses can be read; they are past step 3."""
    program = launched("python", 1, command(place, name, config=config))
    told = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [begin(program, told | {"RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(world)]
    run = place.runs / name
    until(
        lambda: (
            any(rank.poll() is not None for rank in ranks) or (run / "metrics.jsonl").exists() and len(metrics(run)) > 6
        ),
        90,
        "step 3",
    )
    return ranks, run


@pytest.mark.parametrize(
    "world, rank, number", [(1, 0, signal.SIGTERM), (2, 1, signal.SIGTERM), (2, 0, signal.SIGUSR1)]
)
def test_a_stop_costs_nothing(world, rank, number, place):
    name = f"stopped_{world}_{rank}_{number.name}"
    ranks, run = ranks_alone(place, name, world, LONG)
    ranks[rank].send_signal(number)
    ends = [finish(each, 60) for each in ranks]
    assert [each.status for each in ends] == [SAVED_STATUS] * world, ends
    told = "".join(each.err for each in ends)
    assert re.fullmatch(
        rf"rank {rank} \(.*pid {ranks[rank].pid}\) was told to stop \({number.name}\): the job saves after this step and ends\n",
        told,
    )
    saved, _ = newest_complete(run / "checkpoints")
    step = facts(saved)["step"]
    assert (
        f"stopped after step {step}, which is saved: continue with --resume auto" in ends[0].out
        and facts(saved)["loop"]["pending"][0] == "validation"
    )
    assert max(bits_per_byte(run)) == step - 1 and max(losses(run)) == step - 1
    until_step = {"horizon": LONG["horizon"] | {"stop_step": step + 2}}
    train(place, name, "--resume", "auto", world=world, config=LONG | until_step)
    whole = train(place, name + "_whole", world=world, config=LONG | until_step)
    assert losses(run) == losses(whole) and bits_per_byte(run) == bits_per_byte(whole)
    last = f"step_{step + 2:06d}"
    assert different(run / "checkpoints" / last, whole / "checkpoints" / last) == []


def test_a_step_that_takes_too_long_is_not_waited_for(place):
    slow = LONG | {"batch": {"tokens": 6 * 64 * 300}, "checkpoint": {"every": 0, "stop_s": 0.1}}
    program = launched("python", 1, command(place, "slow_step", config=slow))
    job, run = begin(program), place.runs / "slow_step"
    until(lambda: job.poll() is not None or (run / "metrics.jsonl").exists() and metrics(run), 90, "the first step")
    job.terminate()
    done = finish(job, 60)
    assert done.status == STOPPED_STATUS
    (told,) = done.errors
    assert told.endswith(
        "was told to stop (SIGTERM), and step and save took longer than checkpoint.stop_s=0.1, so the job stops: continue with --resume auto"
    )
    assert not list((run / "checkpoints").glob("step_*"))


def test_before_it_trains_a_job_ends_at_once(place):
    job = begin(
        launched("python", 1, command(place, "early", config={"parallel": {"rendezvous_s": 60}})),
        {"WORLD_SIZE": "2", "RANK": "0"} | ALONE,
    )
    until(
        lambda: (
            job.poll() is not None or b"SigCgt" in Path(f"/proc/{job.pid}/status").read_bytes() and listens(job.pid)
        ),
        60,
        "rank 0 to listen",
    )
    job.send_signal(signal.SIGUSR1)
    done = finish(job, 60)
    assert done.status == STOPPED_STATUS and "was told to stop (SIGUSR1), so the job stops" in done.errors[0]
    assert not (place.runs / "early").exists()


ALONE = {"LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}


def listens(pid: int) -> bool:
    """Whether somebody listens at ALONE's port: the watch of a rank starts before it meets the others."""
    port = f":{int(ALONE['MASTER_PORT']):04X} "
    tables = Path(f"/proc/{pid}/net/tcp").read_text() + Path(f"/proc/{pid}/net/tcp6").read_text()
    return any(port in line and " 0A " in line for line in tables.splitlines())
