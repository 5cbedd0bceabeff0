"""A checkpoint folder on one process: JSON and tensors only, complete or refused, nothing in it executed."""

import hashlib
import io
import json
import multiprocessing
import os
import pickle
import signal
import zipfile
from pathlib import Path

import pytest
import torch

from megachat.checkpoint.facts import checkpoint_name, find_file_problems, read_facts, write_facts
from megachat.checkpoint.index import read_index
from megachat.checkpoint.resume import newest_complete
from megachat.checkpoint.save import remove_old_checkpoints, repair_checkpoints_folder, save_checkpoint
from megachat.checkpoint.storage import load_checkpoint
from megachat.convert.megachat import open_megachat
from megachat.errors import UserError
from megachat.files import file_sha256
from megachat.parallel.mesh import Axis
from tests.training import load_model_weights

ALONE = Axis("world", 1, 0, None, (0,))


class Attack:
    """What a pickle can do when it is read: here, make a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def whole(tensors: dict[str, torch.Tensor]) -> dict:
    return {
        name: (tuple(tensor.shape), [((0,) * tensor.ndim, tuple(tensor.shape), tensor)])
        for name, tensor in tensors.items()
    }


def some_tensors() -> dict[str, torch.Tensor]:
    return {"model/a": torch.arange(12.0).view(3, 4), "model/b": torch.randn(5), "muon/a/momentum": torch.randn(3, 4)}


def save(folder: Path, step: int = 7, tensors=None, facts=None, write_files=lambda _: None) -> Path:
    return save_checkpoint(folder, step, whole(tensors or some_tensors()), facts or {}, write_files, ALONE)


def read(path: Path, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    loaded = {name: torch.full_like(tensor, torch.nan) for name, tensor in tensors.items()}
    load_checkpoint(path, whole(loaded))
    return loaded


@pytest.mark.filterwarnings("error")
def test_tensors_come_back_and_the_index_is_json(tmp_path):
    tensors = some_tensors()
    path = save(tmp_path, 7, tensors, {"loop": {"step": 7}}, lambda folder: (folder / "extra").write_text("mine"))
    assert path == tmp_path / "step_000007" and sorted(os.listdir(tmp_path)) == ["step_000007"]
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in read(path, tensors).items())
    index = json.loads((path / "tensors.json").read_text())
    assert index.keys() == tensors.keys()
    assert (index["model/a"]["shape"], index["model/a"]["dtype"]) == ([3, 4], "float32")
    (piece,) = index["model/a"]["pieces"]
    assert (piece["offset"], piece["size"], piece["file"]) == ([0, 0], [3, 4], "__0_0.distcp")
    facts = read_facts(path)
    assert (facts["format_version"], facts["architecture_version"], facts["step"], facts["loop"]) == (
        2,
        2,
        7,
        {"step": 7},
    )
    sizes = {name: (path / name).stat().st_size for name in ("__0_0.distcp", "extra", "tensors.json")}
    assert facts["files"] == {name: {"bytes": size, "sha256": file_sha256(path / name)} for name, size in sizes.items()}
    assert (
        facts["files"]["extra"]["sha256"] == hashlib.sha256(b"mine").hexdigest()
        and find_file_problems(path, facts) == []
    )
    assert load_model_weights(path).keys() == {"a", "b"} and torch.equal(
        load_model_weights(path, ["b"])["b"], tensors["model/b"]
    )


def test_tensors_have_no_second_checksum_and_other_files_of_torch_keep_theirs(tmp_path):
    path = save(tmp_path)
    (piece,) = read_index(path)["model/a"]["pieces"]
    content = (path / piece["file"]).read_bytes()[piece["at"] :][: piece["bytes"]]
    others = io.BytesIO()
    torch.save(some_tensors(), others)
    checksums = [
        [entry.CRC for entry in zipfile.ZipFile(file).infolist() if "/data/" in entry.filename]
        for file in (io.BytesIO(content), others)
    ]
    assert not any(checksums[0]) and all(checksums[1])


def test_rectangles_of_a_whole_are_read_alone(tmp_path):
    tensors = some_tensors()
    path = save(tmp_path, tensors=tensors)
    part = torch.zeros(2, 3)
    load_checkpoint(path, {"model/a": ((3, 4), [((1, 1), (2, 3), part)])})
    assert torch.equal(part, tensors["model/a"][1:, 1:])


def test_saving_a_step_again_replaces_it(tmp_path):
    save(tmp_path, write_files=lambda folder: (folder / "old").write_text(""))
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
    assert torch.equal(read(path, tensors)["model/a"], tensors["model/a"]) and load_model_weights(path)
    assert not (tmp_path / "executed").exists()
    pickle.loads((path / ".metadata").read_bytes())
    assert (tmp_path / "executed").exists(), "the attack works where it is read"


def test_a_pickled_tensor_is_not_executed(tmp_path):
    tensors = some_tensors()
    path = save(tmp_path, tensors=tensors)
    content = io.BytesIO()
    torch.save(Attack(tmp_path / "executed"), content)
    entry = read_index(path)["model/a"]
    (path / "__0_0.distcp").write_bytes(content.getvalue())
    entry["pieces"][0] |= {"at": 0, "bytes": len(content.getvalue())}
    (path / "tensors.json").write_text(json.dumps({"model/a": entry}))
    with pytest.raises(UserError, match=r"could not be read on rank 0: .*[wW]eights"):
        read(path, {"model/a": tensors["model/a"]})
    assert not (tmp_path / "executed").exists()


def test_other_names_and_shapes_are_refused(tmp_path):
    path = save(tmp_path)
    with pytest.raises(UserError, match="has no tensor model/c: .*another model"):
        read(path, {"model/c": torch.zeros(1)})
    with pytest.raises(UserError, match=r"has model/a .*\[3, 4\].*\[3, 5\]: use the config"):
        read(path, {"model/a": torch.zeros(3, 5)})


@pytest.mark.parametrize("damage", [b"{", b"\0" * 100, b"[]", b'{"model/a": 3}'])
def test_an_index_that_is_none_is_refused(damage, tmp_path):
    path = save(tmp_path)
    (path / "tensors.json").write_bytes(damage)
    with pytest.raises(UserError, match="step_000007"):
        read(path, some_tensors())


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("pieces", lambda pieces: [], "has 0 of its 12 elements"),
        ("pieces", lambda pieces: [cut(pieces[0], [2, 4])], "has 8 of its 12 elements"),
        ("pieces", lambda pieces: [cut(pieces[0], [2, 4]), cut(pieces[0], [1, 4])], "overlap or lie outside"),
        ("pieces", lambda pieces: [pieces[0] | {"offset": [1, 0]}], "overlap or lie outside"),
        ("pieces", lambda pieces: [pieces[0] | {"offset": [-1, 0]}], "no list of integers of the right sign"),
        ("pieces", lambda pieces: [pieces[0] | {"offset": [False, 0]}], "no list of integers of the right sign"),
        ("pieces", lambda pieces: [pieces[0] | {"offset": [0.0, 0]}], "no list of integers of the right sign"),
        ("pieces", lambda pieces: [cut(pieces[0], [3, 4, 1])], "no list of integers of the right sign"),
        ("pieces", lambda pieces: [cut(pieces[0], [-3, -4])], "no list of integers of the right sign"),
        ("pieces", lambda pieces: [cut(pieces[0], [3.0, 4])], "no list of integers of the right sign"),
        ("pieces", lambda pieces: [pieces[0] | {"at": -1}], "no list of integers of the right sign"),
        ("pieces", lambda pieces: [pieces[0] | {"at": 10**30}], "outside the file"),
        ("pieces", lambda pieces: [pieces[0] | {"bytes": 10**6}], "outside the file"),
        ("pieces", lambda pieces: [pieces[0] | {"bytes": 8}], "in only 8 bytes of the file"),
        ("pieces", lambda pieces: [pieces[0] | {"file": "../7/__0_0.distcp"}], "outside the file"),
        ("pieces", lambda pieces: [pieces[0] | {"file": 3}], "no list of integers of the right sign"),
        ("pieces", lambda pieces: [pieces[0], pieces[0] | {"size": [0, 4]}], "no list of integers of the right sign"),
        ("pieces", lambda pieces: [[0]], "no list of integers of the right sign"),
        ("pieces", lambda pieces: 3, "no list of integers of the right sign"),
        ("shape", lambda shape: [3, 4.0], r"has the shape \[3, 4.0\]"),
        ("shape", lambda shape: [3, True], r"has the shape \[3, true\]"),
        ("shape", lambda shape: [-3, -4], r"has the shape \[-3, -4\]"),
        ("shape", lambda shape: [10**15, 10**15], "has 12 of its 1,000,000"),
        ("dtype", lambda dtype: "load", 'has the dtype "load", which is none of float64'),
        ("dtype", lambda dtype: [], r"has the dtype \[\]"),
    ],
)
def test_an_index_that_leaves_memory_uninitialized_is_refused(key, change, message, tmp_path):
    """Signed again or of a format without hashes, its numbers are all that can show it."""
    path = save(tmp_path)
    index = read_index(path)
    index["model/a"][key] = change(index["model/a"][key])
    (path / "tensors.json").write_text(json.dumps(index))
    for load in (lambda: read(path, some_tensors()), lambda: load_model_weights(path), lambda: open_megachat(path)):
        rewritten(path)
        with pytest.raises(UserError, match=f"tensors.json is refused: model/a .*{message}"):
            load()


def cut(piece: dict, size: list) -> dict:
    return piece | {"size": size}


def rewritten(path: Path) -> None:
    """Signs the checkpoint's files as they are."""
    facts = json.loads((path / "checkpoint.json").read_text())
    facts.pop("sha256")
    for name, entry in facts["files"].items():
        entry |= {"bytes": (path / name).stat().st_size, "sha256": file_sha256(path / name)}
    write_facts(path, facts)


