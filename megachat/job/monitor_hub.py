"""The hub of the failure monitor: receives the messages of all ranks, reports which rank has died or blocks the others,
and ends the job.

Rank 0 has the hub. A second rank, the backup monitor, has another one, to which all ranks are connected as well. It
acts only when rank 0 has died or does not answer. A death is a connection that closes without a goodbye, which the
kernel reports within milliseconds, whatever Python does. A hub stops listening when all ranks are connected.
"""

import contextlib
import functools
import selectors
import socket
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from megachat.errors import LOST_RANK_STATUS, STALL_STATUS, STOPPED_STATUS
from megachat.job.links import Entrance, JobKey, Link
from megachat.job.monitor_links import RankAddress, write_stderr
from megachat.text import text_table

ANSWER_S = 3.0  # for all ranks to report their state
BACKUP_S = 2.0  # after ANSWER_S without a word from rank 0's hub, the backup monitor takes over
JOIN_S = 60.0  # after which a hub stops listening: a rank that is not connected by then has reported that
TOGETHER_S = 0.1  # deaths this close are reported in one sentence
RESUME_HINT = "continue with --resume auto"
_NAMED = 8  # of many ranks, so many are named


class JobInfo(NamedTuple):
    """What all monitors of a job share.

    key: distinguishes the job's connections from a stranger's. folder: the run folder. restart_hint: what the user
    does once the cause is fixed.
    """

    addresses: tuple[RankAddress, ...]
    key: JobKey
    stall_s: float
    slow_s: float
    folder: Path
    restart_hint: str = RESUME_HINT


def hub_ranks(addresses: tuple[RankAddress, ...]) -> tuple[int, int]:
    """Returns rank 0 and the backup monitor, which is on another machine where there is one."""
    first = addresses[0].machine
    return 0, next((address.rank for address in addresses if address.machine != first), 1)


