"""What a run survives: killed ranks, kills while saving, a full disk, one that cannot be written, a vanished folder, a
second job, a loss that is not a number.
"""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from megachat.checkpoint.facts import find_file_problems, read_facts
from megachat.checkpoint.resume import newest_complete
from megachat.errors import CORRUPTION_STATUS, EXIT_STATUS, LOST_RANK_STATUS, SAVED_STATUS
from megachat.job.elastic import Agent
from tests.runs.forked import Done, Ranks, run_forked
from tests.runs.job import (
    STEPS,
    bits_per_byte,
    checkpoint,
    checkpoints,
    command,
    copy_until,
    different,
    facts,
    finish,
    freeze,
    losses,
    train,
    until,
)
from tests.runs.warm import Launcher

LONG = {"horizon": {"steps": 5000}, "evaluate": {"every": 0}}  # ended by the test


def file_bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_killed_rank_ends_the_job_and_the_next_start_goes_on(place):
    program = command(place, "killed", "--resume", "auto", config=LONG | {"checkpoint": {"every": 4}})
    run_folder = place.runs / "killed"
    with Ranks(program, 2) as job:
        until(lambda: not job.alive or checkpoint(run_folder, 8).is_dir(), "checkpoint")
        job.processes[1].kill()
        assert job.end() == [LOST_RANK_STATUS, -signal.SIGKILL], job.printed
        assert [error.split(" died ")[0] for error in job.errors] == [
            f"error: rank 1 (host {socket.gethostname()}, pid {job.pids[1]})"
        ]
    last = int(max(name for name in checkpoints(run_folder) if not name.endswith(".tmp")).removeprefix("step_"))
    again = run_forked([*program, "--set", f"horizon.stop_step={last + 2}"], 2)
    assert again.status == 0 and f"resumed from {checkpoint(run_folder, last)} at step {last}" in again.out
    assert sorted(losses(run_folder)) == list(range(last + 2))


def test_a_kill_while_saving_leaves_the_checkpoint_before(place):
    program = command(place, "torn", "--resume", "auto", config=LONG | {"checkpoint": {"every": 1}})
    folder = place.runs / "torn" / "checkpoints"
    with Ranks(program) as job:
        (pid,) = job.pids
        until((folder / "step_000001").is_dir, "checkpoint")
        for _ in range(1000):
            until(lambda: list(folder.glob("*.tmp")), "saving", every_s=0.001)
            freeze(pid)
            if torn := [path.name for path in folder.glob("*.tmp")]:
                break
            os.kill(pid, signal.SIGCONT)  # it was quicker; there is a next step
        os.kill(pid, signal.SIGKILL)
        assert job.end() == [-signal.SIGKILL]
    step = int(torn[0].removeprefix("step_").removesuffix(".tmp"))
    assert checkpoints(place.runs / "torn") == [f"step_{number:06d}" for number in range(1, step)] + torn
    done = run_forked([*program, "--set", f"horizon.stop_step={step + 1}"])
    assert done.status == 0 and f"resumed from {folder / f'step_{step - 1:06d}'} at step {step - 1}" in done.out
    assert checkpoints(place.runs / "torn") == [f"step_{number:06d}" for number in range(1, step + 2)]
    assert sorted(losses(place.runs / "torn")) == list(range(step + 1))


BROKEN = """
import os, runpy
import megachat.train.tasks

evaluate, results = megachat.train.tasks.bits_per_byte, []

def fail(*arguments):
    if results:
        raise ValueError("a validation that cannot be read")
    results.append(evaluate(*arguments))
    return results[0]

if os.environ["RANK"] == "1":
    megachat.train.tasks.bits_per_byte = fail  # after the one before the first step
runpy.run_path("launch/pretrain.py", run_name="__main__")
"""


