"""A supervised job restarts after a crash, on the ranks that are left; it ends where a restart would not help.

The supervisor that gets SIGTERM is executed, the others are forked from a warm process.
"""

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megachat.checkpoint.resume import newest_complete
from megachat.errors import EXIT_STATUS, SAVED_STATUS
from tests.runs.job import (
    STEPS,
    begin,
    checkpoint,
    command,
    different,
    finish,
    logged,
    losses,
    metrics,
    processes_of,
    train,
    until,
)
from tests.runs.network import two_hosts, why_not
from tests.runs.pause import Pause
from tests.runs.warm import Launcher

LONG = {"horizon": {"steps": 5000}, "evaluate": {"every": 0}}
EVERY_STEP = {"checkpoint": {"every": 1}}


def supervised(place, name: str, ranks: int, *options: str, config: dict | None = None) -> list:
    return [sys.executable, "launch/supervise.py", "--ranks", ranks, *options, *command(place, name, config=config)[1:]]


def rank_1(config: str) -> list[int]:
    return [pid for pid, place in processes_of(config).items() if place == "1"]


def crashes(run: Path) -> int:
    path = run / "crashes.json"
    return len(json.loads(path.read_text())) if path.exists() else 0


def until_running(job: subprocess.Popen | Launcher, run: Path, what, what_failed: str) -> None:
    until(lambda: job.poll() is not None or what(), what_failed)
    assert job.poll() is None, finish(job)


def test_a_killed_rank_costs_one_restart_and_no_step(place, two):
    line = supervised(place, "killed", 2, config=EVERY_STEP)
    run, pause = place.runs / "killed", Pause(place.runs / "killed_pause", 3)
    job = Launcher(line, pause.variables, ignored=[signal.SIGHUP])  # as under nohup
    until_running(job, run, lambda: pause.ranks == 2, "step 3")
    for process in processes_of(line[line.index("--config") + 1]):
        os.kill(process, signal.SIGHUP)  # its terminal has ended
    (pid,) = rank_1(line[line.index("--config") + 1])
    os.kill(pid, signal.SIGKILL)
    done = finish(job)
    assert done.status == 0, done.out + done.err
    assert len(re.findall(r"resumed from \S+ at step \d", done.out)) == 1 and "error: rank 1 " in done.err
    assert losses(run) == losses(two) and different(checkpoint(run, STEPS), checkpoint(two, STEPS)) == []
    assert not (run / "running").exists() and not (run / "crashes.json").exists()


def test_a_mistake_is_reported_once_and_not_tried_again(place):
    done = finish(Launcher([*supervised(place, "mistaken", 2), "--set", "data.folder=depht"]))
    assert done.status == EXIT_STATUS and "Traceback" not in done.err, done.err
    assert len([error for error in done.errors if "[rank" not in error]) == 1 and "depht" in done.errors[0]


def test_a_step_that_crashes_every_time_is_given_up(place):
    line = supervised(place, "hopeless", 2, config=LONG)
    run, pause = place.runs / "hopeless", Pause(place.runs / "hopeless_pause", 0)
    job = Launcher(line, pause.variables)
    for times in range(3):
        until_running(
            job,
            run,
            lambda times=times: crashes(run) == times and pause.ranks == 2 and (run / "running").exists(),
            f"step 0 with {times} crashes",
        )
        pause.again()
        (pid,) = rank_1(line[line.index("--config") + 1])
        os.kill(pid, signal.SIGKILL)
    done = finish(job)
    assert done.status == EXIT_STATUS
    assert (
        done.errors[-1]
        .removeprefix("error: [rank 1] ")
        .removeprefix("error: ")
        .startswith(f"step 0 of {run} has failed 3 times in a row")
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_however_it_ends_the_ranks_save_and_none_lives_on(number, place):
    line = supervised(place, f"told_{number.name}", 2, config=LONG | {"checkpoint": {"every": 0}})
    job = (begin if number == signal.SIGTERM else Launcher)(line)
    run = place.runs / f"told_{number.name}"
    until_running(job, run, lambda: len(logged(run)) > 2, "step 2")
    job.send_signal(number)
    done = finish(job)
    assert done.status == (SAVED_STATUS if number == signal.SIGTERM else -number)
    assert "stopped after step" in done.out and done.errors == [], done.out + done.err
    saved, _ = newest_complete(run / "checkpoints")
    assert saved is not None and not (run / "running").exists()
    until(lambda: processes_of(line[line.index("--config") + 1]) == {}, "end of all processes")


def test_more_ranks_than_fit_the_batch_end_and_the_others_train(place):
    """Five rows a step on two ranks: one fits."""
    five = {"batch": {"tokens": 5 * 64}}
    done = finish(Launcher(supervised(place, "five", 2, config=five)))
    assert done.status == 0, done.out + done.err
    assert re.search(r"2 ranks were started, .* over 1; the other 1 exit", done.out), done.out
    assert "five on 1 rank " in done.out and "(1 row x 5 micro-batches per rank)" in done.out
    assert losses(place.runs / "five") == pytest.approx(losses(train(place, "alone", config=five)), rel=1e-6)


@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
def test_when_a_host_is_gone_the_other_goes_on(tmp_path, place):
    """Each host has its supervisor; all processes of host-b end, its network stays, because host-a's end of the cable
    would go with it.
    """
    config = {"horizon": {"steps": 24}, "evaluate": {"every": 0, "prompts": []}, "checkpoint": {"every": 2}}
    whole = train(place, "whole", world=2, config=config)
    steps = random.randint(4, 12)
    with two_hosts(tmp_path) as network, contextlib.ExitStack() as stack:
        line = supervised(place, "left", 1, "--hosts", "1:2", "--meet", "host-a:29400", config=config)
        pause = Pause(tmp_path / "pause", steps)
        here, there = (network.warm(host, line, **pause.variables) for host in ("host-a", "host-b"))
        stack.callback(there.communicate)
        stack.callback(there.kill)
        run = place.runs / "left"
        until_running(here, run, lambda: pause.ranks == 2, f"step {steps}")
        stack.enter_context(open(f"/proc/{network.pids['host-b']}/ns/net"))
        os.kill(network.pids["host-b"], signal.SIGKILL)
        done = finish(here)
    assert done.status == 0, done.out + done.err
    assert "left on 2 ranks" in done.out and "left on 1 rank " in done.out and "resumed from" in done.out
    assert "1 row x 3 micro-batches" in done.out and "1 row x 6 micro-batches" in done.out
    assert losses(run) == pytest.approx(losses(whole), rel=1e-4)
    (step,) = (int(number) for number in re.findall(r"resumed from \S+ at step (\d+)", done.out))
    undisturbed = train(place, "undisturbed", "--resume", str(checkpoint(whole, step)), config=config)
    assert losses(run) == {n: loss for n, loss in losses(whole).items() if n < step} | losses(undisturbed)
    assert different(checkpoint(run, 24), checkpoint(undisturbed, 24)) == []
    phases = "detection, end, meeting, import, joining, building, loading, first step".split(", ")
    line = ", ".join(f"{phase} [0-9.]+ s" for phase in phases)
    assert re.search(f"recovered in [0-9.]+ s, from the start of the interrupted step .*: {line}\n", done.out), done.out
    (measured,) = (values for values in metrics(run) if "recovery/total_s" in values)
    seconds = [measured[f"recovery/{phase.replace(' ', '_')}_s"] for phase in phases]
    assert (
        measured["step"] == step and min(seconds) >= 0 and sum(seconds) == pytest.approx(measured["recovery/total_s"])
    )
