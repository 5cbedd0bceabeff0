"""What a run survives: killed ranks, a kill while saving, a full disk, a loss that is not a number."""

import os
import re
import shutil
import signal
import socket
from pathlib import Path

from tests.runs.job import STEPS, begin, checkpoint, checkpoints, command, different, finish, launched, losses, processes_of, train, until

LONG = {"horizon": {"steps": 5000}, "evaluate": {"every": 0}}  # ended by the test


def ranks_of(config: str) -> dict[int, int]:
    """Rank -> process id of the processes that train with this config file."""
    return {int(rank): pid for pid, rank in processes_of(config).items() if rank is not None}


def file_bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def copy_until(run: Path, place, name: str, step: int) -> Path:
    """A run folder whose newest checkpoint is of `step`."""
    copy = place.runs / name
    shutil.copytree(run, copy)
    for later in checkpoints(copy):
        if later > checkpoint(copy, step).name:
            shutil.rmtree(copy / "checkpoints" / later)
    return copy


def test_a_killed_rank_ends_the_job_and_the_next_start_goes_on(place):
    program = command(place, "killed", "--resume", "auto", config=LONG | {"checkpoint": {"every": 4}})
    run, config = place.runs / "killed", program[2]
    job = begin(launched("deepspeed", 2, program))
    until(checkpoint(run, 8).is_dir, 90, "checkpoint")
    ranks = ranks_of(config)
    assert sorted(ranks) == [0, 1]
    os.kill(ranks[1], signal.SIGKILL)
    done = finish(job, 60)
    assert done.status != 0 and [told.split(" died ")[0] for told in done.errors] == [f"error: rank 1 (host {socket.gethostname()}, pid {ranks[1]})"]
    assert ranks_of(config) == {}, "a rank lives on"
    last = int(max(name for name in checkpoints(run) if not name.endswith(".tmp")).removeprefix("step_"))
    again = finish(begin(launched("deepspeed", 2, [*program, "--set", f"horizon.stop_step={last + 2}"])))
    assert again.status == 0 and f"resumed from {checkpoint(run, last)} at step {last}" in again.out
    assert sorted(losses(run)) == list(range(last + 2))


def test_a_kill_while_saving_leaves_the_checkpoint_before(place):
    program = command(place, "torn", "--resume", "auto", config=LONG | {"checkpoint": {"every": 1}})
    job = begin(launched("python", 1, program))
    folder = place.runs / "torn" / "checkpoints"
    until((folder / "step_000001").is_dir, 60, "checkpoint")
    for _ in range(1000):
        until(lambda: list(folder.glob("*.tmp")), 60, "saving", every_s=0.001)
        os.kill(job.pid, signal.SIGSTOP)
        if torn := [path.name for path in folder.glob("*.tmp")]:
            break
        os.kill(job.pid, signal.SIGCONT)  # it was quicker; there is a next step
    os.kill(job.pid, signal.SIGKILL)
    assert finish(job).status == -signal.SIGKILL
    step = int(torn[0].removeprefix("step_").removesuffix(".tmp"))
    assert checkpoints(place.runs / "torn") == [f"step_{number:06d}" for number in range(1, step)] + torn
    done = finish(begin(launched("python", 1, [*program, "--set", f"horizon.stop_step={step + 1}"])))
    assert done.status == 0 and f"resumed from {folder / f'step_{step - 1:06d}'} at step {step - 1}" in done.out
    assert checkpoints(place.runs / "torn") == [f"step_{number:06d}" for number in range(1, step + 2)]
    assert sorted(losses(place.runs / "torn")) == list(range(step + 1))


def test_no_space_while_saving_is_told_and_leaves_no_trace(one, place):
    run = copy_until(one, place, "full", 2)
    before = file_bytes(checkpoint(run, 2))
    line = launched("python", 1, command(place, "full", "--resume", "auto"))
    limited = f"ulimit -f 200; exec {' '.join(map(str, line))}"  # no file above 200 KiB: metrics fit, a checkpoint does not
    done = finish(begin(["bash", "-c", limited]))
    assert done.status == 2
    final = checkpoint(run, 4)
    assert done.err == (
        f"error: checkpoint {final} could not be saved by rank 0: [Errno 27] File too large; "
        "earlier checkpoints are untouched, free space there and use --resume auto\n"
    )
    assert checkpoints(run) == ["step_000002"] and file_bytes(checkpoint(run, 2)) == before
    train(place, "full", "--resume", "auto")
    assert different(checkpoint(run, STEPS), checkpoint(one, STEPS)) == [] and losses(run) == losses(one)


def test_no_space_for_the_run_folder_is_told(place):
    line = launched("python", 1, command(place, "fuller"))
    done = finish(begin(["bash", "-c", f"ulimit -f 1; exec {' '.join(map(str, line))}"]))
    assert done.status == 2
    assert done.err == (
        f"error: rank 0 could not read or write {place.runs / 'fuller'} (File too large): "
        "free space there or make it accessible, then continue with --resume auto\n"
    )


def test_a_loss_that_is_no_number_stops_all_ranks_and_spares_the_checkpoint(two, place):
    run = copy_until(two, place, "diverged", 2)
    before = file_bytes(checkpoint(run, 2))
    absurd = ["--set", "optimizer.unembedding_lr=1e38", "--set", "checkpoint.every=0"]
    done = finish(begin(launched("deepspeed", 2, command(place, "diverged", "--resume", "auto", *absurd))))
    assert done.status == 2
    (told,) = done.errors
    assert re.match(r"error: step 3: the loss is nan on rank 0 \(.+\), rank 1 \(.+\); training stopped and this step changed no weight, ", told)
    assert "Traceback" not in done.out + done.err
    assert checkpoints(run) == ["step_000002"] and file_bytes(checkpoint(run, 2)) == before
    assert 3 not in losses(run), "the metrics end with the last good step"
    train(place, "diverged", "--resume", "auto", world=2)
    assert different(checkpoint(run, STEPS), checkpoint(two, STEPS)) == [] and losses(run) == losses(two)