def test_a_failing_validation_on_one_rank_loses_nothing(two, place):
    """A step is saved before its validation, and ranks that still write the checkpoint when that fails complete it."""
    settings = {"checkpoint": {"every": 5}, "evaluate": {"every": 5}}
    program, run = command(place, "unvalidated", "--resume", "auto", config=settings), place.runs / "unvalidated"
    (place.runs / "broken.py").write_text(BROKEN)
    with Ranks([place.runs / "broken.py", *program[1:]], 2) as job:
        assert 0 not in job.end() and "ValueError: a validation" in job.err, job.printed
    saved = checkpoint(run, 5)
    assert checkpoints(run) == [saved.name] and find_file_problems(saved, read_facts(saved)) == []
    assert facts(saved)["loop"]["pending"] == ["validation"] and list(bits_per_byte(run)) == [0]
    done = run_forked(program, 2)
    assert done.status == 0, done.err
    assert losses(run) == losses(two) and different(checkpoint(run, STEPS), checkpoint(two, STEPS)) == []
    assert list(bits_per_byte(run)) == [0, 5, STEPS] and bits_per_byte(run)[STEPS] == bits_per_byte(two)[STEPS]
    assert facts(checkpoint(run, STEPS))["loop"]["min_val_bpb"] == bits_per_byte(run)[5]


LIMITED = """
import resource, runpy, sys

resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv.pop(1)),) * 2)
runpy.run_path("launch/pretrain.py", run_name="__main__")
"""


def run_limited(place, file_bytes: int, program: list[str]) -> Done:
    """Runs launch/pretrain.py on one rank, which cannot write a larger file."""
    path = place.runs / "limited.py"
    path.write_text(LIMITED)
    return run_forked([path, file_bytes, *program[1:]])


def test_no_space_while_saving_is_reported_and_leaves_no_trace(one, place):
    run = copy_until(one, place, "full", 2)
    before = file_bytes(checkpoint(run, 2))
    limit = 200 << 10  # metrics fit into such a file, a checkpoint does not
    done = run_limited(place, limit, command(place, "full", "--resume", "auto"))
    assert done.status == 2
    final = checkpoint(run, 4)
    assert done.err.startswith(f"error: checkpoint {final} could not be saved by rank 0: [Errno 27] File too large; ")
    assert "earlier checkpoints are untouched" in done.err and done.err.endswith("--resume auto\n")
    assert done.err.count("\n") == 1
    assert checkpoints(run) == ["step_000002"] and file_bytes(checkpoint(run, 2)) == before
    train(place, "full", "--resume", "auto")
    assert different(checkpoint(run, STEPS), checkpoint(one, STEPS)) == [] and losses(run) == losses(one)


def test_no_space_for_the_run_folder_is_reported(place):
    done = run_limited(place, 1 << 10, command(place, "fuller"))
    assert done.status == 2
    assert done.err == (
        f"error: rank 0 could not read or write {place.runs / 'fuller'} (File too large): "
        "free space there or make it accessible, then continue with --resume auto\n"
    )


# launch/pretrain.py, where the weights overflow before step 3
OVERFLOW = """
import runpy
from megachat.train import trainer

train_step = trainer.train_step

def overflow(run, step, **arguments):
    if step == 3:
        for parameter in run.layers.parameters():
            parameter.data.fill_(float("inf"))
    return train_step(run, step, **arguments)

trainer.train_step = overflow
runpy.run_path("launch/pretrain.py", run_name="__main__")
"""