def test_two_tensors_in_the_same_bytes_are_refused(tmp_path):
    path = save(tmp_path)
    index = read_index(path)
    index["model/a"]["pieces"][0] |= {key: index["muon/a/momentum"]["pieces"][0][key] for key in ("at", "bytes")}
    (path / "tensors.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="momentum has a rectangle in the same bytes of a file as model/a"):
        read(path, some_tensors())


def test_tensors_that_were_overwritten_are_refused(tmp_path):
    path = save(tmp_path)
    (path / "__0_0.distcp").write_bytes(b"\0" * (path / "__0_0.distcp").stat().st_size)
    read_facts(path)
    with pytest.raises(UserError, match="could not be read on rank 0"):
        read(path, some_tensors())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is not a complete checkpoint: it has no checkpoint.json"),
        ('{"format_version": 3, "step": 7}', "has format version 3, newer than .* 2: update megachat"),
        (
            '{"format_version": 2, "architecture_version": 3, "step": 7}',
            "has architecture version 3, newer than .* 2: update megachat",
        ),
        (
            '{"format_version": 2, "architecture_version": 1, "step": 7, "files": {}, "sha256": "0"}',
            "does not match its SHA-256",
        ),
        ('{"format_version": 2, "architecture_version": 1, "step": 7, "files": {}}', "checkpoint.json cannot be read"),
        ('{"format_version": 0, "step": 7, "files": {}}', "checkpoint.json cannot be read"),
        ('{"format_version": 1, "fi', "checkpoint.json cannot be read"),
        ('{"format_version": 1, "step": 7}', "checkpoint.json cannot be read"),
        ("[1, 2]", "checkpoint.json cannot be read"),
        ('{"format_version": 1, "step": 7, "files": {"gone": 5}}', "is incomplete: gone is missing"),
        (
            '{"format_version": 1, "step": 7, "files": {"tensors.json": 5}}',
            r"is incomplete: tensors.json has \d+ bytes, not 5",
        ),
    ],
)
def test_a_folder_that_is_no_complete_checkpoint_is_refused(content, message, tmp_path):
    path = save(tmp_path)
    (path / "checkpoint.json").unlink()
    if content is not None:
        (path / "checkpoint.json").write_text(content)
    with pytest.raises(UserError, match=message):
        read_facts(path)
    with pytest.raises(UserError):
        read_facts(path / "checkpoint.json")  # a file, or nothing


