"""Checkpoints that earlier versions wrote go on as the run that was never interrupted; damaged ones are named or passed
over.
"""

import json
import shutil

import pytest

from megachat.checkpoint.facts import FORMAT_VERSION
from tests.runs.forked import run_forked
from tests.runs.job import ROOT, Place, checkpoint, command, losses, refused, train
from tests.unit.checkpoint.test_checkpoint import damage

# tests/fixtures: what a run of two ranks saved after three steps, in each format that there was, and the losses of all
# its steps
FIXTURES = ROOT / "tests" / "fixtures"
CONFIG = {
    "model": {"depth": 2, "aspect_ratio": 12, "head_size": 8, "sequence_len": 32},
    "batch": {"tokens": 4 * 32, "micro_rows": 1},
    "data": {"streams": 2, "buffer_documents": 4},
    "evaluate": {"every": 0, "tokens": 64, "prompts": []},
    "checkpoint": {"every": 0},
}


@pytest.mark.parametrize("version", range(1, FORMAT_VERSION + 1))
def test_every_format_goes_on(version, tmp_path):
    place = Place(FIXTURES / "data", FIXTURES / "tokenizer", tmp_path)
    saved = FIXTURES / f"format_{version}" / "step_000003"
    assert json.loads((saved / "checkpoint.json").read_text())["format_version"] == version
    run = train(place, "run", "--resume", str(saved), config=CONFIG)
    wanted = {int(step): loss for step, loss in json.loads((FIXTURES / "losses.json").read_text()).items()}
    assert losses(run, "train/loss")[3] == pytest.approx(losses(run)[3]), "no average was saved: it starts anew"
    assert losses(run) == pytest.approx({step: wanted[step] for step in (3, 4, 5)}, rel=1e-5)


def copied(one, place, name):
    shutil.copytree(one, place.runs / name)
    return place.runs / name


def test_a_damaged_checkpoint_is_named_and_passed_over(one, place):
    run = copied(one, place, "damaged")
    damage(checkpoint(run, 6) / "loader" / "stream_00001.npz")
    line = command(place, run.name, "--resume", "auto", "--set", "horizon.stop_step=5")
    done = run_forked(line, 2)
    assert done.status == 0 and f"resumed from {checkpoint(run, 4)} at step 4" in done.out, done.out + done.err
    problem = "loader/stream_00001.npz does not match its SHA-256"
    assert f"{checkpoint(run, 6)} is damaged and was skipped: {problem}" in done.out
    error = refused(place, run.name, "--resume", str(checkpoint(run, 6)))
    assert error.startswith(f"{checkpoint(run, 6)} is damaged: {problem}")


def test_with_all_damaged_nothing_starts(one, place):
    run = copied(one, place, "all_damaged")
    for step in (2, 4, 6):
        damage(checkpoint(run, step) / "__0_0.distcp")
    error = refused(place, run.name, "--resume", "auto")
    assert error.startswith(
        f"{run} holds no complete checkpoint to resume from: {checkpoint(run, 6)} is damaged: "
        f"__0_0.distcp does not match its SHA-256"
    )
