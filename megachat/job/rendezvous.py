"""The rendezvous before torch.distributed: rank 0 waits for all ranks, names absent ones and refuses unequal ones.

torch's rendezvous waits for absent ranks in silence until its timeout. Here rank 0 listens at MASTER_ADDR:MASTER_PORT
itself, receives every rank's facts, and sends one verdict to all. Only then does torch's store take over the port, so
that no rank finds it closed in between. Under torchrun, whose agent holds that port, rank 0 takes a free one and
publishes it in the agent's store.
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
from dataclasses import dataclass, field
from datetime import timedelta

from torch.distributed import DistError, TCPStore

from megachat.errors import UserError
from megachat.job.launch import LaunchEnvironment
from megachat.job.monitor_links import Link, listen, local_address
from megachat.text import number_ranges

NOTICE_S = 10.0  # after which a wait is logged, once
_RETRY_S = 0.2
_CONNECT_S = 3.0
_GREETING_S = 10.0  # rank 0 greets at once
_LATE_S = 2.0  # for ranks that arrive while an error is reported
_VERDICT_S = 10.0  # for rank 0's verdict to arrive after its own limit
_GREETING = "megachat rank 0"
_OTHER_PORT = "--master_port (deepspeed), --master-port (torchrun) or MASTER_PORT (srun, mpirun)"

RankFacts = Mapping[str, Mapping[str, str]]  # kind -> name -> hash or short text, compared between ranks
Judge = Callable[[list["Arrival"]], str | None]
Address = tuple[str, int]


@dataclass(frozen=True)
class Arrival:
    """A rank that has checked in. address: rank 0's host as this rank reached it."""

    rank: int
    host: str
    facts: RankFacts
    address: str = "127.0.0.1"


@dataclass(frozen=True)
class Meeting:
    """The result once all ranks are here.

    address: rank 0's host as another host reached it; None if all came over loopback. store: holds the port.
    """

    address: str | None
    store: TCPStore | None = None


def meet(environment: LaunchEnvironment, facts: RankFacts, judge: Judge, limit_s: float) -> Meeting:
    """Waits for all ranks; each calls this once. judge gets the arrivals in rank order on rank 0, and returns an error.

    Raises UserError with the same sentence on every rank that is here: ranks that did not arrive within limit_s, that
    arrived twice or died, or judge's error. On a single rank: the port is in use, or rank 0 cannot be reached.
    """
    if environment.world_size == 1:
        return Meeting(None)
    begin, desk = time.monotonic(), None
    address, listener = _meeting_point(environment, limit_s)
    if listener:
        store_port = None if environment.agent_has_store else address[1]
        desk = _Desk(listener, store_port, environment.world_size, judge, limit_s)
        threading.Thread(target=desk.run, name="rendezvous", daemon=True).start()
    link = _reach(address, environment, begin, limit_s)
    with link.socket:
        link.send(
            rank=environment.rank,
            world=environment.world_size,
            host=socket.gethostname(),
            address=link.socket.getpeername()[0],
            facts=facts,
        )
        verdict = _next_message(link, time.monotonic() + limit_s + _VERDICT_S)
    if not verdict:
        raise UserError(
            f"rank 0 at {address[0]}:{address[1]} ended or fell silent during the rendezvous: "
            "look for its error message"
        )
    if "error" in verdict:
        raise UserError(verdict["error"])
    return Meeting(verdict["address"], desk.store if desk else None)