def test_the_newest_complete_checkpoint_has_the_highest_step(tmp_path):
    assert newest_complete(tmp_path / "none") == (None, [])
    for step in (2, 10, 999_999, 1_000_000):
        save(tmp_path, step)
    (tmp_path / "step_1000001.tmp").mkdir()
    (tmp_path / "step_2000000").write_text("a file")
    (tmp_path / "step_last").mkdir()
    assert newest_complete(tmp_path) == (tmp_path / "step_1000000", [])
    (tmp_path / "step_1000000" / "tensors.json").unlink()
    (tmp_path / "step_999999" / "checkpoint.json").unlink()
    newest, problems = newest_complete(tmp_path)
    assert newest == tmp_path / "step_000010"
    assert [reason.split()[0] for reason in problems] == [
        str(tmp_path / "step_1000000"),
        str(tmp_path / "step_999999"),
    ]
    assert checkpoint_name(10) == "step_000010"


def test_a_disk_that_is_too_small_is_reported_before_writing(tmp_path):
    save(tmp_path)
    huge = torch.empty(1).expand(2**50)  # 4 PiB that take no memory
    with pytest.raises(
        UserError, match=r"could not be saved by rank 0: the disk has \S+ MB free and the checkpoint takes \S+ MB"
    ):
        save(tmp_path, 8, {"model/huge": huge})
    assert os.listdir(tmp_path) == ["step_000007"]


