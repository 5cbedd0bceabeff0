"""Before torch.distributed: every rank checks in with rank 0, so that one that never comes is named and ranks that are unlike are refused.

torch's own rendezvous waits for absent ranks in silence until its timeout. Here rank 0 listens at MASTER_ADDR:MASTER_PORT itself, hears who is
there and what each rank has (its facts), and answers all with one verdict; only then does torch's store take the port over, so that nobody
finds it closed in between. Under torchrun, whose agent holds that port, rank 0 takes a free one and tells it through the agent's store.
"""

import contextlib
import ipaddress
import json
import os
import selectors
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta

from torch.distributed import DistError, TCPStore

from megachat.errors import UserError
from megachat.job.launch import LaunchEnvironment
from megachat.job.monitor_links import Link, own_address
from megachat.text import number_ranges

NOTICE_S = 10.0  # after which a wait is told, once
_RETRY_S = 0.2
_CONNECT_S = 3.0
_SILENCE_S = 10.0  # a rank 0 greets at once
_LATE_S = 2.0  # to those who come while a mistake is told
_SLACK_S = 10.0  # for rank 0's verdict to arrive after its own limit
_GREETING = "megachat rank 0"
_OTHER_PORT = "--master_port (deepspeed), --master-port (torchrun) or MASTER_PORT (srun, mpirun)"


@dataclass(frozen=True)
class Arrival:
    """A rank that has checked in. facts: kind -> name -> hash or short text, compared between ranks."""

    rank: int
    host: str
    facts: Mapping[str, Mapping[str, str]]


@dataclass(frozen=True)
class Meeting:
    """All ranks are here. address: of rank 0's host, as another host reached it; None when all came over loopback. store: keeps the port."""

    address: str | None
    store: TCPStore | None = None


def meet(
    environment: LaunchEnvironment,
    facts: Mapping[str, Mapping[str, str]],
    judge: Callable[[list[Arrival]], str | None],
    limit_s: float,
    say: Callable[[str], None] = lambda line: print(line, flush=True),
) -> Meeting:
    """Wait for all ranks, which all call this once. judge, on rank 0, gets the arrivals in rank order and returns what is wrong, in a sentence.

    Raises UserError on every rank that is here, all with the same sentence: ranks that did not come within limit_s, that came twice or died,
    what judge says; and on the rank concerned: the port in use, a rank 0 that is not there.
    """
    if environment.world_size == 1:
        return Meeting(None)
    begin = time.monotonic()
    place, desk = _meeting_place(environment, limit_s)
    if desk is not None:
        desk.world, desk.judge, desk.limit_s, desk.say = environment.world_size, judge, limit_s, say
        threading.Thread(target=desk.run, name="rendezvous", daemon=True).start()
    link = _reach(place, environment, begin, limit_s, say)
    with link.socket:
        link.send(
            rank=environment.rank,
            world=environment.world_size,
            host=socket.gethostname(),
            address=link.socket.getpeername()[0],
            facts=facts,
        )
        verdict = _next(link, time.monotonic() + limit_s + _SLACK_S)
    if not verdict:
        raise UserError(
            f"rank 0 at {_text(place)} ended or fell silent while the ranks were gathering: look for its own message"
        )
    if "mistake" in verdict:
        raise UserError(verdict["mistake"])
    return Meeting(verdict["address"], desk.store if desk is not None else None)


