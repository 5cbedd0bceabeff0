"""Which rank holds up the others, from what the ranks report, and which ranks a hub lets in."""

import contextlib
import selectors
import socket
import threading
import time

import pytest

from megachat.job.links import JobKey, Link, introduce, listen, receive_greeting
from megachat.job.monitor_hub import JobInfo, MonitorHub, blocking_ranks
from megachat.job.monitor_links import RankAddress
from tests.limits import limit_s


def state(
    text: str,
    *,
    waits: bool = True,
    axis: str = "",
    ranks: tuple[int, ...] = (),
    number: int = 0,
    counts: dict | None = None,
) -> dict:
    return {
        "text": text,
        "waits": waits,
        "axis": axis,
        "ranks": list(ranks),
        "number": number,
        "counts": counts or {axis: number},
    }


def collective(number: int, text: str = "bucket 2") -> dict:
    return state(text, axis="data", ranks=(0, 1, 2), number=number)


def test_a_silent_rank_comes_first_then_a_busy_one():
    assert blocking_ranks({0: collective(4), 1: state("forward", waits=False)}, (2,)) == [2]
    assert blocking_ranks({0: collective(4), 1: state("forward", waits=False), 2: collective(4)}, ()) == [1]


def test_of_ranks_that_all_wait_the_one_that_is_behind_on_the_axis():
    receiving = state("receiving activations", counts={"data": 3})
    assert blocking_ranks({0: receiving, 1: collective(4), 2: collective(4)}, ()) == [0]
    assert blocking_ranks({0: receiving, 1: collective(4)}, ()) == [0], "also where as many wait here as there"
    assert blocking_ranks({0: collective(4), 1: collective(4), 2: collective(2)}, ()) == [2]


def test_else_the_few_that_wait_in_another_operation_or_nobody():
    assert blocking_ranks({0: collective(4), 1: collective(4, "norm"), 2: collective(4)}, ()) == [1]
    assert blocking_ranks({rank: collective(4) for rank in range(3)}, ()) == []


def test_a_hub_lets_each_rank_in_once_and_then_stops_listening(tmp_path):
    addresses = tuple(RankAddress(rank, "host", rank, "machine") for rank in range(2))
    job = JobInfo(addresses, JobKey(b"token", "failure monitor"), 10.0, 10.0, tmp_path)
    selector, listener, ends = selectors.DefaultSelector(), listen(0, "127.0.0.1"), threading.Event()
    hub, address = MonitorHub(job, 0, listener, selector), listener.getsockname()

    def run() -> None:
        while not ends.is_set():
            for key, _ in selector.select(0.02):
                key.data(key.fileobj)
            hub.tick(time.monotonic())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        with contextlib.ExitStack() as opened:
            for rank, enters in ((2, False), (1, True), (1, False), (0, True)):
                link = Link(socket.create_connection(address))
                opened.callback(link.close)
                deadline = time.monotonic() + limit_s()
                greeting = receive_greeting(link, deadline)
                if enters:
                    assert introduce(link, greeting, job.key, rank, deadline)
                else:
                    with pytest.raises(ConnectionError):
                        introduce(link, greeting, job.key, rank, deadline)
            deadline = time.monotonic() + limit_s()
            while listener.fileno() >= 0:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            assert sorted(hub.links) == [0, 1]
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(address)
    finally:
        ends.set()
        thread.join()
        selector.close()
