"""The tools of studies on real trainings: a ladder of two runs, continued, and what it leaves; runs of two layouts side
by side; the report that a job writes at its end.
"""

import importlib.util
import json
import shutil
import sys

import pytest

from megachat.commands import main as cli
from megachat.errors import UserError
from megachat.studies import trials
from megachat.studies.comparison import compare_curves, load_runs
from megachat.studies.runs import find_runs
from tests.runs.forked import environment, run_forked
from tests.runs.job import STEPS, command, make_place
from tests.unit.studies.test_runs import make_run

_FAILS = "import sys; print('start'); print('error: no such folder', file=sys.stderr); sys.exit(2)"
_DIVERGES = "import sys; print('error: step 7: the loss is nan on rank 0 (host); this step'); sys.exit(2)"
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


def test_one_recipe_on_two_layouts_is_equal_on_steps(one, two):
    """Six steps are not timed by the speedrun's clock, so time is not known; only the layout is warned about."""
    comparison = compare_curves(load_runs([one]), load_runs([two]))
    axes = comparison["axes"]
    assert axes["steps"]["value"] == pytest.approx(1, abs=2e-3) and axes["flops"]["value"] == pytest.approx(1, abs=2e-3)
    assert axes["seconds"] is None
    named = {warning.partition(":")[0] for warning in comparison["warnings"]}
    assert named - {"cropped share"} == {"layout"}, "each rank counts its rows, and these are few"


def test_a_job_of_two_ranks_writes_its_report_and_survives_a_failure(one, shared_place, tmp_path):
    """Both jobs continue a finished run, so nothing is trained; the second cannot write its report."""
    if importlib.util.find_spec("plotly") is None:
        pytest.skip("plotly is not installed: pip install 'megachat[report]'")
    shutil.copytree(one, tmp_path / "runs/one")
    program = command(shared_place, "one", "--resume", "auto", "--set", "log.report=true")
    program += ["--set", f"run.folder={tmp_path / 'runs'}"]
    done, report = run_forked(program, 2), tmp_path / "runs/one/report.html"
    assert done.status == 0, done.err
    assert done.out.count(f"wrote {report}, ") == 1 and report.stat().st_size < 6e6
    assert "<td>finished: all " in report.read_text() and "Matrices that each rank orthogonalizes" in report.read_text()
    report.unlink()
    report.mkdir()
    done = run_forked(program, 2)
    assert done.status == 0 and f"{report} is not written (IsADirectoryError" in done.out, (done.out, done.err)


@pytest.mark.parametrize(
    "program, problem, kind",
    [
        (_FAILS, "no such folder", UserError),
        (_DIES, "Killed by something", UserError),
        (_DIVERGES, "step 7: the loss is nan on rank 0 .host.; this step", trials.Diverged),
    ],
)
def test_a_training_that_fails_is_named_with_its_error(program, problem, kind, tmp_path, monkeypatch):
    monkeypatch.setattr(trials, "_launcher", lambda ranks: [sys.executable, "-c", program])
    train = trials.trainer("demo", tmp_path)
    make_run(tmp_path / "first", done=3, saved=())
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/first.log").write_text("error: step 3: the loss is nan on rank 0, of an earlier start\n")
    with pytest.raises(
        UserError, match=rf"the training of first failed: {problem} \(.*its output is in .*first.log\)"
    ) as caught:
        train(trials.Trial("first", ()), None)
    assert caught.type is kind
