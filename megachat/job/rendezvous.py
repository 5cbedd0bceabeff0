"""The rendezvous before torch.distributed: rank 0 waits for all ranks, names absent ones and refuses unequal ones.

torch's rendezvous waits for absent ranks in silence until its timeout. Here rank 0 listens at MASTER_ADDR:MASTER_PORT
itself, receives every rank's facts, and sends one verdict to all. Only then does torch's store take over the port, so
that no rank finds it closed in between. Under torchrun, whose agent holds that port, rank 0 takes a free one and
publishes it in the agent's store. Rank 0 listens on loopback only where all ranks are known to be on its host.
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
from typing import TypeGuard

from torch.distributed import DistError, TCPStore

from megachat.errors import UserError
from megachat.job.launch import LaunchEnvironment
from megachat.job.links import Entrance, JobKey, Link, introduce, listen, receive_greeting, shared_secret
from megachat.job.monitor_links import local_address
from megachat.text import number_ranges

NOTICE_S = 10.0  # after which a wait is logged, once
_RETRY_S = 0.2
_CONNECT_S = 3.0
_GREETING_S = 30.0  # rank 0 greets at once, but a thousand strangers may be before this rank
_LATE_S = 2.0  # for ranks that arrive while an error is reported
_VERDICT_S = 10.0  # for rank 0's verdict to arrive after its own limit
_TICK_S = 0.25
_MOST_HOST = 255  # characters
_OTHER_PORT = "--master_port (deepspeed), --master-port (torchrun) or MASTER_PORT (srun, mpirun)"

RankFacts = Mapping[str, Mapping[str, str]]  # kind -> name -> hash or short text, compared between ranks
FindProblem = Callable[[list["Arrival"]], str | None]
Address = tuple[str, int]


@dataclass(frozen=True)
class Arrival:
    """A rank that has checked in. address: the IP of rank 0's host at which this rank reached it."""

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


def meet(environment: LaunchEnvironment, facts: RankFacts, find_problem: FindProblem, limit_s: float) -> Meeting:
    """Waits for all ranks; each calls this once.

    find_problem: gets the arrivals in rank order, on rank 0, and returns what is wrong with them. Raises UserError with
    the same sentence on every rank that is here: find_problem's, or which ranks did not arrive within limit_s, arrived
    twice or died. Raises UserError on a single rank if the port is in use, rank 0 cannot be reached, or this rank's
    secret is not rank 0's.
    """
    if environment.world_size == 1:
        return Meeting(None)
    begin, registration = time.monotonic(), None
    key = JobKey(shared_secret(), f"rendezvous {environment.master_port} {environment.attempt}")
    address, listener = _meeting_point(environment, limit_s)
    if listener:
        store_port = None if environment.agent_has_store else address[1]
        registration = _Registration(listener, store_port, environment.world_size, key, find_problem, limit_s)
        threading.Thread(target=registration.run, name="rendezvous", daemon=True).start()
    link = _reach(address, environment, begin, limit_s)
    with link.socket:
        _check_in(link, address, environment, key, facts)
        verdict = link.next_message(time.monotonic() + limit_s + _VERDICT_S)
    if not verdict:
        raise _fell_silent(address)
    if "error" in verdict:
        raise UserError(str(verdict["error"]))
    return Meeting(_checked_ip(verdict.get("address")), registration.store if registration else None)


