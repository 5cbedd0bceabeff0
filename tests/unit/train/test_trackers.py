"""The trackers get the dictionary of metrics.jsonl, continue a resumed run's curves, and end no run."""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

from megachat.errors import UserError
from megachat.settings import LogConfig
from megachat.train.trackers import KINDS, check_trackers
from tests.unit.train.test_metrics import lines, open_metrics, train_line

STAND_IN = """
starts, logged, finished = [], [], []
refuse = ""
def fail(call):
    if refuse == call: raise RuntimeError("no account")
class Run:
    last, axis, step_metric = -1, None, {}
    def define_metric(self, name, step_metric=None): self.step_metric[name] = step_metric
    def log(self, values, step=None):
        fail("log")
        step = self.last + 1 if step is None else step
        if step > self.last:  # wandb ignores others, with a warning
            logged.append((values.get(self.step_metric.get("*")), values))
        self.last = max(step, self.last)
    def finish(self):
        fail("finish")
        finished.append(True)
def init(**settings):
    starts.append(settings)
    fail("init")
    return Run()
"""


@pytest.fixture
def wandb(tmp_path, monkeypatch):
    """A module of this name in front of any that is installed."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "wandb.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    import wandb

    yield wandb
    del sys.modules["wandb"]


def test_wandb_gets_the_same_dictionary(wandb, tmp_path):
    metrics = open_metrics(tmp_path, wandb="offline")
    metrics.record(train_line(0))
    metrics.record({"step": 1, "val/bpb": 1.5})
    metrics.close()
    assert all(values.pop("time") for _, values in wandb.logged)
    assert [values for _, values in wandb.logged] == lines(tmp_path) == [train_line(0), {"step": 1, "val/bpb": 1.5}]
    assert [step for step, _ in wandb.logged] == [0, 1]
    (start,) = wandb.starts
    assert (start["project"], start["name"], start["mode"], start["config"]) == (
        "project",
        "name",
        "offline",
        {"plan": {"steps": 10}},
    )
    assert start["dir"] == str(tmp_path) and wandb.finished == [True]


def test_wandb_drops_nothing_that_is_run_again(wandb, tmp_path):
    metrics = open_metrics(tmp_path, wandb="offline")
    for step in (0, 1, 2, 3, 2, 3, 3):
        metrics.record(train_line(step))
    metrics.close()
    assert [step for step, _ in wandb.logged] == [0, 1, 2, 3, 2, 3, 3], "in their places on the axis `step`"


def test_wandb_continues_the_curve_of_a_resumed_run_only(wandb, tmp_path):
    for first_step in (0, 4, 0):
        open_metrics(tmp_path, first_step, wandb="online").close()
    first, resumed, anew = [start["id"] for start in wandb.starts]
    assert first == resumed != anew and len(first) >= 8 and all(start["resume"] == "allow" for start in wandb.starts)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"two words", b"a/b"])
def test_an_id_of_wandb_that_is_none_is_set_aside(content, wandb, tmp_path, capsys):
    (tmp_path / "wandb_id.txt").write_bytes(content)
    open_metrics(tmp_path, 4, wandb="online").close()
    assert (tmp_path / "wandb_id.txt.damaged").read_bytes() == content and "is damaged" in capsys.readouterr().out
    assert wandb.starts[0]["id"] == (tmp_path / "wandb_id.txt").read_text().strip() != ""


@pytest.mark.parametrize("call", ["init", "log", "finish"])
def test_a_wandb_that_fails_ends_no_training(call, wandb, tmp_path, capsys):
    wandb.refuse = call
    metrics = open_metrics(tmp_path, wandb="online")
    for step in range(3):
        metrics.record(train_line(step))
    metrics.close()
    assert lines(tmp_path) == [train_line(step) for step in range(3)]
    assert capsys.readouterr().out == (
        "wandb failed (RuntimeError: no account): the run continues without it, and metrics.jsonl has everything; "
        "run `wandb login`, or set log.wandb=offline or off\n"
    )


FAILED = "the run continues without it, and metrics.jsonl has everything; "


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("call", ["start", "log", "finish"])
def test_a_tracker_that_fails_ends_neither_the_run_nor_the_others(call, kind, wandb, tmp_path, monkeypatch, capsys):
    """Each kind in turn fails, beside a wandb or, when that fails, beside another kind."""

    class Planted:
        seen = []

        def __init__(self, name):
            self.name = name
            self.fail("start")

        def fail(self, where):
            if self.name == kind.name and call == where:
                raise RuntimeError("full")

        def log(self, values):
            self.fail("log")
            self.seen.append((self.name, values["step"]))

        def finish(self):
            self.fail("finish")
            self.seen.append((self.name, "end"))

    planted = [each._replace(start=lambda log, run, name=each.name: Planted(name)) for each in KINDS]
    monkeypatch.setattr("megachat.train.trackers.KINDS", planted)
    metrics = open_metrics(tmp_path, wandb="offline", tensorboard=True, trackio=True)
    for step in range(3):
        metrics.record(train_line(step))
    metrics.close()
    assert lines(tmp_path) == [train_line(step) for step in range(3)]
    assert capsys.readouterr().out == f"{kind.name} failed (RuntimeError: full): {FAILED}{kind.remedy}\n"
    for each in KINDS:
        steps = [step for name, step in Planted.seen if name == each.name]
        expected = [0, 1, 2] if call == "finish" else []
        assert steps == (expected if each.name == kind.name else [0, 1, 2, "end"])


LINE = {"train/loss": 4.5, "train/grad_norm": None, "train/skipped": False, "ranks/slowest_host": "a"}


def write_curve(folder, steps, **tracker):
    metrics = open_metrics(folder, steps[0], **tracker)
    for step in steps:
        metrics.record({"step": step} | LINE)
        if step == 1:
            metrics.record({"step": 2, "val/bpb": 1.75})
    metrics.record({"step": steps[-1] + 1, "val/bpb": 1.5, "centered_results": {"arc_easy": 0.25}})
    metrics.close()


def test_tensorboard_has_the_curves_of_a_resumed_run(tmp_path):
    accumulators = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is not installed"
    )

    def curves():
        events = accumulators.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
        return {key: [(event.step, event.value) for event in events.Scalars(key)] for key in events.Tags()["scalars"]}

    write_curve(tmp_path, [0, 1, 2, 3], tensorboard=True)
    write_curve(tmp_path, [2, 3], tensorboard=True)  # resumed at step 2
    assert set(curves()) == {"train/loss", "train/skipped", "val/bpb", "centered_results/arc_easy"}
    assert curves()["train/loss"] == [(step, 4.5) for step in range(4)], "the first job's step 2 is not kept"
    assert curves()["val/bpb"] == [(2, 1.75), (4, 1.5)], "the evaluation after 2 steps is not repeated, and is kept"
    assert curves()["centered_results/arc_easy"] == [(4, 0.25)]
    write_curve(tmp_path, [0, 1], tensorboard=True)  # a new run in the same folder
    assert curves()["train/loss"] == [(0, 4.5), (1, 4.5)]


TRACKIO = """
import sys
from pathlib import Path
from megachat.settings import LogConfig
from megachat.train.trackers import TrackedRun, Trackers
from trackio.sqlite_storage import SQLiteStorage

