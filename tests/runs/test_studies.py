"""The tools of studies on real trainings: a ladder of two runs, continued, and what it leaves."""

import json
import sys

import pytest

from megachat.commands import main as cli
from megachat.errors import UserError
from megachat.studies import trials
from megachat.studies.runs import find_runs
from tests.runs.forked import environment
from tests.runs.job import STEPS, command, make_place

_FAILS = "import sys; print('start'); print('error: no such folder', file=sys.stderr); sys.exit(2)"
_DIES = "print('start'); print('Killed by something'); raise SystemExit(137)"


@pytest.fixture
def place(tmp_path, monkeypatch):
    for key, value in environment().items():
        monkeypatch.setenv(key, value)
    return make_place(tmp_path)


def test_a_ladder_trains_its_runs_and_continues(place, capsys):
    config = command(place, "study", config={"evaluate": {"every": 1, "prompts": []}})[2]
    out = place.runs.parent / "ladder"
    words = ["--config", config, "--set", "optimizer.matrix_lr=0.1", "--depths", "2", "--out", str(out), "--json"]
    cli.start("ladder", words, "megachat")
    (row,) = json.loads(capsys.readouterr().out)["rungs"]
    runs = {run.folder.name: run for run in find_runs(out)}
    assert {name: run.state for name, run in runs.items()} == {"d2_base_s42": "finished", "d2_change_s42": "finished"}
    assert runs["d2_change_s42"].config["optimizer"]["matrix_lr"] == 0.1
    assert row["base"] == runs["d2_base_s42"].values("val/bpb")[-1] != row["change"]
    before = {path: path.stat().st_mtime_ns for path in out.rglob("step_*")}
    cli.start("ladder", words, "megachat")
    assert {path: path.stat().st_mtime_ns for path in out.rglob("step_*")} == before, "nothing is trained again"
    assert all(run.step == STEPS for run in runs.values())


@pytest.mark.parametrize("program, problem", [(_FAILS, "no such folder"), (_DIES, "Killed by something")])
def test_a_training_that_fails_is_named_with_its_error(program, problem, tmp_path, monkeypatch):
    monkeypatch.setattr(trials, "_launcher", lambda ranks: [sys.executable, "-c", program])
    train = trials.trainer("demo", tmp_path)
    with pytest.raises(UserError, match=rf"the training of first failed: {problem} \(.*first.log has all it printed\)"):
        train(trials.Trial("first", ()), None)