@dataclass
class _Registration:
    """Rank 0's side, in a thread of its own: registers all ranks and sends them the verdict."""

    listener: socket.socket
    store_port: int | None
    world: int
    key: JobKey
    find_problem: FindProblem
    limit_s: float
    store: TCPStore | None = None
    error: str | None = None
    refused: str = ""  # the last connection without the secret
    arrivals: dict[int, Arrival] = field(default_factory=dict)
    links: dict[Link, int | None] = field(default_factory=dict)  # of a rank -> the rank; None if it is refused
    selector: selectors.BaseSelector = field(default_factory=selectors.DefaultSelector)

    def run(self) -> None:
        """Waits until all ranks are here, one is refused, or the time is over; then sends the verdict."""
        entrance = Entrance(self.listener, self.selector, self.key, self._let_in, self._log_refused)
        try:
            self._gather(entrance)
            error = self.error or self.find_problem([arrival for _, arrival in sorted(self.arrivals.items())])
        except Exception as exception:  # sent to all ranks, because they wait for a verdict
            error = f"rank 0 could not gather the ranks ({type(exception).__name__}: {exception})"
        if error and len(self.arrivals) < self.world:
            # ranks that arrive a moment late, among them perhaps rank 0, receive the error as well
            end = time.monotonic() + _LATE_S
            while time.monotonic() < end:
                self._serve(entrance, end)
        entrance.close()
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

    def _gather(self, entrance: Entrance) -> None:
        begin, logged = time.monotonic(), False
        while len(self.arrivals) < self.world and not self.error:
            waited = time.monotonic() - begin
            if waited >= self.limit_s:
                self.error = self._describe_missing()
            if waited >= NOTICE_S and not logged:
                logged = True
                missing = f"{_name_ranks(self._absent())} of {self.world}"
                print(f"waiting for {missing}, up to {self.limit_s:g} s (parallel.rendezvous_s)", flush=True)
            self._serve(entrance, begin + self.limit_s)

    def _serve(self, entrance: Entrance, end: float) -> None:
        """Handles what arrives on the connections in the next moment, at most until `end` (of time.monotonic())."""
        for key, _ in self.selector.select(max(0.0, min(_TICK_S, end - time.monotonic()))):
            key.data(key.fileobj)
        entrance.tick(time.monotonic())

    def _log_refused(self, address: str, rank: int) -> None:
        first, self.refused = not self.refused, f"rank {rank} from {address}"
        if first:
            print(f"refused {self.refused}: its secret is not this job's (docs/multinode.md)", flush=True)

    def _let_in(self, link: Link, rank: int, message: dict) -> bool:
        """Registers a rank; returns False if its introduction is none."""
        world, host, facts = (message.get(name) for name in ("world", "host", "facts"))
        if type(world) is not int or not _is_printable(host) or len(host) > _MOST_HOST or not _are_facts(facts):
            return False
        self.links[link] = None
        self.selector.modify(link, selectors.EVENT_READ, self._receive)
        if world != self.world or rank >= world:
            self.error = self.error or (
                f"rank {rank} on {host} was started for {world} ranks and rank 0 for {self.world}: "
                "start all hosts with the same numbers"
            )
        elif rank in self.arrivals:
            self.error = self.error or (
                f"rank {rank} arrived twice, from {self.arrivals[rank].host} and from {host}: "
                "give every host its own --node_rank, and end what an earlier start left running"
            )
        else:
            self.arrivals[rank], self.links[link] = Arrival(rank, host, facts, _local_end(link)), rank
        return True

    def _receive(self, link: Link) -> None:
        if link.receive() is not None:  # a rank sends nothing more; it waits
            return
        self.selector.unregister(link)
        link.close()
        rank = self.links.pop(link)
        if rank is not None:
            host = self.arrivals[rank].host
            self.error = self.error or (
                f"rank {rank} on {host} ended before all ranks had arrived: look for its error message"
            )

    def _absent(self) -> list[int]:
        return [rank for rank in range(self.world) if rank not in self.arrivals]

    def _describe_missing(self) -> str:
        hosts: dict[str, list[int]] = {}
        for rank, arrival in sorted(self.arrivals.items()):
            hosts.setdefault(arrival.host, []).append(rank)
        here = ", ".join(f"{_name_ranks(ranks)} on {host}" for host, ranks in list(hosts.items())[:8]) or "nobody"
        refused = f" ({self.refused} was refused, its secret is not this job's)" if self.refused else ""
        return (
            f"{_name_ranks(self._absent())} of {self.world} did not arrive within {self.limit_s:g} s{refused}, "
            f"here {'are' if len(self.arrivals) > 1 else 'is'} {here}: look for the missing ranks' own messages "
            "and whether their hosts were started and reach this one (docs/multinode.md); "
            "parallel.rendezvous_s sets how long to wait"
        )


def _are_facts(facts: object) -> TypeGuard[RankFacts]:
    """Returns whether the value, parsed from JSON, is of the type RankFacts."""
    return isinstance(facts, dict) and all(
        isinstance(values, dict) and all(map(_is_printable, [*values, *values.values()])) for values in facts.values()
    )


def _is_printable(value: object) -> TypeGuard[str]:
    """Returns whether the value can be part of a message on the console."""
    return isinstance(value, str) and value.isprintable()


def _local_end(link: Link) -> str:
    """Returns this host's IP address on a connection, of an IPv4 connection in its usual form."""
    text = link.socket.getsockname()[0]
    mapped = getattr(ipaddress.ip_address(text.partition("%")[0]), "ipv4_mapped", None)
    return str(mapped or text)


