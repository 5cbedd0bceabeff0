"""What a program says about long work: an activity that takes time, and progress without a terminal."""

import threading
import time

import pytest

from megachat import activity
from megachat.activity import ProgressBar, announced, duration, hours_minutes, ticking
from tests.limits import limit_s


def test_only_what_takes_long_is_announced(monkeypatch):
    lines, written = [], threading.Event()

    def write(line):
        lines.append(line)
        written.set()

    monkeypatch.setattr(activity, "ANNOUNCED_AFTER_S", 3600.0)
    with announced("short", write=write):
        pass
    monkeypatch.setattr(activity, "ANNOUNCED_AFTER_S", 0.001)
    with announced("on another rank", shown=False, write=write):
        pass
    with announced("long", write=write):
        assert written.wait(limit_s())
    assert lines == ["long ..."]


def test_an_announcement_survives_a_console_that_fails(monkeypatch):
    monkeypatch.setattr(activity, "ANNOUNCED_AFTER_S", 0.001)
    failed, ended = threading.Event(), []
    monkeypatch.setattr(threading, "excepthook", ended.append)

    def write(line):
        failed.set()
        raise BrokenPipeError

    with announced("long", write=write):
        assert failed.wait(limit_s())
        for thread in threading.enumerate():
            if isinstance(thread, threading.Timer):
                thread.join(limit_s())
    assert ended == []


def test_a_call_that_no_thread_interrupts_shows_its_time(capfd):
    shown, end = "", time.monotonic() + limit_s()
    with ticking("learning merges", every_s=0.01):
        while "learning merges: 0.0 minutes so far\n" not in shown and time.monotonic() < end:
            shown += capfd.readouterr().out
    assert "learning merges: 0.0 minutes so far\n" in shown


def test_progress_without_a_terminal_is_a_line_now_and_then(monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr(activity.time, "monotonic", lambda: now[0])
    with ProgressBar("reading", 400e6, "B") as progress:
        progress.skip(100e6)
        for _ in range(4):
            now[0] += 8.0
            progress.update(50e6)
        progress.update(0, total=600e6)
        now[0] += 10.0
        progress.update(50e6)
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        "reading: 200MB of 400MB (50%), eta 1min",
        "reading: 300MB of 400MB (75%), eta 1min",
        "reading: 350MB of 600MB (58%), eta 1min",
    ]
    assert err == ""


def test_progress_of_an_unknown_total(capsys):
    with ProgressBar("counting", None, " texts") as progress:
        progress.update(1500)
        assert progress.line(3.0) == "counting: 1.50k texts"
    with ProgressBar("walking", 6, "") as progress:
        progress.update(2)
        assert progress.line(60.0) == "walking: 2 of 6 (33%), eta 2min"
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    "seconds, left", [(0, "0min"), (1, "1min"), (61, "2min"), (3_899, "1h05"), (359_999, "100h"), (86_400, "24h00")]
)
def test_times(seconds, left):
    assert hours_minutes(seconds) == left
    assert duration(3725.4) == "1:02:05"
