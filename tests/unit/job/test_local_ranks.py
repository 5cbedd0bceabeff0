"""Ranks that a tool starts on this machine."""

import os

import pytest

from megachat.errors import UserError
from megachat.job.local_ranks import run_local_ranks
from megachat.planning.layouts import parse_layout


def where(number: int) -> tuple[int, str, str]:
    return number, os.environ["RANK"], os.environ["WORLD_SIZE"]


def fail_or_die(how: str):
    if os.environ["RANK"] == "1":
        if how == "die":
            os._exit(1)
        raise ValueError("no such thing\nand more")


def test_every_rank_returns_its_result():
    preload = [__name__]
    assert run_local_ranks(where, 3, 7, preload=preload) == [(7, "0", "3"), (7, "1", "3"), (7, "2", "3")]


@pytest.mark.parametrize(("how", "problem"), [("die", "the process died"), ("raise", "ValueError: no such thing$")])
def test_the_rank_that_failed_is_named(how, problem):
    with pytest.raises(UserError, match=f"^rank 1 of 2 failed: {problem}"):
        run_local_ranks(fail_or_die, 2, how, preload=[__name__])


def test_layouts_are_read():
    assert (
        parse_layout("tp=2,pp=4,dp=8") == {"data": 8, "tensor": 2, "pipeline": 4} and parse_layout("pp=2")["data"] == 1
    )
    for text in ("tp", "tp=0", "cp=2", "tp=2;pp=2", "", "dp=2,", "tp=two", "dp=" + "9" * 5000):
        with pytest.raises(UserError, match="of at least 1; give them as tp=2,pp=2,dp=2"):
            parse_layout(text)
    with pytest.raises(UserError, match="dp is given twice"):
        parse_layout("dp=2,dp=2")