class MonitorHub:
    """Decides when the job ends. The thread of its rank's failure monitor calls everything here, and nothing blocks.

    links: rank -> its connection. lost, left: ranks whose connection closed without and after a goodbye.
    end: (status, silent ranks) once the job ends, for this rank as for all.
    """

    def __init__(self, job: JobInfo, rank: int, listener: socket.socket, selector: selectors.BaseSelector):
        self.job, self.rank = job, rank
        self.links: dict[int, Link] = {}
        self.lost: set[int] = set()
        self.left: set[int] = set()
        self.end: tuple[int, tuple[int, ...]] | None = None
        self._take_over_at = self._report_lost_at = self._decide_at = 0.0  # times at which to act; 0: not due
        self._states: dict[int, dict] = {}
        self._broken: tuple[int, str] | None = None
        self._stop_noticed = False  # a launcher stops all ranks; it is reported once
        self._selector = selector
        self._entrance = Entrance(listener, selector, job.key, self._let_in)
        self._stop_listening_at = time.monotonic() + JOIN_S

    @property
    def reports_deaths(self) -> bool:
        """Whether this hub, and not another one, reports deaths."""
        return self.rank == 0 or 0 in self.lost

    def _let_in(self, link: Link, rank: int, _: dict) -> bool:
        if rank >= len(self.job.addresses) or rank in self.links:
            return False
        self.links[rank] = link
        self._selector.modify(link, selectors.EVENT_READ, functools.partial(self._receive, rank))
        return True

    def _receive(self, rank: int, link: Link) -> None:
        messages = link.receive()
        for message in messages or []:
            self._handle(rank, message)
        if messages is None:
            self._selector.unregister(link)
            link.close()
            self.links.pop(rank, None)
            if rank not in self.left:
                self.lost.add(rank)
                self._report_lost_at = self._report_lost_at or time.monotonic() + TOGETHER_S

    def _handle(self, rank: int, message: dict) -> None:
        if "bye" in message:
            self.left.add(rank)
            if message["bye"] == "failed":
                self._send_all(failed=rank)
        elif "state" in message:
            self._states[rank] = message["state"]
        elif "stalled" in message:
            self._request_states_soon()
        elif "broken" in message:
            self._broken = self._broken or (rank, message["broken"])
            self._request_states_soon()
        elif "stop_notice" in message:
            if not self._stop_noticed:
                write_stderr(message["stop_notice"])
            self._stop_noticed = True
        elif "stop" in message and self._report_lost_at and self.reports_deaths:
            self._report_lost()  # a launcher that ends the others for the same reason does not wait
        elif "stop" in message and not self._report_lost_at:
            self._finish(f"error: {message['stop']}, so the job stops: {self.job.restart_hint}", STOPPED_STATUS)

    def tick(self, now: float) -> None:
        """Does what is due. To be called several times per second."""
        if len(self.links) == len(self.job.addresses) or now >= self._stop_listening_at:
            self._entrance.close()
        self._entrance.tick(now)
        if self._take_over_at and (now >= self._take_over_at or 0 in self.lost | self.left):
            self._request_states()
        if self._report_lost_at:  # a backup monitor that has taken over reports deaths as well: rank 0 does not answer
            if now >= self._report_lost_at and (self.reports_deaths or self._decide_at):
                self._report_lost()
        elif self._decide_at and (now >= self._decide_at or self._states.keys() >= self.links.keys()):
            self._decide_at = 0.0
            self._decide()

    def stand_down(self) -> None:
        """Leaves the stall to rank 0's hub, which has just sent this rank a message."""
        self._take_over_at = 0.0

    def leave(self, how: str) -> None:
        """Sends a goodbye as this rank leaves, so that no rank takes it for a death. how: "done" or "failed"."""
        self._send_all(bye=how, rank=self.rank)
        self._entrance.close()
        for link in self.links.values():
            link.close()

    def _send_all(self, **message) -> None:
        for link in list(self.links.values()):
            link.send(**message)

    def _request_states_soon(self) -> None:
        """Asks all ranks for their state: rank 0's hub at once, the backup monitor once rank 0's has had its time."""
        if self.rank == 0:
            self._request_states()
        elif not self._decide_at:
            self._take_over_at = self._take_over_at or time.monotonic() + ANSWER_S + BACKUP_S

    def _request_states(self) -> None:
        self._take_over_at = 0.0
        if not self._decide_at:
            self._states, self._decide_at = {}, time.monotonic() + ANSWER_S
            self._send_all(report_state=True)

    def _finish(self, text: str, status: int, silent: tuple[int, ...] = ()) -> None:
        if self.end is None:
            write_stderr(text)
            self._send_all(end=status, silent=silent)
            self.end = status, silent

    def _report_lost(self) -> None:
        named = " and ".join(str(self.job.addresses[rank]) for rank in sorted(self.lost))
        self._finish(
            f"error: {named} died or cannot be reached; the other ranks stop: "
            "look for an error message of its own, for the out-of-memory killer (dmesg) and at its host, "
            f"then {self.job.restart_hint}",
            LOST_RANK_STATUS,
        )

    def _decide(self) -> None:
        """Decides whether the job is stalled, once all ranks have reported their state or had their time."""
        states, job = self._states, self.job
        limit = job.slow_s if any(state["slow"] for state in states.values()) else job.stall_s
        waited = max((state["for_s"] for state in states.values() if state["waits"]), default=0.0)
        stalled = waited >= limit and all(state["for_s"] >= 0.9 * limit for state in states.values())
        if not stalled and self._broken is None:
            self._send_all(no_stall=True)
            return
        silent = tuple(rank for rank in sorted(self.links) if rank not in states)
        report, file = rank_table(job.addresses, states), job.folder / "stall.txt"
        where = f"the table above is also in {file}" if job.folder.is_dir() else "the table is above"
        sentence = (
            f"error: {describe_stall(job.addresses, states, silent, self._broken)}; {where}; fix the cause, "
            f"or raise parallel.stall_s if this can legitimately take that long, and {job.restart_hint}"
        )
        with contextlib.suppress(OSError):
            if job.folder.is_dir():
                text = f"{time.strftime('%Y-%m-%d %H:%M:%S')}\n{report}\n{sentence}\n"
                file.write_text(text, encoding="utf-8")
        self._finish(f"{report}\n{sentence}", STALL_STATUS, silent)


