"""Which signals stop a job, and when a second Ctrl-C is one."""

import signal
import socket
import subprocess
import sys

import pytest

from megachat.job import failure_monitor
from megachat.job.failure_monitor import SECOND_S, STOP_SIGNALS, FailureMonitor
from megachat.job.monitor_links import handled_signals
from tests.limits import limit_s
from tests.runs.job import ROOT


class Clock:
    now = 100.0

    def monotonic(self):
        return self.now


@pytest.fixture
def monitor(monkeypatch):
    """A monitor of one rank that records what it would do."""
    made = FailureMonitor(0)
    made.clock, made.seen = Clock(), []
    monkeypatch.setattr(failure_monitor, "time", made.clock)
    made._request_stop = lambda reason, limited: made.seen.append(("save", reason.split(" stop ")[1], limited))
    made._stop = lambda reason: made.seen.append(("end", reason.split(" stop ")[1]))
    yield made
    for opened in (made._wakeup_in, made._wakeup_out, made._selector):  # else the garbage collector warns in some test
        opened.close()


def receive(monitor, *numbers):
    ours, theirs = socket.socketpair()
    theirs.send(bytes(numbers))
    monitor._on_wakeup(ours)
    ours.close()
    theirs.close()


def test_a_second_interrupt_ends_the_job_and_a_repeated_one_does_not(monitor):
    receive(monitor, signal.SIGINT)
    monitor.clock.now += 0.9 * SECOND_S
    receive(monitor, signal.SIGINT, signal.SIGTERM)  # the launcher passes on the same Ctrl-C
    first = [("save", "(SIGINT)", True)]
    assert monitor.seen == [*first, *first, ("save", "(SIGTERM)", True)]
    monitor.clock.now += 0.2 * SECOND_S
    receive(monitor, signal.SIGTERM)
    receive(monitor, signal.SIGINT)
    assert monitor.seen[3:] == [("save", "(SIGTERM)", True), ("end", "(SIGINT) again")]


def test_only_the_warning_of_slurm_has_no_time_limit(monitor):
    receive(monitor, *STOP_SIGNALS)
    assert monitor.seen == [("save", f"({number.name})", number != signal.SIGUSR1) for number in STOP_SIGNALS]


@pytest.mark.parametrize(
    "start, handled",
    [
        ('exec "$@"', "SIGINT SIGTERM SIGUSR1 SIGHUP"),
        ('exec nohup "$@"', "SIGINT SIGTERM SIGUSR1"),
        ('"$@" & wait', "SIGTERM SIGUSR1 SIGHUP"),
    ],
)
def test_inherited_ignored_signals_stay_ignored(start, handled):
    program = """
import signal
from megachat.job.failure_monitor import STOP_SIGNALS, FailureMonitor
with FailureMonitor(0) as monitor:
    print(*(number.name for number in STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN))
"""
    line = ["sh", "-c", start, "sh", sys.executable, "-c", program]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=limit_s())
    assert done.stdout == handled + "\n", done.stderr


def test_of_the_other_signals_none_is_left_out(monkeypatch):
    monkeypatch.setattr(signal, "getsignal", lambda number: signal.SIG_IGN)
    assert handled_signals(STOP_SIGNALS) == [signal.SIGTERM, signal.SIGUSR1]
