"""What lies in a run folder beside the checkpoints may be damaged, and the folder may be moved: the training continues
where the user expects it.
"""

import json
import shutil

from tests.runs.forked import run_forked
from tests.runs.job import PROGRAM, STEPS, checkpoint, command, copy_until, different, losses, metrics

GARBAGE = b'\xff{"torn'


def test_damaged_side_files_are_set_aside_and_the_run_continues(one, place):
    run = copy_until(one, place, "damaged", 4)
    names = ["config.json", "plan.json", "environment.json", "crashes.json", "running", "samples", "lock"]
    for name in names[:5]:
        (run / name).write_bytes(GARBAGE)
    (run / "environment.json").write_bytes(b"")
    shutil.rmtree(run / "samples")
    (run / "samples").write_bytes(GARBAGE)
    (run / "lock").unlink(missing_ok=True)
    (run / "lock").mkdir()
    lines = (run / "metrics.jsonl").read_bytes().splitlines(True)
    (run / "metrics.jsonl").write_bytes(b"".join([*lines[:2], GARBAGE + b"\n", *lines[2:]]))
    done = run_forked(command(place, "damaged", "--resume", "auto"))
    assert done.status == 0 and done.err == "", done.err
    for name in [*names, "metrics.jsonl"]:
        assert (run / f"{name}.damaged").exists(), name
        (line,) = (line for line in done.out.splitlines() if line.startswith(str(run / name) + " "))
        assert f"{name}.damaged" in line
    assert json.loads((run / "config.json").read_text()) == json.loads((one / "config.json").read_text()) | {
        "run": {"name": "damaged", "folder": str(place.runs)}
    }
    assert len(json.loads((run / "environment.json").read_text())) == 1
    assert losses(run) == losses(one) and different(checkpoint(run, STEPS), checkpoint(one, STEPS)) == []
    assert json.loads((run / "samples" / f"step_{STEPS:06d}.json").read_text())
    assert not (run / "running").exists() and not (run / "crashes.json").exists()


def run_job(place, name: str, *arguments: str, config: dict | None = None) -> list[str]:
    """Runs a job that must succeed; returns the lines of its log."""
    done = run_forked(command(place, name, *arguments, config=config))
    assert done.status == 0, done.out + done.err
    return done.out.splitlines()


def test_a_resume_from_an_earlier_step_is_followed_and_can_be_undone(one, place):
    run = place.runs / "branched"
    shutil.copytree(one, run)
    branch = {
        "batch": {"tokens": 12 * 64},
        "data": {"resume": "restart"},
        "optimizer": {"scale_to_batch": False, "warmup_steps": 3, "matrix_lr": 0.01},
    }
    paused = branch | {"horizon": {"steps": STEPS, "stop_step": 4}}
    lines = run_job(place, run.name, "--resume", str(checkpoint(run, 2)), config=paused)
    assert any("continues from step 2" in line and "step_000006.aside" in line for line in lines)
    for change in ("optimizer.warmup_steps was 2 and is 3", "batch.tokens was 384 and is 768", "matrix rate (derived)"):
        assert any(line.startswith("changed since the checkpoint: ") and change in line for line in lines), change
    assert (run / "metrics.jsonl.aside").read_bytes() == (one / "metrics.jsonl").read_bytes()

    lines = run_job(place, run.name, "--resume", "auto", config=branch)
    assert f"resumed from {checkpoint(run, 4)} at step 4" in lines
    assert not any(line.startswith("changed since") for line in lines)
    assert different(checkpoint(run, STEPS), checkpoint(one, STEPS)) != []
    flops = {line["step"]: line["total_training_flops"] for line in metrics(run) if "train/loss" in line}
    small = next(line["total_training_flops"] for line in metrics(one) if line["step"] == 1)
    assert [flops[step] for step in range(STEPS)] == [small * count for count in (0, 1, 2, 4, 6, 8)]

    settings = {name: (run / name).read_bytes() for name in ("config.json", "plan.json", "metrics.jsonl")}
    lines = run_job(place, run.name, "--resume", "auto", config={"optimizer": {"matrix_lr": 0.5}, **branch})
    assert any("nothing to do" in line for line in lines)
    assert settings == {name: (run / name).read_bytes() for name in settings}

    run_job(place, run.name, "--resume", str(run / "checkpoints" / "step_000004.aside"))
    assert different(checkpoint(run, STEPS), checkpoint(one, STEPS)) == []


def test_a_copied_run_folder_continues_where_it_lies(one, place):
    run = copy_until(one, place, "copied", 4)
    before = sorted(path.name for path in one.rglob("*"))
    done = run_forked([PROGRAM, "--config", str(run / "config.json"), "--resume", "auto"])
    assert done.status == 0 and f"resumed from {checkpoint(run, 4)} at step 4" in done.out, done.err
    assert f"names the run folder {one}, but lies in {run}" in done.out
    assert different(checkpoint(run, STEPS), checkpoint(one, STEPS)) == [] and losses(run) == losses(one)
    assert sorted(path.name for path in one.rglob("*")) == before
