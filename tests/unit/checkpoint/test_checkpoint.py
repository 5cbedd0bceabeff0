"""A checkpoint folder on one process: JSON and tensors only, complete or refused, nothing in it executed."""

import io
import json
import os
import pickle
from pathlib import Path

import pytest
import torch

from megachat.checkpoint.load import load_checkpoint, load_model, newest_complete, read_facts
from megachat.checkpoint.save import checkpoint_name, save_checkpoint
from megachat.checkpoint.storage import read_index
from megachat.errors import UserError
from megachat.parallel.mesh import Axis

ALONE = Axis("world", 1, 0, None, (0,))


class Attack:
    """What a pickle can do when it is read: here, make a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def whole(tensors: dict[str, torch.Tensor]) -> dict:
    return {name: (tuple(tensor.shape), [((0,) * tensor.ndim, tuple(tensor.shape), tensor)]) for name, tensor in tensors.items()}


def some_tensors() -> dict[str, torch.Tensor]:
    return {"model/a": torch.arange(12.0).view(3, 4), "model/b": torch.randn(5), "muon/a/momentum": torch.randn(3, 4)}


def save(folder: Path, step: int = 7, tensors=None, facts=None, own=lambda _: None) -> Path:
    return save_checkpoint(folder, step, whole(tensors or some_tensors()), facts or {}, own, ALONE)


def read(path: Path, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    found = {name: torch.full_like(tensor, torch.nan) for name, tensor in tensors.items()}
    load_checkpoint(path, whole(found))
    return found


@pytest.mark.filterwarnings("error")
def test_tensors_come_back_and_the_index_is_json(tmp_path):
    tensors = some_tensors()
    path = save(tmp_path, 7, tensors, {"loop": {"step": 7}}, lambda folder: (folder / "own").write_text("mine"))
    assert path == tmp_path / "step_000007" and sorted(os.listdir(tmp_path)) == ["step_000007"]
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in read(path, tensors).items())
    index = json.loads((path / "tensors.json").read_text())
    assert index.keys() == tensors.keys()
    assert (index["model/a"]["shape"], index["model/a"]["dtype"]) == ([3, 4], "float32")
    (piece,) = index["model/a"]["pieces"]
    assert (piece["offset"], piece["size"], piece["file"]) == ([0, 0], [3, 4], "__0_0.distcp")
    facts = read_facts(path)
    assert (facts["format_version"], facts["step"], facts["loop"]) == (1, 7, {"step": 7})
    assert facts["files"] == {name: (path / name).stat().st_size for name in ("__0_0.distcp", "own", "tensors.json")}
    assert load_model(path).keys() == {"a", "b"} and torch.equal(load_model(path, ["b"])["b"], tensors["model/b"])


def test_rectangles_of_a_whole_are_read_on_their_own(tmp_path):
    tensors = some_tensors()
    path = save(tmp_path, tensors=tensors)
    part = torch.zeros(2, 3)
    load_checkpoint(path, {"model/a": ((3, 4), [((1, 1), (2, 3), part)])})
    assert torch.equal(part, tensors["model/a"][1:, 1:])


def test_saving_a_step_again_replaces_it(tmp_path):
    save(tmp_path, own=lambda folder: (folder / "old").write_text(""))
    (tmp_path / "step_000007.tmp").mkdir()
    (tmp_path / "step_000007.tmp" / "rest").write_text("of a save that was killed")
    tensors = some_tensors()
    path = save(tmp_path, tensors=tensors)
    assert sorted(os.listdir(tmp_path)) == ["step_000007"]
    assert sorted(os.listdir(path)) == ["__0_0.distcp", "checkpoint.json", "tensors.json"]
    assert torch.equal(read(path, tensors)["model/b"], tensors["model/b"])


def test_a_pickled_index_is_not_read(tmp_path):
    tensors = some_tensors()
    path = save(tmp_path, tensors=tensors)
    assert not (path / ".metadata").exists()
    (path / ".metadata").write_bytes(pickle.dumps(Attack(tmp_path / "executed")))
    read_facts(path)
    assert torch.equal(read(path, tensors)["model/a"], tensors["model/a"]) and load_model(path)
    assert not (tmp_path / "executed").exists()
    pickle.loads((path / ".metadata").read_bytes())
    assert (tmp_path / "executed").exists(), "the attack works where it is read"


def test_a_pickled_tensor_is_not_executed(tmp_path):
    tensors = some_tensors()
    path = save(tmp_path, tensors=tensors)
    content = io.BytesIO()
    torch.save(Attack(tmp_path / "executed"), content)
    (path / "__0_0.distcp").write_bytes(content.getvalue())
    index = read_index(path)
    for entry in index.values():
        entry["pieces"][0] |= {"at": 0, "bytes": len(content.getvalue())}
    (path / "tensors.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"could not be read on rank 0: .*[wW]eights"):
        read(path, tensors)
    assert not (tmp_path / "executed").exists()


def test_other_names_and_shapes_are_refused(tmp_path):
    path = save(tmp_path)
    with pytest.raises(UserError, match="has no model/c: it is a checkpoint of another model"):
        read(path, {"model/c": torch.zeros(1)})
    with pytest.raises(UserError, match=r"has model/a as \[3, 4\], the model as \[3, 5\]"):
        read(path, {"model/a": torch.zeros(3, 5)})


@pytest.mark.parametrize("damage", [b"{", b"\0" * 100, b"[]", b'{"model/a": 3}'])
def test_an_index_that_is_none_is_refused(damage, tmp_path):
    path = save(tmp_path)
    (path / "tensors.json").write_bytes(damage)
    with pytest.raises(UserError, match="step_000007"):
        read(path, some_tensors())


def test_tensors_that_were_overwritten_are_refused(tmp_path):
    path = save(tmp_path)
    (path / "__0_0.distcp").write_bytes(b"\0" * (path / "__0_0.distcp").stat().st_size)
    read_facts(path)
    with pytest.raises(UserError, match="could not be read on rank 0"):
        read(path, some_tensors())


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "is not a complete checkpoint: it has no checkpoint.json"),
        ('{"format_version": 2, "step": 7}', "has format 2, newer than this version's 1: update megachat"),
        ('{"format_version": 1, "fi', "checkpoint.json cannot be read"),
        ('{"format_version": 1, "step": 7}', "checkpoint.json cannot be read"),
        ("[1, 2]", "checkpoint.json cannot be read"),
        ('{"format_version": 1, "files": {"gone": 5}}', "is cut short: gone is missing"),
        ('{"format_version": 1, "files": {"tensors.json": 5}}', r"is cut short: tensors.json has \d+ bytes, not 5"),
    ],
)
def test_a_folder_that_is_no_complete_checkpoint_is_refused(content, told, tmp_path):
    path = save(tmp_path)
    (path / "checkpoint.json").unlink()
    if content is not None:
        (path / "checkpoint.json").write_text(content)
    with pytest.raises(UserError, match=told):
        read_facts(path)
    with pytest.raises(UserError):
        read_facts(path / "checkpoint.json")  # a file, or nothing


def test_the_newest_complete_checkpoint_is_found_by_step(tmp_path):
    assert newest_complete(tmp_path / "none") == (None, [])
    for step in (2, 10, 999_999, 1_000_000):
        save(tmp_path, step)
    (tmp_path / "step_1000001.tmp").mkdir()
    (tmp_path / "step_2000000").write_text("a file")
    (tmp_path / "step_last").mkdir()
    assert newest_complete(tmp_path) == (tmp_path / "step_1000000", [])
    (tmp_path / "step_1000000" / "tensors.json").unlink()
    (tmp_path / "step_999999" / "checkpoint.json").unlink()
    found, passed_over = newest_complete(tmp_path)
    assert found == tmp_path / "step_000010"
    assert [reason.split()[0] for reason in passed_over] == [str(tmp_path / "step_1000000"), str(tmp_path / "step_999999")]
    assert checkpoint_name(10) == "step_000010"


def test_a_disk_that_is_too_small_is_told_before_writing(tmp_path):
    save(tmp_path)
    huge = torch.empty(1).expand(2**50)  # 4 PiB that take no memory
    with pytest.raises(UserError, match=r"could not be saved by rank 0: the disk has \S+ MB free and the checkpoint takes \S+ MB"):
        save(tmp_path, 8, {"model/huge": huge})
    assert os.listdir(tmp_path) == ["step_000007"]


@pytest.mark.parametrize("error", [OSError("no cable"), ValueError("odd"), KeyError("gone")])
def test_what_fails_while_writing_leaves_no_trace(error, tmp_path):
    def fail(folder: Path) -> None:
        (folder / "half").write_text("")
        raise error

    before = save(tmp_path)
    with pytest.raises(UserError, match="step_000008 could not be saved by rank 0: .*(no cable|odd|gone).*earlier checkpoints are untouched"):
        save(tmp_path, 8, own=fail)
    assert os.listdir(tmp_path) == ["step_000007"] and read_facts(before)


@pytest.mark.parametrize(("rectangles", "told"), [([(0, 3), (2, 3)], "overlapping"), ([(0, 3)], "the ranks hold 3 of the 5 elements of model/a")])
def test_overlaps_and_holes_are_refused(rectangles, told, tmp_path):
    pieces = {"model/a": ((5,), [((start,), (size,), torch.zeros(size)) for start, size in rectangles])}
    with pytest.raises(UserError, match=f"could not be saved by rank 0: .*{told}"):
        save_checkpoint(tmp_path, 1, pieces, {}, lambda _: None, ALONE)
    assert os.listdir(tmp_path) == []