def _loopback(environment: LaunchEnvironment) -> str | None:
    """Returns the loopback address at which all ranks meet, or None if MASTER_ADDR is none: others may need to reach
    it then."""
    address = environment.master_address
    if address == "localhost":
        return "127.0.0.1"
    with contextlib.suppress(ValueError):
        if ipaddress.ip_address(address).is_loopback:
            return address
    return None


def _meeting_point(environment: LaunchEnvironment, limit_s: float) -> tuple[Address, socket.socket | None]:
    """Returns where to check in, and on rank 0 the listener there."""
    address, port = environment.master_address, environment.master_port
    loopback = _loopback(environment)
    if not environment.agent_has_store:
        return (loopback or address, port), _listen(port, loopback or "") if environment.rank == 0 else None
    key = f"megachat/{environment.attempt}/rank 0"
    try:
        store = TCPStore(address, port, None, False, timedelta(seconds=limit_s), wait_for_workers=False)
        if environment.rank != 0:
            return _parse_address(store.get(key)), None
        if environment.local_size == environment.world_size:  # as torchrun counts them
            loopback = loopback or "127.0.0.1"
        listener = _listen(0, loopback or "")
        # loopback if MASTER_ADDR names this host: then the others reach it by that name
        local = local_address(address) or socket.gethostname()
        here = address if local.startswith("127.") or local == "::1" else local
        store.set(key, json.dumps([loopback or here, listener.getsockname()[1]]))
        return (loopback or here, listener.getsockname()[1]), listener
    except DistError as error:
        raise UserError(
            f"rank 0 did not come to torchrun's store at {address}:{port} ({str(error).splitlines()[0]}): "
            "look for its error message"
        ) from None


def _parse_address(text: bytes) -> Address:
    """Returns rank 0's address as it stands in torchrun's store, which anyone can write to."""
    try:
        host, port = json.loads(text)
        if isinstance(host, str) and type(port) is int and 0 < port < 2**16:
            return host, port
    except (ValueError, TypeError, RecursionError):
        pass
    raise UserError(f"torchrun's store has {text[:80]!r} as rank 0's address: another program wrote to it, start again")


def _listen(port: int, host: str) -> socket.socket:
    try:
        return listen(port, host)
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
                return link
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


def _check_in(link: Link, address: Address, environment: LaunchEnvironment, key: JobKey, facts: RankFacts) -> None:
    """Introduces this rank to rank 0. Raises UserError if that is another program, or its secret is another one."""
    greeting = receive_greeting(link, time.monotonic() + _GREETING_S)
    if not greeting:
        raise UserError(
            f"at {address[0]}:{address[1]} is another program, not rank 0 of this job: end the earlier job that holds "
            f"the port, or choose another with {_OTHER_PORT}"
        )
    rank, host, deadline = environment.rank, socket.gethostname(), time.monotonic() + _GREETING_S
    try:
        if introduce(link, greeting, key, rank, deadline, world=environment.world_size, host=host, facts=facts):
            return
    except ConnectionError:
        raise _fell_silent(address) from None
    here, there = f"rank {rank} on {host}", f"rank 0 at {address[0]}:{address[1]}"
    if key.secret and greeting.has_secret:
        what = f"the secret of {here} is not that of {there}"
    elif greeting.has_secret:
        what = f"{here} has no secret, which {there} requires"
    elif key.secret:
        what = f"{here} has a secret and {there} has none"
    else:
        raise UserError(f"{there} belongs to another job: start all ranks with the same MASTER_ADDR and MASTER_PORT")
    raise UserError(f"{what}: give all ranks the same MEGACHAT_SECRET or MEGACHAT_SECRET_FILE (docs/multinode.md)")


def _checked_ip(address: object) -> str | None:
    if address is None:
        return None
    try:
        ipaddress.ip_address(str(address).partition("%")[0])
    except ValueError:
        raise UserError(f"rank 0 sent {address!r} as its IP address: start all ranks from the same code") from None
    return str(address)


def _fell_silent(address: Address) -> UserError:
    return UserError(
        f"rank 0 at {address[0]}:{address[1]} ended or fell silent during the rendezvous: look for its error message"
    )


def _name_ranks(ranks: list[int]) -> str:
    """[2, 3, 4, 6] -> "ranks 2-4,6"."""
    return f"rank{'s' * (len(ranks) != 1)} {number_ranges(ranks)}"