@pytest.mark.parametrize("error", [OSError("no cable"), ValueError("odd"), KeyError("gone")])
def test_what_fails_while_writing_leaves_no_trace(error, tmp_path):
    def fail(folder: Path) -> None:
        (folder / "half").write_text("")
        raise error

    before = save(tmp_path)
    with pytest.raises(
        UserError,
        match="step_000008 could not be saved by rank 0: .*(no cable|odd|gone).*earlier checkpoints are untouched",
    ):
        save(tmp_path, 8, write_files=fail)
    assert os.listdir(tmp_path) == ["step_000007"] and read_facts(before)


@pytest.mark.parametrize(
    ("rectangles", "message"),
    [([(0, 3), (2, 3)], "overlapping"), ([(0, 3)], "3 of the 5 elements of model/a")],
)
def test_overlaps_and_holes_are_refused(rectangles, message, tmp_path):
    pieces = {"model/a": ((5,), [((start,), (size,), torch.zeros(size)) for start, size in rectangles])}
    with pytest.raises(UserError, match=f"could not be saved by rank 0: .*{message}"):
        save_checkpoint(tmp_path, 1, pieces, {}, lambda _: None, ALONE)
    assert os.listdir(tmp_path) == []


def damage(path: Path) -> None:
    """Other content of the same size."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_every_file_that_was_changed_is_named(tmp_path):
    path = save(
        tmp_path, write_files=lambda folder: [(folder / name).write_text(name) for name in ("first", "second", "third")]
    )
    facts = read_facts(path)
    damage(path / "__0_0.distcp")
    damage(path / "second")
    (path / "third").unlink()
    (path / "first").write_text("longer than it was")
    expected = [
        "__0_0.distcp does not match its SHA-256",
        "first has 18 bytes, not 5",
        "second does not match its SHA-256",
        "third is missing",
    ]
    assert [problem.split(":")[0] for problem in sorted(find_file_problems(path, facts))] == expected
    assert [problem.split(":")[0] for problem in find_file_problems(path, facts, {"second"})] == expected[2:3]
    text = (path / "checkpoint.json").read_text()
    (path / "checkpoint.json").write_text(text.replace('"step": 7', '"step": 8'))
    with pytest.raises(UserError, match="checkpoint.json does not match its SHA-256"):
        read_facts(path)


def test_a_format_without_hashes_is_compared_by_size(tmp_path):
    path = save(tmp_path, 7, write_files=lambda folder: (folder / "extra").write_text("mine"))
    facts = {
        "format_version": 1,
        "step": 7,
        "files": {file.name: file.stat().st_size for file in path.iterdir() if file.name != "checkpoint.json"},
    }
    (path / "checkpoint.json").write_text(json.dumps(facts))
    upgraded = read_facts(path)
    assert upgraded["files"]["extra"] == {"bytes": 4, "sha256": None} and (
        upgraded["format_version"],
        upgraded["ledger"],
    ) == (2, None)
    damage(path / "extra")
    assert find_file_problems(path, upgraded) == []
    (path / "extra").write_text("longer")
    assert find_file_problems(path, upgraded) == ["extra has 6 bytes, not 4"]


@pytest.mark.parametrize(
    ("last", "every", "stay"),
    [
        (None, None, [1, 2, 3, 4, 6, 8, 9]),
        (2, None, [6, 8, 9]),
        (1, None, [8, 9]),
        (2, 3, [3, 6, 8, 9]),
        (9, 3, [1, 2, 3, 4, 6, 8, 9]),
    ],
)
def test_retention_keeps_the_last_and_multiples_and_never_what_is_newer(last, every, stay, tmp_path):
    for step in (1, 2, 3, 4, 6, 8, 9):
        save(tmp_path, step)
    (tmp_path / "step_000005").mkdir()  # not complete: not counted, not touched
    remove_old_checkpoints(tmp_path, last, every, newest=8)
    assert sorted(int(path.name[5:]) for path in tmp_path.glob("step_*") if (path / "checkpoint.json").exists()) == stay
    assert (tmp_path / "step_000005").is_dir()


def remove_and_die(folder: Path) -> None:
    """Removes old checkpoints, and is killed when it has removed two files."""
    unlink, removed = os.unlink, []

    def dying(path, **options):
        unlink(path, **options)
        removed.append(path)
        if len(removed) == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    os.unlink = dying
    remove_old_checkpoints(folder, 1, None, 2)


def test_a_kill_during_a_removal_leaves_nothing_that_stays(tmp_path):
    for step in (1, 2):
        save(tmp_path, step)
    removing = multiprocessing.get_context("fork").Process(target=remove_and_die, args=(tmp_path,))
    removing.start()
    removing.join()
    assert removing.exitcode == -signal.SIGKILL
    (left,) = (path for path in tmp_path.iterdir() if path.name != "step_000002")
    assert any(left.iterdir()), "it was killed in the middle"
    repair_checkpoints_folder(tmp_path)
    assert os.listdir(tmp_path) == ["step_000002"]


def test_what_a_kill_leaves_is_put_in_order(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    (tmp_path / "step_000002").rename(
        tmp_path / "step_000002.old"
    )  # killed between the two renames of a step saved again
    (tmp_path / "step_000001").rename(tmp_path / "step_000001.old")
    save(tmp_path, 1)
    (tmp_path / "step_000001.old").mkdir(exist_ok=True)  # killed while the replaced one was removed
    (tmp_path / "step_000009.tmp").mkdir()
    repair_checkpoints_folder(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["step_000001", "step_000002", "step_000003"]
    assert all(read_facts(path) for path in tmp_path.iterdir())
    repair_checkpoints_folder(tmp_path / "none")
