"""The phases of a restart, as the supervisor and rank 0 time them."""

import time

import pytest

from megachat.job.recovery import Recovery, give_restart_times


@pytest.fixture(autouse=True)
def variable(monkeypatch):
    monkeypatch.setenv("MEGACHAT_RESTART", "null")  # restored afterwards


def test_the_phases_add_up_to_the_time_without_training(monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr(time, "time", lambda: clock[0])
    give_restart_times(noticed=100.0, ended=100.5, met=108.0)
    clock[0] = 110.0
    recovery = Recovery()
    recovery.interrupted(99.0)
    for phase, at in {"joining": 110.25, "loading": 111.0, "first step": 112.0}.items():
        clock[0] = at
        recovery.finish(phase)
    assert recovery.line == (
        "recovered in 13.0 s, from the start of the interrupted step to the end of the first new step: "
        "detection 1.0 s, end 0.5 s, meeting 7.5 s, import 2.0 s, joining 0.2 s, loading 0.8 s, first step 1.0 s"
    )
    assert recovery.values["recovery/total_s"] == 13.0 and recovery.values["recovery/first_step_s"] == 1.0


def test_without_an_interrupted_step_the_time_begins_at_the_end_of_the_ranks():
    give_restart_times(noticed=time.time(), ended=time.time(), met=time.time())
    recovery = Recovery()
    recovery.interrupted(None)
    assert "from the end of the ranks" in recovery.line and "detection" not in recovery.line


def test_a_first_start_measures_nothing():
    recovery = Recovery()
    recovery.interrupted(1.0)
    recovery.finish("joining")
    assert not recovery.restarted and recovery.values == {}