@dataclass
class _Desk:
    """Rank 0's side, in a thread of its own: registers all ranks and sends them the verdict."""

    listener: socket.socket
    store_port: int | None
    world: int
    judge: Judge
    limit_s: float
    store: TCPStore | None = None
    arrivals: dict[int, Arrival] = field(default_factory=dict)
    links: dict[Link, int | None] = field(default_factory=dict)  # open connection -> its rank, once it has checked in
    selector: selectors.BaseSelector = field(default_factory=selectors.DefaultSelector)

    def run(self) -> None:
        """Waits until all ranks are here, one is refused, or the time is over; then sends the verdict."""
        try:
            error = self._gather() or self.judge([arrival for _, arrival in sorted(self.arrivals.items())])
        except Exception as exception:  # sent to all ranks, because they wait for a verdict
            error = f"rank 0 could not gather the ranks ({type(exception).__name__}: {exception})"
        if error and len(self.arrivals) < self.world:
            self._greet_late_ranks()
        self.listener.close()
        self.selector.close()
        if error is None and self.store_port is not None:
            error = self._open_store(self.store_port)
        addresses = [arrival.address for arrival in self.arrivals.values()]
        remote = [each for each in addresses if not ipaddress.ip_address(each.partition("%")[0]).is_loopback]
        for link in sorted(self.links, key=lambda link: self.links[link] == 0):
            # rank 0 last: with an error its process ends when it receives this
            link.send(**({"error": error} if error else {"address": remote[0] if remote else None}))

    def _open_store(self, port: int) -> str | None:
        """Starts torch's store; its clients wait for the verdict, so none connects too early. Returns an error."""
        timeout = timedelta(seconds=self.limit_s)
        try:
            self.store = TCPStore("127.0.0.1", port, None, True, timeout, wait_for_workers=False, multi_tenant=True)
            return None
        except DistError as error:
            where = f"port {port} on {socket.gethostname()}"
            return f"{where} was lost to another program ({error}): choose another with {_OTHER_PORT}"

    def _gather(self) -> str | None:
        begin, logged = time.monotonic(), False
        self.selector.register(self.listener, selectors.EVENT_READ)
        while len(self.arrivals) < self.world:
            waited = time.monotonic() - begin
            if waited >= self.limit_s:
                return self._describe_missing()
            if waited >= NOTICE_S and not logged:
                logged = True
                missing = f"{_name_ranks(self._absent())} of {self.world}"
                print(f"waiting for {missing}, up to {self.limit_s:g} s (parallel.rendezvous_s)", flush=True)
            for key, _ in self.selector.select(min(1.0, self.limit_s - waited)):
                if key.fileobj is self.listener:
                    self.selector.register(self._greet(), selectors.EVENT_READ)
                elif isinstance(key.fileobj, Link) and (error := self._receive(key.fileobj)):
                    return error
        return None

    def _greet_late_ranks(self) -> None:
        """Lets ranks that arrive a moment late, among them perhaps rank 0, receive the error as well."""
        end = time.monotonic() + _LATE_S
        while (left := end - time.monotonic()) > 0:
            self.listener.settimeout(left)
            with contextlib.suppress(OSError):
                self._greet()

    def _greet(self) -> Link:
        link = Link(self.listener.accept()[0])
        self.links[link] = None
        link.send(greeting=_GREETING)
        return link

    def _receive(self, link: Link) -> str | None:
        try:
            messages = link.receive()
            if messages:
                return self._register(link, **messages[0])
        except (ValueError, TypeError):  # another program
            messages = None
        if messages is None:
            self.selector.unregister(link)
            link.close()
            rank = self.links.pop(link)
            if rank is not None:
                host = self.arrivals[rank].host
                return f"rank {rank} on {host} ended before all ranks had arrived: look for its error message"
        return None

    def _register(self, link: Link, rank: int, world: int, host: str, address: str, facts: dict) -> str | None:
        if world != self.world or not 0 <= rank < world:
            return (
                f"rank {rank} on {host} was started for {world} ranks and rank 0 for {self.world}: "
                "start all hosts with the same numbers"
            )
        if rank in self.arrivals:
            return (
                f"rank {rank} arrived twice, from {self.arrivals[rank].host} and from {host}: "
                "give every host its own --node_rank, and end what an earlier start left running"
            )
        self.arrivals[rank], self.links[link] = Arrival(rank, host, facts, address), rank
        return None

    def _absent(self) -> list[int]:
        return [rank for rank in range(self.world) if rank not in self.arrivals]

    def _describe_missing(self) -> str:
        hosts: dict[str, list[int]] = {}
        for rank, arrival in sorted(self.arrivals.items()):
            hosts.setdefault(arrival.host, []).append(rank)
        here = ", ".join(f"{_name_ranks(ranks)} on {host}" for host, ranks in list(hosts.items())[:8]) or "nobody"
        return (
            f"{_name_ranks(self._absent())} of {self.world} did not arrive within {self.limit_s:g} s, "
            f"here {'are' if len(self.arrivals) > 1 else 'is'} {here}: look for the missing ranks' own messages "
            "and whether their hosts were started and reach this one (docs/multinode.md); "
            "parallel.rendezvous_s sets how long to wait"
        )