def test_a_loss_that_is_no_number_stops_all_ranks_and_spares_the_checkpoint(two, place):
    run = copy_until(two, place, "diverged", 2)
    before = file_bytes(checkpoint(run, 2))
    program = place.runs / "overflow.py"
    program.write_text(OVERFLOW)
    arguments = command(place, "diverged", "--resume", "auto", "--set", "checkpoint.every=0")[1:]
    done = run_forked([program, *arguments], 2)
    assert done.status == 2
    (error,) = done.errors
    assert re.match(
        (
            r"error: step 3: the loss is nan on rank 0 \(.+\), rank 1 \(.+\); this step changed no weight "
            r"and the checkpoints are untouched: "
        ),
        error,
    )
    assert "Traceback" not in done.out + done.err
    assert checkpoints(run) == ["step_000002"] and file_bytes(checkpoint(run, 2)) == before
    assert 3 not in losses(run), "the metrics end with the last good step"
    checks = ["--set", "reliability.replay_every=1", "--set", "reliability.hash_every=1"]  # which change no bit
    done = run_forked(command(place, "diverged", "--resume", "auto", *checks), 2)
    assert done.status == 0, done.err
    assert (
        "checks of the devices: a micro-batch is replayed every 1 step, hashes are compared every 1 step\n" in done.out
    )
    assert f"{STEPS - 2} replays and {STEPS - 2} hash comparisons: all passed; " in done.out
    assert [*losses(run, "train/replay_s")] == [*losses(run, "train/hashes_s")] == [*range(2, STEPS)]
    assert different(checkpoint(run, STEPS), checkpoint(two, STEPS)) == [] and losses(run) == losses(two)


# As a supervisor's program: megachat supervise with ranks that run this file; there a weight gets one wrong number.
WRONG_BIT = """
import os, runpy, time

if "RANK" not in os.environ:
    from megachat.commands import supervise

    supervise.pretrain_program = lambda: [__file__]
    runpy.run_path("launch/supervise.py", run_name="__main__")

import torch
import megachat.train.step as step_module

update, save, steps = step_module.update, torch.save, []

def wrong(run, *arguments, **options):
    result = update(run, *arguments, **options)
    steps.append(result)
    if run.mesh.world.rank == 1 and len(steps) == 3:
        run.muon.wait_for_gather()
        run.layers[1].mlp.c_fc.weight.data[3, 5] *= -1
    return result

def slow(values, path, *arguments, **options):
    if "corruption" in str(path) and os.environ["RANK"] == "1":
        time.sleep(2)  # the first rank that ends would have this one killed
    save(values, path, *arguments, **options)

step_module.update, torch.save = wrong, slow
runpy.run_path("launch/pretrain.py", run_name="__main__")
"""


def test_a_wrong_bit_ends_a_supervised_job_before_it_is_saved_and_all_evidence_is_kept(two, place):
    (place.runs / "wrong_bit.py").write_text(WRONG_BIT)
    config = {"checkpoint": {"every": 1}, "reliability": {"hash_every": 1}}
    program = [place.runs / "wrong_bit.py", "--ranks", 2, *command(place, "wrong_bit", config=config)[1:]]
    done, name = finish(Launcher([sys.executable, *program])), "transformer.h.0.mlp.c_fc.weight"
    assert done.status == CORRUPTION_STATUS and "resumed" not in done.out, done.out + done.err
    assert CORRUPTION_STATUS in Agent.final_statuses  # of several hosts
    (error,) = [error for error in done.errors if "[rank" not in error]
    assert f"step 3: the copies of {name} on rank 0 (" in error
    run = place.runs / "wrong_bit"
    assert checkpoints(run) == ["step_000001", "step_000002"]
    assert not (run / "running").exists() and not (run / "crashes.json").exists()
    evidence = run / "corruption" / "step_000003"
    assert json.loads((evidence / "report.json").read_text())["suspects"] == [0, 1]
    right, wrong = (torch.load(evidence / f"rank_0000{rank}.pt", weights_only=True) for rank in range(2))
    ((key, weight),) = right.items()
    assert key.endswith(name) and (weight != wrong[key]).nonzero().tolist() == [[3, 5]]


def forked(place, name: str, *arguments: str, config: dict, world: int = 2) -> Ranks:
    return Ranks(command(place, name, "--resume", "auto", *arguments, config=config), world)