class _Desk:
    """Rank 0's side, in a thread of its own: hears all ranks and answers them."""

    world: int
    judge: Callable[[list[Arrival]], str | None]
    limit_s: float
    say: Callable[[str], None]

    def __init__(self, listener: socket.socket, store_port: int | None):
        self.listener, self.store_port = listener, store_port
        self.store: TCPStore | None = None
        self._here: dict[int, tuple[Link, Arrival, str]] = {}
        self._links: list[Link] = []  # of all who have knocked and not left
        self._selector = selectors.DefaultSelector()

    def run(self) -> None:
        """Until all are here, one may not come in, or the time is over; then the verdict."""
        try:
            mistake = self._gather() or self.judge([arrival for _, (_, arrival, _) in sorted(self._here.items())])
        except Exception as error:  # told to all ranks: they wait for a verdict
            mistake = f"rank 0 could not gather the ranks ({type(error).__name__}: {error})"
        if mistake and len(self._here) < self.world:
            self._let_in()
        self.listener.close()
        self._selector.close()
        if mistake is None and self.store_port is not None:
            try:  # every client of the store is told of it by the verdict, so nobody knocks too early
                forever = timedelta(seconds=self.limit_s)
                self.store = TCPStore(
                    "127.0.0.1", self.store_port, None, True, forever, wait_for_workers=False, multi_tenant=True
                )
            except DistError as error:
                mistake = f"port {self.store_port} on {socket.gethostname()} was lost to another program ({error}): choose another, {_OTHER_PORT}"
        reached = [
            address
            for _, _, address in self._here.values()
            if not ipaddress.ip_address(address.partition("%")[0]).is_loopback
        ]
        verdict = {"mistake": mistake} if mistake else {"address": reached[0] if reached else None}
        own = self._here[0][0] if 0 in self._here else None
        for link in sorted(self._links, key=lambda link: link is own):
            link.send(**verdict)  # rank 0 last: with a mistake its process ends when it hears

    def _gather(self) -> str | None:
        begin, told = time.monotonic(), False
        self._selector.register(self.listener, selectors.EVENT_READ)
        while len(self._here) < self.world:
            waited = time.monotonic() - begin
            if waited >= self.limit_s:
                return self._missing(f"did not come within {self.limit_s:g} s")
            if waited >= NOTICE_S and not told:
                told = True
                self.say(
                    f"waiting for {_ranks(self._absent())} of {self.world}, up to {self.limit_s:g} s (parallel.rendezvous_s)"
                )
            for key, _ in self._selector.select(min(1.0, self.limit_s - waited)):
                if key.fileobj is self.listener:
                    self._selector.register(self._greet(), selectors.EVENT_READ)
                elif mistake := self._hear(key.fileobj):
                    return mistake
        return None

    def _let_in(self) -> None:
        """Ranks that come a moment late, rank 0's own among them, hear the mistake as well."""
        end = time.monotonic() + _LATE_S
        while (left := end - time.monotonic()) > 0:
            self.listener.settimeout(left)
            with contextlib.suppress(OSError):
                self._greet()

    def _greet(self) -> Link:
        link = Link(self.listener.accept()[0])
        self._links.append(link)
        link.send(greeting=_GREETING)
        return link

    def _hear(self, link: Link) -> str | None:
        try:
            messages = link.receive()
            if messages:
                return self._admit(link, **messages[0])
        except (ValueError, TypeError):  # not one of us
            messages = None
        if messages is None:
            self._selector.unregister(link)
            self._links.remove(link)
            link.close()
            gone = next((arrival for other, arrival, _ in self._here.values() if other is link), None)
            if gone:
                return f"rank {gone.rank} on {gone.host} ended before all ranks had come: look for its own message"
        return None

    def _admit(self, link: Link, rank: int, world: int, host: str, address: str, facts: dict) -> str | None:
        if rank in self._here or world != self.world or not 0 <= rank < world:
            if world != self.world:
                return f"rank {rank} on {host} was started for {world} ranks and rank 0 for {self.world}: start all hosts with the same numbers"
            return (
                f"rank {rank} came twice, from {self._here[rank][1].host} and from {host}: give every host its own --node_rank, "
                "and end what an earlier start left running"
            )
        self._here[rank] = link, Arrival(rank, host, facts), address
        return None

    def _absent(self) -> list[int]:
        return [rank for rank in range(self.world) if rank not in self._here]

    def _missing(self, what: str) -> str:
        hosts: dict[str, list[int]] = {}
        for rank, (_, arrival, _) in sorted(self._here.items()):
            hosts.setdefault(arrival.host, []).append(rank)
        here = ", ".join(f"{_ranks(ranks)} on {host}" for host, ranks in list(hosts.items())[:8]) or "nobody"
        return (
            f"{_ranks(self._absent())} of {self.world} {what}, here {'are' if len(self._here) > 1 else 'is'} {here}: look for the missing ranks' own "
            "messages and whether their hosts were started and reach this one (docs/multinode.md); parallel.rendezvous_s sets how long to wait"
        )


