"""A run folder follows its user: to the place where it lies, and to the checkpoint that was named last."""

import json
import os
from pathlib import Path

import pytest

from megachat.checkpoint.resume import find_checkpoint, newest_complete
from megachat.checkpoint.run_folder import config_in_place, follow_checkpoint
from megachat.checkpoint.save import remove_old_checkpoints, repair_checkpoints_folder
from megachat.config import load_config, save_config
from megachat.convert.megachat import find_step_folder
from megachat.errors import UserError
from tests.unit.checkpoint.test_checkpoint import save


def make_run(folder: Path, steps) -> Path:
    folder.mkdir(exist_ok=True)
    for step in steps:
        save(folder / "checkpoints", step)
        for kind, name in (("samples", ""), ("evaluations", "_in_training")):
            (folder / kind).mkdir(exist_ok=True)
            (folder / kind / f"step_{step:06d}{name}.json").write_text("{}")
    (folder / "metrics.jsonl").write_text("curve")
    return folder / "checkpoints"


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def auto(run: Path) -> Path:
    return find_checkpoint(run, "auto")[0]


def test_auto_follows_to_an_earlier_step_and_back(tmp_path):
    folder = make_run(tmp_path, (4, 8, 12))
    (line,) = follow_checkpoint(tmp_path, folder / "step_000004", 4)
    assert names(folder) == ["step_000004", "step_000008.aside", "step_000012.aside"]
    assert names(tmp_path / "samples") == ["step_000004.json", "step_000008.json.aside", "step_000012.json.aside"]
    assert "step_000008_in_training.json.aside" in names(tmp_path / "evaluations")
    assert (tmp_path / "metrics.jsonl.aside").read_text() == "curve"
    assert "continues from step 4" in line and "checkpoints/step_000012.aside" in line and "metrics.jsonl.aside" in line
    assert auto(tmp_path) == folder / "step_000004"
    repair_checkpoints_folder(folder)
    save(folder, 8)  # the new branch
    follow_checkpoint(tmp_path, folder / "step_000004", 4)
    assert names(folder) == ["step_000004", "step_000008.aside", "step_000008.aside.2", "step_000012.aside"]
    save(folder, 12)
    (tmp_path / "metrics.jsonl").write_text("other curve")
    lines = follow_checkpoint(tmp_path, folder / "step_000012.aside", 12)
    expected = ["step_000004", "step_000008", "step_000008.aside.2", "step_000012", "step_000012.aside.3"]
    assert names(folder) == expected and "is step_000012 again" in lines[-1]
    assert names(tmp_path / "samples") == ["step_000004.json", "step_000008.json", "step_000012.json"]
    assert auto(tmp_path) == folder / "step_000012"
    assert (tmp_path / "metrics.jsonl").read_text() == "curve", "the results are of the branch of the checkpoint"
    assert (tmp_path / "metrics.jsonl.aside.3").read_text() == "other curve"


def test_nothing_happens_to_a_run_that_continues_from_its_newest(tmp_path):
    folder = make_run(tmp_path, (4, 8))
    before = sorted(tmp_path.rglob("*"))
    (tmp_path / "link").symlink_to(folder)
    assert follow_checkpoint(tmp_path, tmp_path / "link" / "step_000008", 8) == []
    (tmp_path / "link").unlink()
    assert sorted(tmp_path.rglob("*")) == before


def test_auto_follows_to_a_checkpoint_of_another_run_before_the_first_save(tmp_path):
    other = make_run(tmp_path / "other", (4,)) / "step_000004"
    run = tmp_path / "run"
    folder = make_run(run, (2, 8))
    for _ in range(2):  # the same command again
        follow_checkpoint(run, other, 4)
        assert auto(run).resolve() == other and names(folder) == ["step_000002", "step_000004", "step_000008.aside"]
    save(folder, 4)
    assert not (folder / "step_000004").is_symlink() and newest_complete(other.parent) == (other, [])
    (tmp_path / "new").mkdir()
    assert follow_checkpoint(tmp_path / "new", other, 4) == [] and auto(tmp_path / "new").resolve() == other