@pytest.fixture(scope="module")
def whole(place) -> Callable[[int], Path]:
    """Returns the folder of an uninterrupted run of LONG with at least so many steps."""

    def until_step(step: int) -> Path:
        run, config = place.runs / "whole", LONG | {"checkpoint": {"every": 1}}
        if not checkpoint(run, step).is_dir():
            with forked(place, "whole", "--set", f"horizon.stop_step={max(step, 100)}", config=config) as ranks:
                assert ranks.end() == [0, 0], ranks.printed
        return run

    return until_step


def assert_as_if_nothing_had_been(run: Path, whole: Path, step: int) -> None:
    assert sorted(losses(run)) == list(range(step))
    assert losses(run) == {number: loss for number, loss in losses(whole).items() if number < step}
    assert different(checkpoint(run, step), checkpoint(whole, step)) == []


def saved_step(output: str) -> int:
    """The last that a job said was saved, or from which it went on."""
    return max((int(step) for step in re.findall(r"(?:saved|resumed from) \S+/step_(\d+)", output)), default=0)


def test_kills_at_any_moment_of_twenty_saves_lose_nothing(place, whole):
    """One rank each time, every fifth time both, while a checkpoint is written and older ones are removed."""
    rng, folder, step = random.Random(4), place.runs / "kills" / "checkpoints", 0
    config = LONG | {"checkpoint": {"every": 1, "keep_last": 2}}
    for attempt in range(20):
        with forked(place, "kills", config=config) as ranks:
            later = f"step_{step + 2:06d}"  # not the first save: three kills at one step are a crash loop

            def saving(ranks=ranks, later=later) -> bool:
                return not ranks.alive or any(path.name > later for path in folder.glob("*.tmp"))

            until(saving, "save", every_s=0.001)
            time.sleep(rng.uniform(0.0, 0.2))
            victims = [0, 1] if attempt % 5 == 4 else [rng.randrange(2)]
            for victim in victims:
                ranks.processes[victim].kill()
            statuses = ranks.end()
        assert statuses == [-signal.SIGKILL if rank in victims else LOST_RANK_STATUS for rank in range(2)], (
            ranks.printed
        )
        newest, passed_over = newest_complete(folder)
        said, before = saved_step(ranks.printed), step
        step = int(newest.name[5:])
        assert step >= max(said, before + 1) and passed_over == []
        assert find_file_problems(newest, read_facts(newest)) == []
        assert different(newest, checkpoint(whole(step), step)) == []
    with forked(place, "kills", "--set", f"horizon.stop_step={step + 2}", config=config) as ranks:
        assert ranks.end() == [0, 0], ranks.printed
    assert checkpoints(place.runs / "kills") == [f"step_{step + 1:06d}", f"step_{step + 2:06d}"]
    assert_as_if_nothing_had_been(place.runs / "kills", whole(step + 2), step + 2)