def _meeting_place(environment: LaunchEnvironment, limit_s: float) -> tuple[tuple[str, int], _Desk | None]:
    """Where to check in, and rank 0's desk there."""
    address, port = environment.master_address, environment.master_port
    if not environment.agent_has_store:
        return (address, port), _Desk(_listen(port), port) if environment.rank == 0 else None
    key = f"megachat/{environment.attempt}/rank 0"
    try:
        store = TCPStore(address, port, None, False, timedelta(seconds=limit_s), wait_for_workers=False)
        if environment.rank != 0:
            return tuple(json.loads(store.get(key))), None
        listener = _listen(0)
        own = own_address(address)  # loopback when MASTER_ADDR names this host: then the others reach it by that name
        place = address if own.startswith("127.") or own == "::1" else own, listener.getsockname()[1]
        store.set(key, json.dumps(place))
        return place, _Desk(listener, None)
    except DistError as error:
        raise UserError(
            f"rank 0 did not come to torchrun's store at {address}:{port} ({str(error).splitlines()[0]}): look for its message"
        ) from None


def _listen(port: int) -> socket.socket:
    try:
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=4096)
        return socket.create_server(("", port), backlog=4096)
    except OSError as error:
        raise UserError(
            f"port {port} on {socket.gethostname()}, where rank 0 listens, cannot be used ({os.strerror(error.errno or 0)}): "
            f"end the earlier job that holds it, or choose another with {_OTHER_PORT}"
        ) from None


def _reach(place: tuple[str, int], environment: LaunchEnvironment, begin: float, limit_s: float, say) -> Link:
    """A connection to rank 0, which may not be up yet."""
    told = False
    while True:
        try:
            link = Link(socket.create_connection(place, timeout=_CONNECT_S))
            if (
                link.socket.getsockname() != link.socket.getpeername()
            ):  # a client that gets its own target's port is connected to itself
                return _greeted(link, place)
            link.close()
            why = "nothing listens there"
        except socket.gaierror:
            why = f"the name {place[0]} does not resolve"
        except ConnectionRefusedError:
            why = "nothing listens there: rank 0 was not started, has ended, or is on another host"
        except OSError as error:
            why = f"{error.strerror or error}: host down, or a firewall between"
        waited, here = time.monotonic() - begin, f"rank {environment.rank} on {socket.gethostname()}"
        if waited >= limit_s:
            raise UserError(
                f"{here} could not reach rank 0 at {_text(place)} within {limit_s:g} s ({why}): correct MASTER_ADDR or mend that"
            )
        if waited >= NOTICE_S and not told and environment.local_rank == 0:
            told = True
            say(f"{here} waits for rank 0 at {_text(place)} ({why})")
        time.sleep(_RETRY_S)


def _greeted(link: Link, place: tuple[str, int]) -> Link:
    """The link, once it is known to lead to a rank 0 of this program."""
    try:
        message = _next(link, time.monotonic() + _SILENCE_S)
        good = isinstance(message, dict) and message.get("greeting") == _GREETING
    except ValueError:
        good = False
    if not good:
        raise UserError(
            f"at {_text(place)} is another program, not rank 0 of this job: end the earlier job that holds the port, "
            f"or choose another with {_OTHER_PORT}"
        )
    return link


def _next(link: Link, deadline: float) -> dict | None:
    """The next message; None when the other end closed or the time is over."""
    while time.monotonic() < deadline:
        messages = link.receive()
        if messages is None:
            return None
        if messages:
            return messages[0]
    return None


def _text(place: tuple[str, int]) -> str:
    return f"{place[0]}:{place[1]}"


def _ranks(ranks: list[int]) -> str:
    """[2, 3, 4, 6] -> "ranks 2-4,6"."""
    return f"rank{'s' * (len(ranks) != 1)} {number_ranges(ranks)}"