def test_retention_removes_a_link_and_not_what_it_leads_to(tmp_path):
    store, folder = tmp_path / "store", tmp_path / "checkpoints"
    real = save(store, 1)
    save(folder, 2)
    (folder / "step_000001").symlink_to(real)
    (folder / "step_000000.tmp").symlink_to(real)  # what earlier versions left
    remove_old_checkpoints(folder, 1, None, newest=2)
    repair_checkpoints_folder(folder)
    assert names(folder) == ["step_000002"] and newest_complete(store) == (real, [])


def test_auto_that_finds_nothing_says_where_it_looked(tmp_path):
    checkpoint, (line,) = find_checkpoint(tmp_path, "auto")
    assert checkpoint is None and f"no checkpoint in {tmp_path}/checkpoints" in line and "step 0" in line
    assert find_checkpoint(tmp_path, None) == (None, [])


@pytest.fixture
def moved(tmp_path, monkeypatch) -> Path:
    """A run folder that was renamed from runs/old, with the tokenizer in it."""
    monkeypatch.chdir(tmp_path)
    values = {"run": {"name": "old", "folder": "runs"}, "data": {"tokenizer": "runs/old/tokenizer", "folder": "data"}}
    (tmp_path / "c.json").write_text(json.dumps(values))
    folder = tmp_path / "runs" / "new"
    (folder / "checkpoints").mkdir(parents=True)
    save_config(load_config("c.json"), folder / "config.json")
    return folder


def test_a_moved_run_folder_is_continued_where_it_lies(moved):
    path = Path("runs/new/config.json")
    config, (line,) = config_in_place(load_config(path), path, ["model.depth=3"])
    assert (config.run.folder, config.run.name) == (str(moved.parent), "new")
    assert (config.data.tokenizer, config.data.folder) == (str(moved / "tokenizer"), "data")
    assert str(moved.parent / "old") in line and str(moved) in line


def test_a_config_is_taken_as_it_is_where_it_names_its_place_or_is_no_run_folder(moved):
    path = moved / "config.json"
    for override in ("run.name=third", "run.folder=elsewhere"):
        assert config_in_place(load_config(path, [override]), path, [override])[1] == []
    moved.rename(moved.with_name("old"))
    path = Path("runs/old/config.json")
    assert config_in_place(load_config(path), path, []) == (load_config(path), [])
    Path("config.json").write_text("{}")
    assert config_in_place(load_config("config.json"), Path("config.json"), [])[1] == []


@pytest.mark.parametrize(
    ("resume", "fact"),
    [
        ("", "--resume is empty"),
        ("auto2", "there is no such folder"),
        ("run", "this is a run folder; give auto, or one of its checkpoints, such as .*step_000008"),
        ("run/samples", "not a complete checkpoint"),
    ],
)
def test_what_cannot_be_resumed_is_named(resume, fact, tmp_path, monkeypatch):
    make_run(tmp_path / "run", (4, 8))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=fact):
        find_checkpoint(tmp_path / "run", resume)


def test_a_damaged_newest_checkpoint_is_not_passed_over_by_tools_and_is_kept_by_a_save(tmp_path):
    folder = make_run(tmp_path, (4, 8))
    (damaged,) = (folder / "step_000008").glob("*.distcp")
    damaged.write_bytes(damaged.read_bytes()[:-5])
    with pytest.raises(UserError, match=r"newest checkpoint .* is damaged: .*step_000008.*step_000004"):
        find_step_folder(tmp_path)
    save(folder, 8)
    assert (folder / "step_000008.damaged" / damaged.name).exists() and auto(tmp_path) == folder / "step_000008"
    assert find_step_folder(tmp_path) == folder / "step_000008"