def rank_table(addresses: tuple[RankAddress, ...], states: dict[int, dict]) -> str:
    """Returns a table of what every rank is doing, one per line."""
    rows = [("rank", "host", "pid", "what it does", "for", "line", "innermost line")]
    for address in addresses:
        cells = ("no answer", "", "", "")
        if state := states.get(address.rank):
            cells = (_activity(state), f"{state['for_s']:.0f} s", *state["lines"])
        rows.append((str(address.rank), address.host, str(address.pid), *cells))
    return "\n".join(text_table(rows))


def _activity(state: dict) -> str:
    number = f" ({state['axis']} {state['number']})" if state["number"] else ""
    after = ', after "{}" ({} {})'.format(*state["after"]) if state["after"] else ""
    return f'{"waits in" if state["waits"] else "in"} "{state["text"]}"{number}{after}'


def blocking_ranks(states: dict[int, dict], silent: tuple[int, ...]) -> list[int]:
    """Returns the ranks for which the others wait; empty when the states do not show it.

    These are ranks that do not answer. Else ranks that do not wait. Else ranks that have begun fewer collectives on an
    axis than another rank that waits there. Else, where most ranks wait in one operation, the few that wait in another.
    """
    if silent:
        return list(silent)
    if busy := [rank for rank, state in states.items() if not state["waits"]]:
        return sorted(busy)
    for state in states.values():
        counts = {rank: states[rank]["counts"].get(state["axis"], 0) for rank in state["ranks"] if rank in states}
        if behind := {rank: count for rank, count in counts.items() if count < state["number"]}:
            return [rank for rank, count in behind.items() if count == min(behind.values())]
    operations: dict[str, list[int]] = {}
    for rank, state in sorted(states.items()):
        operations.setdefault(state["text"], []).append(rank)
    *_, fewest = sorted(operations.values(), key=len, reverse=True)
    return fewest if len(operations) > 1 and len(fewest) * 2 <= len(states) else []


def describe_stall(
    addresses: tuple[RankAddress, ...], states: dict[int, dict], silent: tuple[int, ...], broken: tuple[int, str] | None
) -> str:
    """Returns one sentence on a job that is stalled, or in which a collective raised an error (rank, text)."""
    blocking = blocking_ranks(states, silent)
    others = [state for rank, state in states.items() if rank not in blocking and state["waits"]]
    longest = max(others or list(states.values()), key=lambda state: state["for_s"], default=None)
    waiting = f'"{longest["text"]}" for {longest["for_s"]:.0f} s' if longest else ""
    error = f" (rank {broken[0]} got: {broken[1]})" if broken else ""
    if not blocking:
        return f"all ranks wait for one another, the first in {waiting}{error}"
    one = len(blocking) == 1
    if silent:
        named = _listed_ranks(addresses[rank] for rank in silent)
        what = f"{'does' if one else 'do'} not answer, stopped or stuck in C code,"
    else:
        named = _listed_ranks(f"rank {rank} (host {addresses[rank].host})" for rank in blocking)
        state = states[blocking[0]]
        doing = f', waiting in "{state["text"]}",' if state["waits"] else ""
        subject = "is holding up the others: it is" if one else "are holding up the others: the first is"
        what = f"{subject} in {state['lines'][0]}{doing}"
    return f"{named} {what} while the other ranks wait in {waiting}{error}"


def _listed_ranks(ranks: Iterable[object]) -> str:
    names = [str(rank) for rank in ranks]
    return " and ".join(names[:_NAMED]) + (" and more" if len(names) > _NAMED else "")
