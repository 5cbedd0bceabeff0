"""A rank that computes slower than its peers is named, whatever the others wait for."""

import socket

from tests.runs.forked import Ranks
from tests.runs.job import STEPS, command, metrics

SLOW = """
import os, runpy
from types import SimpleNamespace
import megachat.train.stragglers, megachat.train.tasks, megachat.train.trainer
from megachat.model.gpt import Block
from megachat.parallel import work_time

for module in (megachat.train.stragglers, megachat.train.tasks, megachat.train.trainer):
    module.RANK_TIMES_WINDOW = 3
forward, now = Block.forward, [0.0]

def timed(*arguments, **named):
    now[0] += 0.06 if os.environ["RANK"] == "1" else 0.02
    return forward(*arguments, **named)

def waited(clock):
    now[0] += 1.0
    resume(clock)

Block.forward, resume, work_time.WorkTime.resume = timed, work_time.WorkTime.resume, waited
work_time.time = SimpleNamespace(perf_counter=lambda: now[0])  # a busy machine makes no rank slower
runpy.run_path("launch/pretrain.py", run_name="__main__")
"""


def test_a_slow_rank_of_a_tensor_group_is_named_once(place):
    """All ranks take equally long for a step, as they wait for each other in every layer: a second by their clocks."""
    program = command(place, "slow", "--set", "parallel.tensor=2", config={"evaluate": {"prompts": []}})
    (place.runs / "slow.py").write_text(SLOW)
    with Ranks([place.runs / "slow.py", *program[1:]], 2) as job:
        assert job.end() == [0, 0], job.printed
        host = socket.gethostname()
        assert job.out.count("is slow") == 1 and f"step 00003 | rank 1 ({host}) is slow: it worked " in job.out
    windows = [line for line in metrics(place.runs / "slow") if "ranks/slowest" in line]
    assert [line["step"] for line in windows] == [3, STEPS]
    for line in windows:
        assert (line["ranks/slowest"], line["ranks/slowest_host"]) == (1, host) and line["ranks/slowest_ratio"] > 1.2
        assert line["ranks/work_s_p95"] > line["ranks/work_s_median"] > 6 * 2 * 0.02 / 2
