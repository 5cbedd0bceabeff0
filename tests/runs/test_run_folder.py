"""What lies in a run folder beside the checkpoints may be damaged, and the folder may be moved: the training continues
where the user expects it.
"""

import json
import shutil
from pathlib import Path

from tests.runs.forked import run_forked
from tests.runs.job import STEPS, checkpoint, command, different, losses

GARBAGE = b'\xff{"torn'


def copy_until(run: Path, place, name: str, step: int) -> Path:
    """A run folder whose newest checkpoint is of `step`."""
    copy = place.runs / name
    shutil.copytree(run, copy)
    for path in (copy / "checkpoints").iterdir():
        if path.name > f"step_{step:06d}":
            shutil.rmtree(path)
    return copy


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