def write_curve(steps):
    run = TrackedRun(Path("."), "name", {"plan": {"steps": 4}}, steps[0], sys.exit)
    trackers = Trackers(LogConfig(trackio=True, trackio_project="project"), run)
    for step in steps:
        trackers.log({"step": step, "time": 1.5, "train/loss": 4.5 - step, "train/grad_norm": None})
    trackers.log({"step": steps[-1] + 1, "time": 2.5, "centered_results": {"arc_easy": 0.25}})
    trackers.finish()
    logs = SQLiteStorage.get_logs("project", "name")
    values = [(line["step"], line.get("train/loss"), line.get("centered_results/arc_easy")) for line in logs]
    return sorted(values, key=str)

assert write_curve([0, 1]) == [(0, 4.5, None), (1, 3.5, None), (2, None, 0.25)]
assert write_curve([2]) == [(0, 4.5, None), (1, 3.5, None), (2, 2.5, None), (2, None, 0.25), (3, None, 0.25)]
assert len(SQLiteStorage.get_run_records("project")) == 1
assert SQLiteStorage.get_run_config("project", "name")["plan"] == {"steps": 4}
write_curve([0])
assert len(SQLiteStorage.get_run_records("project")) == 2, "a new run"
"""


@pytest.mark.skipif(find_spec("trackio") is None, reason="needs pip install 'megachat[trackers]'")
def test_trackio_has_the_curves_of_a_resumed_run(tmp_path):
    variables = os.environ | {"TRACKIO_DIR": str(tmp_path / "trackio"), "PYTHONPATH": os.getcwd()}
    done = subprocess.run([sys.executable, "-c", TRACKIO], env=variables, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("kind", "value", "shown", "package"),
    [
        ("wandb", "online", '"online"', "wandb"),
        ("tensorboard", True, "true", "'megachat[trackers]'"),
        ("trackio", True, "true", "'megachat[trackers]'"),
    ],
)
def test_a_tracker_that_is_not_installed_is_reported(kind, value, shown, package, monkeypatch):
    (module,) = [each.module for each in KINDS if each.name == kind]
    monkeypatch.setitem(sys.modules, module, None)  # what Python keeps for "there is none"
    check_trackers(LogConfig())
    with pytest.raises(UserError) as refused:
        check_trackers(LogConfig(**{kind: value}))
    words = f"log.{kind} is {shown} but {kind} is not installed: pip install {package}, or set log.{kind}="
    assert str(refused.value).startswith(words)


def test_a_tracker_that_cannot_be_imported_is_reported(tmp_path, monkeypatch):
    (tmp_path / "wandb.py").write_text("raise TypeError('protobuf')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(UserError, match=r"wandb cannot be imported \(TypeError: protobuf\)"):
        check_trackers(LogConfig(wandb="online"))