@contextlib.contextmanager
def disk(folder: Path, options: str) -> Iterator[None]:
    """A file system of its own at the folder."""
    folder.mkdir(parents=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", folder], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"a disk of its own for this test needs root and mount ({done.stderr.strip()})")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def remount(folder: Path, options: str) -> bool:
    return subprocess.run(["mount", "-o", f"remount,{options}", folder], capture_output=True).returncode == 0


@pytest.mark.parametrize(
    "scarce, message",
    [("size=1200k", "the disk has .* MB free and the checkpoint takes"), ("nr_inodes=34", "No space left on")],
)
def test_a_full_disk_is_reported_and_the_run_continues_when_there_is_space(scarce, message, place, whole):
    """Bytes are counted before anything is written; inodes run out in the middle."""
    name = f"full_{scarce.partition('=')[0]}"
    run = place.runs / name
    with disk(run, scarce):
        with forked(place, name, config=LONG | {"checkpoint": {"every": 2}}) as ranks:
            assert ranks.end() == [EXIT_STATUS] * 2, ranks.printed
        (error,) = ranks.errors
        assert re.match(
            (
                rf"error: checkpoint {checkpoint(run, 4)} could not be saved by rank 0: .*{message}.*; earlier "
                rf"checkpoints are untouched: .*--resume auto"
            ),
            error,
        )
        assert (
            checkpoints(run) == ["step_000002"]
            and find_file_problems(checkpoint(run, 2), read_facts(checkpoint(run, 2))) == []
        )
        assert remount(run, "size=100m,nr_inodes=1000")
        with forked(place, name, "--set", "horizon.stop_step=6", config=LONG | {"checkpoint": {"every": 2}}) as ranks:
            assert ranks.end() == [0, 0] and f"resumed from {checkpoint(run, 2)}" in ranks.printed, ranks.printed
        assert_as_if_nothing_had_been(run, whole(6), 6)


def test_a_disk_that_becomes_read_only_is_reported(place, whole):
    run, config = place.runs / "read_only", LONG | {"checkpoint": {"every": 10}}
    with disk(run / "checkpoints", "size=100m"):
        with forked(place, "read_only", config=config) as ranks:
            until(checkpoint(run, 10).is_dir, "checkpoint", every_s=0.005)
            until(lambda: remount(run / "checkpoints", "ro"), "moment without open files", every_s=0.005)
            assert ranks.end() == [EXIT_STATUS] * 2, ranks.printed
        (error,) = ranks.errors
        assert re.match(
            r"error: checkpoint \S+ could not be saved by rank 0: \[Errno 30\] Read-only file system: ", error
        )
        assert remount(run / "checkpoints", "rw")
        last = int(checkpoints(run)[-1][5:])
        assert find_file_problems(checkpoint(run, last), read_facts(checkpoint(run, last))) == []
        with forked(place, "read_only", "--set", f"horizon.stop_step={last + 2}", config=config) as ranks:
            assert ranks.end() == [0, 0] and f"resumed from {checkpoint(run, last)}" in ranks.printed, ranks.printed
        assert_as_if_nothing_had_been(run, whole(last + 2), last + 2)


def vanished(ranks: Ranks, run: Path) -> bool:
    """Removes the run folder while the ranks stand still, unless they are saving. Returns whether it is gone."""
    for pid in ranks.pids:
        freeze(pid)
    if not list(run.glob("checkpoints/*.tmp")):
        shutil.rmtree(run)
    for pid in ranks.pids:
        os.kill(pid, signal.SIGCONT)
    return not run.exists()


def test_a_folder_that_vanishes_is_reported(place):
    """It is not made again, without what the run had in it."""
    run, config = place.runs / "vanished", LONG | {"checkpoint": {"every": 10}}
    with forked(place, "vanished", config=config) as ranks:
        until(checkpoint(run, 10).is_dir, "checkpoint", every_s=0.005)
        until(lambda: vanished(ranks, run), "moment without a save")
        assert ranks.end()[0] == EXIT_STATUS, ranks.printed
    (error,) = ranks.errors
    assert re.match(rf"error: .*the run folder {run} no longer exists: ", error) and not run.exists()


def test_a_second_job_on_the_run_folder_is_refused_and_does_not_disturb_the_first(place, whole):
    run, config = place.runs / "taken", LONG | {"checkpoint": {"every": 5}}
    with forked(place, "taken", config=config) as first:
        until(checkpoint(run, 5).is_dir, "checkpoint")
        with Ranks(command(place, "taken", "--resume", "auto", config=config)) as second:
            assert second.end() == [EXIT_STATUS], second.printed
        (error,) = second.errors
        assert re.match(
            rf"error: \S+/taken is in use by another job, with rank 0 on \S+ \(pid {first.pids[0]}\) since 20",
            error,
        )
        last = saved_step(first.printed)
        until(lambda: not first.alive or saved_step(first.printed) > last, "further checkpoint")
        first.processes[0].terminate()
        assert first.end() == [SAVED_STATUS] * 2, first.printed
    assert sorted(losses(run)) == list(range(saved_step(first.printed))) and first.errors == []
    assert different(checkpoint(run, last), checkpoint(whole(last), last)) == []
