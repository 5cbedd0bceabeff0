"""Ranks that wait between the steps of a benchmark: tools/bench/rank_steps.py."""

import threading
import time
from argparse import Namespace

import pytest

from megachat.errors import UserError
from tools.bench.nanochat import PartClock
from tools.bench.rank_steps import waiting_ranks

SMALL = ["model.depth=2", "model.aspect_ratio=32", "model.sequence_len=64", "batch.tokens=256", "batch.micro_rows=1"]


def arguments(layout: str = "dp=2", *settings: str) -> Namespace:
    return Namespace(config="configs/d4_cpu.json", set=[*SMALL, *settings], vocab_size=300, layout=layout)


def test_a_step_runs_on_all_ranks_when_it_is_requested():
    clock = PartClock(time.perf_counter)
    sides = {"eager": ["precision.compute=float32"], "bfloat16": ["precision.compute=bfloat16"]}
    with waiting_ranks(arguments(), sides, clock) as actions:
        assert list(actions) == ["eager", "bfloat16"]
        for action in (*actions.values(), *actions.values()):
            clock.restart()
            begin = time.perf_counter()
            action()
            wall = time.perf_counter() - begin
            assert set(clock.seconds) == {"forward", "backward", "optimizer"}
            assert all(seconds > 0 for seconds in clock.seconds.values()) and sum(clock.seconds.values()) <= wall
    assert not [thread for thread in threading.enumerate() if "_run" in thread.name]


def test_ranks_that_fail_are_named():
    with (
        pytest.raises(UserError, match="^rank [01] of 2 failed: .*unknown key model.wrong"),
        waiting_ranks(arguments("tp=2"), {"odd": ["model.wrong=1"]}, PartClock()),
    ):
        pytest.fail("the ranks started")


def test_one_process_starts_no_ranks():
    with waiting_ranks(arguments("dp=1"), {}, PartClock()) as actions:
        assert actions == {}
