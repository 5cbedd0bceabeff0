"""All ranks agree on the checkpoint to resume from, and damaged files are detected on whichever rank hashes them."""

from datetime import timedelta
from pathlib import Path

import pytest
import torch

from megachat.checkpoint.resume import choose_checkpoint
from megachat.checkpoint.save import save_checkpoint
from megachat.errors import UserError
from megachat.job.run_lock import lock_run_folder
from megachat.parallel.build import start_collectives
from megachat.parallel.mesh import build_mesh
from tests.harness import run_ranks
from tests.unit.checkpoint.test_checkpoint import ALONE, damage, some_tensors, whole

PARTS = ("tensors.json", "__0_0.distcp", "extra", "checkpoint.json")


def made(run: Path, steps=(2, 4)) -> Path:
    run.mkdir()
    for step in steps:
        save_checkpoint(
            run / "checkpoints",
            step,
            whole(some_tensors()),
            {},
            lambda folder: (folder / "extra").write_text("mine"),
            ALONE,
        )
    return run


def world_of_all():
    start_collectives(torch.device("cpu"), "gloo", timedelta(seconds=600))
    return build_mesh(torch.device("cpu")).world


def choose(requests):
    """Return for each (run folder, resume) the chosen checkpoint and remarks, or the error."""
    world, answers = world_of_all(), []
    for run, resume in requests:
        try:
            answers.append(choose_checkpoint(run, resume, world))
        except UserError as error:
            answers.append(str(error))
    return answers


def test_whatever_file_is_damaged_the_one_before_is_taken(tmp_path):
    runs = [made(tmp_path / part) for part in PARTS]
    for run, part in zip(runs, PARTS, strict=True):
        damage(run / "checkpoints" / "step_000004" / part)
    whole_run, none = made(tmp_path / "whole"), tmp_path / "none"
    requests = [
        *((run, "auto") for run in runs),
        *((run, str(run / "checkpoints" / "step_000004")) for run in runs),
        (whole_run, "auto"),
        (none, "auto"),
    ]
    answers, *others = run_ranks(choose, 3, requests)
    assert all(other == answers for other in others), "all ranks come to the same"
    for run, part, auto, named in zip(runs, PARTS, answers, answers[len(PARTS) :], strict=False):
        last = run / "checkpoints" / "step_000004"
        checkpoint, (remark,) = auto
        assert checkpoint == run / "checkpoints" / "step_000002" and str(last) in remark and part in remark
        assert str(last) in named and part in named and "another step's checkpoint" in named
    assert answers[-2] == (whole_run / "checkpoints" / "step_000004", [])
    checkpoint, (remark,) = answers[-1]
    assert checkpoint is None and str(none / "checkpoints") in remark


def hold(folder):
    world = world_of_all()
    with lock_run_folder(folder, world) as remarks:
        try:
            with lock_run_folder(folder, world):
                message = None
        except UserError as error:
            message = str(error)
    with lock_run_folder(folder, world):  # free again
        return message, remarks


def test_all_ranks_report_that_the_folder_is_in_use(tmp_path):
    for message, remarks in run_ranks(hold, 2, tmp_path / "run"):
        assert message.startswith(f"{tmp_path / 'run'} is in use by another job, with rank 0 on ") and remarks == []


def hold_where_no_folder_can_be(folder):
    with pytest.raises(UserError, match="cannot be created or written .Not a directory.: set run.folder"):
        with lock_run_folder(folder / "file" / "run", world_of_all()):
            pass


def test_a_folder_that_cannot_be_created_is_reported_on_all_ranks(tmp_path):
    (tmp_path / "file").write_text("in the way")
    run_ranks(hold_where_no_folder_can_be, 2, tmp_path)
