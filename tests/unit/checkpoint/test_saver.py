"""The Saver copies the state at begin(), writes in the background, and raises a failure in the training's thread."""

import threading
from pathlib import Path

import pytest
import torch

from megachat.checkpoint.saver import Saver
from megachat.errors import UserError
from tests.limits import limit_s
from tests.unit.checkpoint.test_checkpoint import ALONE, whole


class Writer:
    """Waits for `go`, then records the tensors that it is given."""

    def __init__(self):
        self.go, self.began, self.wrote = threading.Event(), threading.Event(), []

    def __call__(self, pieces, axis) -> Path:
        self.began.set()
        assert self.go.wait(limit_s()) and axis is ALONE
        self.wrote.append({name: rectangles[0][2].clone() for name, (_, rectangles) in pieces.items()})
        return Path(f"saved {len(self.wrote)}")


def test_training_continues_and_the_copy_does_not_change(tmp_path):
    saver, write, weight = Saver(ALONE), Writer(), torch.arange(6.0).view(2, 3)
    saver.begin(whole({"model/a": weight}), write)
    saver.wait_copied()
    saver.reserve(whole({"model/a": weight}))  # a save of the first step was begun before
    weight += 1
    assert write.began.wait(limit_s()) and saver.finished() == [] and not saver.failed
    write.go.set()
    saver.begin(whole({"model/a": weight}), write)  # waits for the first
    assert len(write.wrote) >= 1
    saver.wait()
    assert [wrote["model/a"].tolist() for wrote in write.wrote] == [[[0, 1, 2], [3, 4, 5]], [[1, 2, 3], [4, 5, 6]]]
    first, second = saver.finished()
    assert (first.path, second.path) == (Path("saved 1"), Path("saved 2")) and saver.finished() == []
    assert 0 <= first.blocked_s <= first.total_s


def test_without_background_the_caller_waits(tmp_path):
    saver, write = Saver(ALONE, background=False), Writer()
    write.go.set()
    saver.begin(whole({"model/a": torch.ones(2)}), write)
    (saved,) = saver.finished()
    assert len(write.wrote) == 1 and 0 < saved.blocked_s <= saved.total_s


def test_a_save_that_fails_is_raised_once(tmp_path):
    def fail(pieces, axis):
        raise UserError("the disk is full")

    saver = Saver(ALONE)
    saver.begin(whole({"model/a": torch.ones(2)}), fail)
    with pytest.raises(UserError, match="the disk is full"):
        saver.wait()
    saver.wait()
    assert not saver.failed and saver.finished() == []


def test_tensors_may_change_once_they_are_copied():
    """The tensors are large, so that the copy is still running when they would change."""
    saver, write = Saver(ALONE), Writer()
    weights = {f"model/{name}": torch.zeros(2**24) for name in "abcd"}
    saver.begin(whole(weights), write)
    saver.wait_copied()
    for weight in reversed(weights.values()):
        weight.fill_(1)
    write.go.set()
    saver.wait()
    assert not any(copy.any() for copy in write.wrote[0].values())
