"""A job with precision.compile, by the real compiler, beside one without."""

import shutil

import pytest

from tests.runs.forked import run_forked
from tests.runs.job import begin, command, finish, launched, losses

DONE = 4  # steps; without an evaluation, whose graphs would be compiled as well


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile on a CPU needs g++")
def test_a_compiled_job_trains_as_one_that_is_not(place):
    losses_of = {}
    for compiles in (False, True):
        config = {"model": {"depth": 1, "aspect_ratio": 32}, "horizon": {"stop_step": DONE}, "evaluate": {"every": 0}}
        config |= {"precision": {"compile": compiles, "head_chunk_mb": 4}}
        program = command(place, f"compile_{compiles}", config=config)
        done = finish(begin(launched("python", 1, program))) if compiles else run_forked(program)
        assert done.status == 0 and "torch.compile made" not in done.out, done.out + done.err
        assert "head and loss in chunks of 4 MiB of logits" in done.out
        losses_of[compiles] = losses(place.runs / f"compile_{compiles}")
    assert len(losses_of[True]) == DONE and losses_of[True][0] == pytest.approx(losses_of[False][0], rel=1e-6)
    # from zero matrices other roundings grow; tests/ranks/test_compile.py starts elsewhere
    for step, loss in losses_of[True].items():
        assert loss == pytest.approx(losses_of[False][step], rel=5e-3)
