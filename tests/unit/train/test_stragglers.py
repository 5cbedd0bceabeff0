"""Which rank is slow, among ranks with equal work; and the clock that leaves out waiting."""

import pytest

from megachat.parallel import work_time
from megachat.parallel.work_time import WorkTime
from megachat.train.stragglers import SlowRanks, rank_values, ratios_to_median

ONE_STAGE = [{"host": f"host{rank // 2}", "pipeline": 0} for rank in range(4)]


def test_ranks_are_compared_within_their_pipeline_stage():
    stages = [{"host": "a", "pipeline": stage} for stage in (0, 0, 0, 1, 1)]
    assert ratios_to_median([1.0, 1.0, 1.5, 4.0, 5.0], stages) == [1.0, 1.0, 1.5, 1.0, 1.25]
    assert ratios_to_median([1.0, 9.0], stages[2:4]) == [1.0, 1.0], "their work differs"


def test_the_metrics_of_a_window():
    assert rank_values([1.0, 1.1, 1.5, 0.9], ONE_STAGE) == {
        "ranks/work_s_median": pytest.approx(1.05),
        "ranks/work_s_p95": 1.5,
        "ranks/slowest": 2,
        "ranks/slowest_host": "host1",
        "ranks/slowest_ratio": 1.5,
    }
    many = [{"host": "a", "pipeline": 0}] * 100
    assert rank_values([float(rank) for rank in range(100)], many)["ranks/work_s_p95"] == 94.0


def test_a_slow_rank_is_reported_again_only_after_it_recovered():
    slow, even = SlowRanks(), [1.0, 1.0, 1.0, 1.19]
    assert slow.line(even, ONE_STAGE) is None
    line = slow.line([1.0, 1.0, 1.0, 1.3], ONE_STAGE)
    assert line == (
        "rank 3 (host1) is slow: it worked 1.300 s per step for 50 steps, 1.30 times the median rank of its stage"
    )
    assert slow.line([1.0, 1.0, 1.0, 1.9], ONE_STAGE) is None
    assert slow.line([1.5, 1.0, 1.0, 1.9], ONE_STAGE).startswith("rank 0 (host0) is slow"), "another one"
    assert slow.line(even, ONE_STAGE) is None
    assert slow.line([1.5, 1.0, 1.0, 1.9], ONE_STAGE).endswith("of its stage; also ranks 0")


def test_waits_inside_of_work_are_left_out(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(work_time.time, "perf_counter", lambda: now[0])
    clock = WorkTime()

    def spend(seconds):
        now[0] += seconds

    def step():
        with clock.working():
            spend(3)
            for launches in (False, True):
                clock.pause(launches=launches)
                spend(100)
                clock.resume()
        clock.pause(launches=False)  # between parts of the work
        spend(50)
        clock.resume()
        with clock.working():
            spend(1)

    clock.start()
    step()
    assert clock.finish() == 4
    step()  # an evaluation
    clock.start()
    assert clock.finish() == 0
