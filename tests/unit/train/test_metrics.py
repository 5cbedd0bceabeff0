"""metrics.jsonl as one curve, the console's line, and the progress bar."""

import contextlib
import fcntl
import io
import json
import os
import pty
import struct
import sys
import termios
import time

import pytest

from megachat.console import Console
from megachat.settings import LogConfig
from megachat.train import metrics as metrics_module
from megachat.train.metrics import Metrics, Pace, console_line


def open_metrics(folder, first_step=0, *, writes=True, **trackers):
    log = LogConfig(wandb_project="project", trackio_project="project", **trackers)
    return Metrics(
        folder, log, writes=writes, first_step=first_step, steps=10, run_name="name", settings={"plan": {"steps": 10}}
    )


def lines(folder):
    """The records without their time stamps, which must be there."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    times = [record.pop("time") for record in records]
    assert times == sorted(times) and all(-1 < time.time() - stamp < 3600 for stamp in times)  # stamps are rounded
    return records


def train_line(step, **more):
    return {"step": step, "train/loss": 5.0 - step} | more


def write_a_run(folder, steps):
    """Training lines of steps 0 .. steps - 1, an evaluation after every second, as the loop writes them."""
    metrics = open_metrics(folder)
    for step in range(steps):
        metrics.record(train_line(step))
        if (step + 1) % 2 == 0:
            metrics.record({"step": step + 1, "val/bpb": 1.0})
    metrics.close()


def test_each_record_is_a_line_at_once(tmp_path):
    metrics = open_metrics(tmp_path)
    metrics.record(train_line(0))
    assert lines(tmp_path) == [train_line(0)], "a crash must not lose it"
    metrics.close()


def test_a_resumed_run_continues_one_curve(tmp_path):
    write_a_run(tmp_path, 6)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "train/lo')  # the crash
    metrics = open_metrics(tmp_path, 4)
    metrics.record(train_line(4, again=True))
    metrics.close()
    assert [(line["step"], "val/bpb" in line) for line in lines(tmp_path)] == [
        (0, 0),
        (1, 0),
        (2, 1),
        (2, 0),
        (3, 0),
        (4, 1),
        (4, 0),
    ]
    assert lines(tmp_path)[-1]["again"]
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_what_was_done_after_the_checkpoint_is_forgotten(tmp_path):
    open_metrics(tmp_path).record({"step": 0, "val/bpb": 1.0})
    open_metrics(tmp_path, 0).close()
    assert lines(tmp_path) == [], "a new run is validated before its first step again"
    write_a_run(tmp_path, 6)
    open_metrics(tmp_path, 3).close()
    assert [(line["step"], "val/bpb" in line) for line in lines(tmp_path)] == [(0, 0), (1, 0), (2, 1), (2, 0)]
    open_metrics(tmp_path, 0).close()
    assert lines(tmp_path) == []


@pytest.mark.parametrize("damage", ["\n", "null\n", "3\n", '{"no step": 1}\n', "\0\0\0\n"])
def test_lines_that_are_no_record_are_dropped(damage, tmp_path):
    write_a_run(tmp_path, 2)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(damage)
    open_metrics(tmp_path, 2).close()
    assert [line["step"] for line in lines(tmp_path)] == [0, 1, 2]


@pytest.mark.parametrize("damage", [b"\xff", b"[", b"3", b"\0\0"])
def test_a_damaged_line_is_dropped_and_kept_in_a_file_that_is_set_aside(damage, tmp_path, capsys):
    write_a_run(tmp_path, 4)
    path = tmp_path / "metrics.jsonl"
    content = path.read_bytes().splitlines(True)
    content[1] = damage + content[1][1:]
    path.write_bytes(b"".join(content))
    metrics = open_metrics(tmp_path, 4)
    metrics.record(train_line(4))
    metrics.close()
    assert [line["step"] for line in lines(tmp_path)] == [0, 2, 2, 3, 4, 4]
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == b"".join(content)
    assert capsys.readouterr().out == (
        f"{path} has damaged lines (1; the first is line 2): it is kept as metrics.jsonl.damaged, "
        "and its other lines are continued\n"
    )


def test_a_folder_in_the_place_of_the_metrics_is_set_aside(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").mkdir()
    open_metrics(tmp_path, 4).close()
    assert lines(tmp_path) == [] and (tmp_path / "metrics.jsonl.damaged").is_dir()
    assert "is a folder" in capsys.readouterr().out


def test_a_job_without_a_step_drops_no_line(tmp_path):
    write_a_run(tmp_path, 4)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    log = LogConfig()
    Metrics(tmp_path, log, writes=True, first_step=2, steps=4, run_name="name", settings={}, trains=False).close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_other_ranks_write_nothing(tmp_path, capsys):
    metrics = open_metrics(tmp_path, writes=False, wandb="online")
    metrics.log("hello")
    metrics.record(train_line(0))
    metrics.advance(1)
    metrics.close()
    assert os.listdir(tmp_path) == [] and capsys.readouterr().out == ""


def test_a_pipe_gets_lines_and_no_bar(tmp_path, capsys):
    metrics = open_metrics(tmp_path)
    metrics.log("hello")
    metrics.advance(5)
    metrics.close()
    assert capsys.readouterr() == ("hello\n", "")


def test_a_terminal_gets_a_bar_and_the_lines_above_it(tmp_path, monkeypatch):
    screen, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    with os.fdopen(terminal, "w") as file:
        monkeypatch.setattr(sys, "stdout", file)
        metrics = open_metrics(tmp_path, 4)
        metrics.log("hello")
        metrics.advance(6)
        metrics.close()
    shown = b""
    with contextlib.suppress(OSError):  # how a terminal without programs ends
        while part := os.read(screen, 4096):
            shown += part
    os.close(screen)
    assert b"hello\r\n" in shown and shown.index(b"4/10") < shown.index(b"6/10")


def test_a_console_that_fails_is_recorded_once(tmp_path, monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    console = Console("stdout", writer, drop=True)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BufferedWriter(console), encoding="ascii"))
    metrics = open_metrics(tmp_path)
    for step in range(3):
        metrics.log(f"step {step}")
        metrics.record(train_line(step))
    metrics.close()
    os.close(writer)
    lost = {"step": 0, "console": "stdout takes no more output (Broken pipe)"}
    assert lines(tmp_path) == [train_line(0), lost, train_line(1), train_line(2)]


VALUES = {
    "step": 7,
    "train/loss": 3.25,
    "train/grad_norm": 0.5,
    "train/lrm": 0.75,
    "train/dt": 0.25,
    "train/tok_per_sec": 12345,
}
VALUES |= {"train/epoch": 2, "train/skipped": False}


def test_the_console_line_leaves_out_what_is_not_known():
    assert console_line(VALUES, 20, None) == (
        "step 00007/00020 | loss  3.2500  norm  0.500  lrm 0.75    250ms  12.3k tok/s"
    )


def test_the_console_line_has_mfu_and_time_left():
    line = console_line(VALUES | {"train/mfu": 41.236, "train/grad_norm": float("inf")}, 20, 90.0)
    assert "norm    inf" in line and line.endswith("tok/s  mfu 41.2%  eta  2min")


def test_console_lines_are_aligned_and_fit_100_columns():
    """Whatever a step brings, each part begins in the same column, also in a run with steps of six digits."""
    columns = set()
    for norm in (0.5, 99.9999, 123.4, 98765.0, float("inf")):
        for dt, rate in ((0.0004, 99_950_000), (0.25, 12345), (99.9996, 999), (4000.0, 3)):
            for eta in (0, 359_999, 3_600_000):
                more = {"train/grad_norm": norm, "train/dt": dt, "train/tok_per_sec": rate, "train/mfu": 1.25}
                line = console_line(VALUES | more | {"train/loss": 10.3972, "step": 99}, 123_456, eta)
                assert len(line) == 100, line
                columns.add(tuple(line.index(word) for word in ("loss", "norm", "lrm", "tok/s", "mfu", "eta")))
    assert len(columns) == 1
    assert len(console_line(VALUES, 123_456, None)) < 100


def test_the_time_left_is_known_from_the_third_step_of_a_job(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(metrics_module.time, "perf_counter", lambda: now[0])
    pace = Pace(100)
    left = []
    for steps, seconds in ((101, 50.0), (102, 5.0), (103, 2.0), (104, 4.0)):
        now[0] += seconds
        pace.finish(steps)
        left.append(pace.left_s(steps, 110))
    assert left == [None, None, 2.0 * 7, 3.0 * 6]
