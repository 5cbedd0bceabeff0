"""The rendezvous, with ranks as threads over real sockets: all arrive, one is missing, arrives twice, dies, differs."""

import contextlib
import multiprocessing
import os
import socket
import threading
import time
from datetime import timedelta
from socket import AF_INET

import psutil
import pytest
from torch.distributed import TCPStore

from megachat.errors import UserError
from megachat.job.launch import LaunchEnvironment, free_port
from megachat.job.links import JobKey, Link, introduce, receive_greeting
from megachat.job.rendezvous import _name_ranks, _parse_address, meet
from tests.limits import limit_s, until
from tests.unit.job.clock import Clock

HOST = socket.gethostname()


def connect(port: int) -> socket.socket:
    """A connection to the port, as soon as somebody listens there."""
    deadline = time.monotonic() + limit_s()
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port))
        except ConnectionRefusedError:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def check_in(link: Link, port: int, rank: int, secret: bytes = b"", **facts) -> bool:
    """The handshake of a rank that the test plays itself."""
    deadline = time.monotonic() + limit_s()
    greeting = receive_greeting(link, deadline)
    return introduce(link, greeting, JobKey(secret, f"rendezvous {port} 0"), rank, deadline, **facts)


def gather(
    ranks,
    world: int,
    *,
    port: int | None = None,
    address="127.0.0.1",
    rendezvous_s=600.0,
    judge=lambda arrivals: None,
    agent=False,
):
    """Return what each rank got: a Meeting or a UserError's text. A rank may be (rank, world it was started with)."""
    port, results = port or free_port(), {}

    def one(index: int, rank) -> None:
        rank, rank_world = rank if isinstance(rank, tuple) else (rank, world)
        environment = LaunchEnvironment(rank, rank, rank_world, rank_world, "test", address, port, agent, 0)
        try:
            results[index] = meet(environment, {"kind": {"rank": str(rank)}}, judge, rendezvous_s)
        except UserError as error:
            results[index] = str(error)

    threads = [threading.Thread(target=one, args=(index, rank), daemon=True) for index, rank in enumerate(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(limit_s())
    return [results[index] for index in range(len(threads))]


def test_all_arrive_in_any_order_and_the_store_takes_the_port():
    heard, port = [], free_port()
    results = gather([2, 1, 0], 3, port=port, judge=lambda arrivals: heard.extend(arrivals))
    assert [meeting.address for meeting in results] == [None] * 3
    assert [(arrival.rank, arrival.host, arrival.facts) for arrival in heard] == [
        (rank, HOST, {"kind": {"rank": str(rank)}}) for rank in range(3)
    ]
    results[2].store.set("key", "value")
    client = TCPStore("127.0.0.1", port, None, False, timedelta(seconds=600), wait_for_workers=False)
    assert client.get("key") == b"value"


def test_one_process_meets_nobody():
    assert gather([0], 1)[0].store is None


def test_missing_ranks_are_named_to_all_that_are_here(monkeypatch, capsys):
    monkeypatch.setattr("megachat.job.rendezvous.NOTICE_S", 1000.0)
    Clock(3, monkeypatch.setattr)
    results = gather([0, 1, 3], 6)
    assert len(set(results)) == 1
    assert results[0].startswith(
        f"ranks 2,4-5 of 6 did not arrive within 600 s, here are ranks 0-1,3 on {HOST}: look for "
    )
    assert capsys.readouterr().out == "waiting for ranks 2,4-5 of 6, up to 600 s (parallel.rendezvous_s)\n"


def test_a_rank_that_arrives_twice_is_reported_at_once():
    results = gather([0, 1, 1], 3)
    assert len(set(results)) == 1
    assert results[0].startswith(
        f"rank 1 arrived twice, from {HOST} and from {HOST}: give every host its own --node_rank"
    )


def test_ranks_that_believe_in_other_numbers_are_reported():
    results = gather([0, (1, 3)], 2)
    assert set(results) == {
        "rank 1 on " + HOST + " was started for 3 ranks and rank 0 for 2: start all hosts with the same numbers"
    }


def test_what_the_judge_says_reaches_every_rank():
    assert set(gather([0, 1, 2], 3, judge=lambda arrivals: "rank 2 is unlike")) == {"rank 2 is unlike"}


def test_an_error_in_the_judge_is_no_hang():
    assert set(gather([0, 1], 2, judge=lambda arrivals: 1 / 0)) == {
        "rank 0 could not gather the ranks (ZeroDivisionError: division by zero)"
    }


def test_a_rank_that_dies_while_the_others_wait_is_named():
    port = free_port()
    started = threading.Thread(target=lambda: results.extend(gather([0], 3, port=port)), daemon=True)
    results: list[str] = []
    started.start()
    link = Link(connect(port))
    assert check_in(link, port, 1, world=3, host="other", facts={})
    link.close()
    started.join(limit_s())
    assert results == ["rank 1 on other ended before all ranks had arrived: look for its error message"]


def test_a_rank_0_that_dies_before_its_verdict_is_reported():
    """Killed when rank 1 has arrived: the earliest moment that the test knows."""
    port = free_port()
    rank_0 = multiprocessing.get_context("fork").Process(
        target=gather, args=([0], 2), kwargs={"port": port, "judge": lambda arrivals: os.kill(os.getpid(), 9)}
    )
    rank_0.start()
    (error,) = gather([1], 2, port=port)
    rank_0.join()
    where = f"rank 0 at 127.0.0.1:{port}"
    assert error == f"{where} ended or fell silent during the rendezvous: look for its error message"


class RankZero:
    """Rank 0 of 2, which waits in a thread while the test plays the others; `results` has what it got."""

    def __init__(self, **how):
        self.port, self.results = free_port(), []
        self.thread = threading.Thread(target=lambda: self.results.extend(gather([0], 2, port=self.port, **how)))
        self.thread.daemon = True
        self.thread.start()

    def end(self):
        self.thread.join(limit_s())
        return self.results[0]


STRANGERS = [
    b"",
    b"GET / HTTP/1.0\r\n\r\n",
    b"[" * 200_000 + b"\n",
    b"[1]\n",
    b'{"rank": "x"}\n',
    b'{"rank": 1, "world": 2, "host": "other", "address": "no IP", "facts": {}}\n',
    b"x" * 300_000,
]


def test_a_crowd_of_strangers_at_the_port_disturbs_nobody():
    """2,000 of them; a few more than may be open at once stay silent."""
    before, zero = len(os.listdir("/proc/self/fd")), RankZero()
    connect(zero.port).close()
    with contextlib.ExitStack() as crowd:
        for number in range(2000):
            stranger = socket.create_connection(("127.0.0.1", zero.port))
            with contextlib.suppress(ConnectionError):  # rank 0 does not read all of it
                stranger.sendall(STRANGERS[number % 7])
            crowd.callback(stranger.close) if number % 7 == 0 else stranger.close()
        (one,) = gather([1], 2, port=zero.port)
    assert zero.end().store is not None and one.address is None
    del zero.results[:]
    assert len(os.listdir("/proc/self/fd")) <= before + 5, "torch's store has some, and one is of free_port()"


def test_a_rank_is_not_admitted_with_impossible_facts():
    """It may know the handshake, as a rank of another version does."""
    zero = RankZero()
    good = {"world": 2, "host": "other", "facts": {}}
    bad = [
        {"world": 2.0},
        {"world": True},
        {"host": 5},
        {"host": "x" * 256},
        {"host": "a\nerror: x"},
        {"facts": {"code": 1}},
        {"facts": []},
    ]
    for change in [*bad, {"facts": {"code": {"a": None}}}, {"facts": {"code": {"a": "\ud800"}}}]:
        with contextlib.closing(Link(connect(zero.port))) as link, pytest.raises(ConnectionError):
            check_in(link, zero.port, 1, **good | change)
    assert not isinstance(gather([1], 2, port=zero.port)[0], str) and zero.end().store is not None


def test_ranks_of_one_host_listen_on_loopback_only():
    heard: list = []
    zero = RankZero(judge=lambda arrivals: heard.extend(arrivals))
    connect(zero.port).close()
    others = {each.address for entries in psutil.net_if_addrs().values() for each in entries if each.family == AF_INET}
    for address in others - {"127.0.0.1"}:
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((address, zero.port))
    link = Link(connect(zero.port))
    assert check_in(link, zero.port, 1, world=2, host="b", address="10.1.1.1", facts={})
    zero.end()
    assert [arrival.address for arrival in heard] == ["127.0.0.1"] * 2, "what a rank says of addresses does not count"


@pytest.mark.parametrize(
    "first, others",
    [
        (
            "0" * 16,
            {
                None: "rank 1 on {} has no secret, which rank 0 at {} requires: give all ranks the same",
                "1" * 16: "the secret of rank 1 on {} is not that of rank 0 at {}: give all ranks the same",
            },
        ),
        (None, {"0" * 16: "rank 1 on {} has a secret and rank 0 at {} has none: give all ranks the same"}),
    ],
)
def test_a_rank_without_the_secret_is_not_admitted(first, others, monkeypatch, capsys):
    mine, clock = threading.local(), Clock(replace=monkeypatch.setattr)
    monkeypatch.setattr("megachat.job.rendezvous.NOTICE_S", float("inf"))
    monkeypatch.setattr("megachat.job.rendezvous.shared_secret", lambda: (mine.secret or "").encode())
    monkeypatch.setattr("megachat.job.rendezvous._LATE_S", 0.1)
    port, results = free_port(), {}

    def rank(number: int, secret: str | None) -> None:
        mine.secret = secret
        environment = LaunchEnvironment(number, number, 2, 2, "test", "127.0.0.1", port, False, 0)
        try:
            results[number] = meet(environment, {}, lambda arrivals: None, 600.0)
        except UserError as error:
            results[number] = str(error)

    zero = threading.Thread(target=rank, args=(0, first), daemon=True)
    zero.start()
    for secret, said in others.items():
        rank(1, secret)
        assert results[1].startswith(said.format(HOST, f"127.0.0.1:{port}")) and "MEGACHAT_SECRET_FILE" in results[1]
    until(lambda: clock.arrivals == 1, "rank 0")
    clock.end_waits()
    zero.join(limit_s())
    assert results[0].startswith(
        "rank 1 of 2 did not arrive within 600 s "
        "(rank 1 from 127.0.0.1 was refused, its secret is not this job's), here is rank 0 on "
    )
    refused = "refused rank 1 from 127.0.0.1: its secret is not this job's (docs/multinode.md)"
    assert capsys.readouterr().out.splitlines() == [refused], "once, however many come"


def test_ranks_with_the_same_secret_meet(monkeypatch):
    monkeypatch.setenv("MEGACHAT_SECRET", "a secret of 24 characters")
    zero = RankZero()
    with contextlib.closing(Link(connect(zero.port))) as link:
        assert not check_in(link, zero.port, 1, world=2, host="a stranger", facts={})
    assert not isinstance(gather([1], 2, port=zero.port)[0], str) and zero.end().store is not None


@pytest.mark.parametrize("text", [b"[" * 200_000, b"no json", b"[1, 2]", b'["host", 1.5]', b'["host", 70000]', b"3"])
def test_what_torchruns_store_has_is_checked(text):
    with pytest.raises(UserError, match="torchrun's store has .* as rank 0's address"):
        _parse_address(text)


def test_a_port_in_use_is_reported_by_rank_0_and_by_the_others():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        threading.Thread(target=lambda: server.accept()[0].sendall(b"SSH-2.0-OpenSSH\r\n"), daemon=True).start()
        zero, one = gather([0, 1], 2, port=port)
    assert (
        zero.startswith(f"port {port} on {HOST}, where rank 0 listens, cannot be used (Address already in use): ")
        and "--master_port" in zero
    )
    assert one.startswith(f"at 127.0.0.1:{port} is another program, not rank 0 of this job: ")


def test_a_silent_program_at_the_port_is_no_hang(monkeypatch):
    monkeypatch.setattr("megachat.job.rendezvous._GREETING_S", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        (one,) = gather([1], 2, port=server.getsockname()[1])
    assert "is another program" in one


@pytest.mark.parametrize(
    "address, why",
    [("127.0.0.1", "nothing listens there"), ("no-such-host.invalid", "the name no-such-host.invalid does not")],
)
def test_a_rank_0_that_cannot_be_reached_is_reported(address, why):
    port = free_port()
    (results,) = gather([1], 2, address=address, port=port, rendezvous_s=1)
    assert results.startswith(f"rank 1 on {HOST} could not reach rank 0 at {address}:{port} within 1 s ({why}")


def test_torchruns_agent_keeps_its_port():
    agent = TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=600), wait_for_workers=False)
    results = gather([0, 1, 2], 3, port=agent.port, agent=True)
    assert [(meeting.address, meeting.store) for meeting in results] == [(None, None)] * 3


def test_many_ranks_gather():
    assert all(meeting.address is None for meeting in gather(list(range(64)), 64))


def test_ranks_are_written_shortly():
    assert (_name_ranks([5]), _name_ranks([0, 1, 2, 4])) == ("rank 5", "ranks 0-2,4")