def _meeting_point(environment: LaunchEnvironment, limit_s: float) -> tuple[Address, socket.socket | None]:
    """Returns where to check in, and on rank 0 the listener there."""
    address, port = environment.master_address, environment.master_port
    if not environment.agent_has_store:
        return (address, port), _listen(port) if environment.rank == 0 else None
    key = f"megachat/{environment.attempt}/rank 0"
    try:
        store = TCPStore(address, port, None, False, timedelta(seconds=limit_s), wait_for_workers=False)
        if environment.rank != 0:
            host, port = json.loads(store.get(key))
            return (host, port), None
        listener = _listen(0)
        # loopback if MASTER_ADDR names this host: then the others reach it by that name
        local = local_address(address) or socket.gethostname()
        here = address if local.startswith("127.") or local == "::1" else local, listener.getsockname()[1]
        store.set(key, json.dumps(here))
        return here, listener
    except DistError as error:
        raise UserError(
            f"rank 0 did not come to torchrun's store at {address}:{port} ({str(error).splitlines()[0]}): "
            "look for its error message"
        ) from None


def _listen(port: int) -> socket.socket:
    try:
        return listen(port)
    except OSError as error:
        raise UserError(
            f"port {port} on {socket.gethostname()}, where rank 0 listens, cannot be used "
            f"({os.strerror(error.errno or 0)}): end the earlier job that holds it, "
            f"or choose another with {_OTHER_PORT}"
        ) from None


def _reach(address: Address, environment: LaunchEnvironment, begin: float, limit_s: float) -> Link:
    """Returns a connection to rank 0, which may not be up yet."""
    here, logged = f"rank {environment.rank} on {socket.gethostname()}", False
    target = f"rank 0 at {address[0]}:{address[1]}"
    while True:
        try:
            link = Link(socket.create_connection(address, timeout=_CONNECT_S))
            if link.socket.getsockname() != link.socket.getpeername():  # a client may be given the port that it wants
                return _greeted(link, address)
            link.close()
            why = "nothing listens there"
        except socket.gaierror:
            why = f"the name {address[0]} does not resolve"
        except ConnectionRefusedError:
            why = "nothing listens there: rank 0 was not started, has ended, or is on another host"
        except OSError as error:
            why = f"{error.strerror or error}: host down, or a firewall between"
        waited = time.monotonic() - begin
        if waited >= limit_s:
            raise UserError(
                f"{here} could not reach {target} within {limit_s:g} s ({why}): correct MASTER_ADDR or fix the cause"
            )
        if waited >= NOTICE_S and not logged and environment.local_rank == 0:
            logged = True
            print(f"{here} waits for {target} ({why})", flush=True)
        time.sleep(_RETRY_S)


def _greeted(link: Link, address: Address) -> Link:
    """Returns the link once it is known to lead to rank 0 of a megachat job."""
    message = None
    with contextlib.suppress(ValueError):
        message = _next_message(link, time.monotonic() + _GREETING_S)
    if not isinstance(message, dict) or message.get("greeting") != _GREETING:
        raise UserError(
            f"at {address[0]}:{address[1]} is another program, not rank 0 of this job: end the earlier job that holds "
            f"the port, or choose another with {_OTHER_PORT}"
        )
    return link


def _next_message(link: Link, deadline: float) -> dict | None:
    """Returns the next message; None when the other end closed or the time is over."""
    while time.monotonic() < deadline:
        messages = link.receive()
        if messages is None:
            return None
        if messages:
            return messages[0]
    return None


def _name_ranks(ranks: list[int]) -> str:
    """[2, 3, 4, 6] -> "ranks 2-4,6"."""
    return f"rank{'s' * (len(ranks) != 1)} {number_ranges(ranks)}"
