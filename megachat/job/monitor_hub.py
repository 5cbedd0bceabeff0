"""Where the watch comes together: one rank hears all others, names the one that is missing or elsewhere, and ends the job.

Rank 0 has the hub. A second rank, the deputy, has another one, to which all ranks are connected as well; it speaks only when rank 0 died or is
silent. A death is a connection that closes without a farewell, which the kernel tells within milliseconds, whatever Python does.
"""

import contextlib
import os
import time
from pathlib import Path
from typing import NamedTuple

from megachat.errors import LOST_RANK_STATUS, STALL_STATUS, STOPPED_STATUS
from megachat.job.monitor_links import Link, RankAddress, say
from megachat.text import text_table

ANSWER_S = 3.0  # for all ranks to say where they are
TOGETHER_S = 0.1  # deaths this close are told in one sentence
RESUME = "continue with --resume auto"


class JobInfo(NamedTuple):
    """What the hubs and ranks of one job share. token: tells this job's connections from a stranger's. folder: the run folder. then: what a user
    does after the job has ended and the cause is gone."""

    seats: tuple[RankAddress, ...]
    token: str
    stall_s: float
    slow_s: float
    folder: Path
    then: str = RESUME


class MonitorHub:
    """The side of the watch that decides. Its rank's watch thread calls everything here; nothing blocks.

    links: rank -> its connection. lost, left: ranks whose connection closed without and after a farewell.
    """

    def __init__(self, terms: JobInfo, rank: int):
        self.terms, self.rank = terms, rank
        self.links: dict[int, Link] = {}
        self.lost: set[int] = set()
        self.left: set[int] = set()
        self.end: tuple[int, tuple[int, ...]] | None = (
            None  # (status, silent ranks) once the job ends, for this rank as for all
        )
        self._name_lost_at = self._judge_at = 0.0
        self._states: dict[int, dict] = {}
        self._broken: tuple[int, str] | None = None
        self._asked = False  # a launcher tells all ranks to stop; it is said once

    @property
    def speaks(self) -> bool:
        """Whether deaths are this hub's to tell."""
        return self.rank == 0 or 0 in self.lost

    def join(self, rank: int, link: Link) -> None:
        """A rank has connected and shown the token."""
        self.links[rank] = link

    def lose(self, rank: int) -> None:
        """The rank's connection has closed."""
        self.links.pop(rank, None)
        if rank not in self.left:
            self.lost.add(rank)
            if not self._name_lost_at:
                self._name_lost_at = time.monotonic() + TOGETHER_S

    def hear(self, rank: int, message: dict) -> None:
        """A message of a connected rank."""
        if "bye" in message:
            self.left.add(rank)
            if message["bye"] == "failed":
                self._tell(failed=rank)
        elif "state" in message:
            self._states[rank] = message["state"]
        elif "stalled" in message:
            self._ask()
        elif "broken" in message:
            self._broken = self._broken or (rank, message["broken"])
            self._ask()
        elif "asked" in message:
            if not self._asked:
                say(message["asked"])
            self._asked = True
        elif "stop" in message and self._name_lost_at and self.speaks:
            self._name_lost()  # a launcher that ends the others for the same reason does not wait
        elif "stop" in message and not self._name_lost_at:
            self._finish(f"error: {message['stop']}, so the job stops: {self.terms.then}", STOPPED_STATUS)

    def tick(self) -> None:
        """Do what is due."""
        now = time.monotonic()
        if (
            self._name_lost_at and now >= self._name_lost_at and (self.speaks or self._judge_at)
        ):  # asked though it is a deputy's: rank 0 is silent
            self._name_lost()
        elif (
            self._judge_at
            and not self._name_lost_at
            and (now >= self._judge_at or self._states.keys() >= self.links.keys())
        ):
            self._judge_at = 0.0
            self._judge()

    def leave(self, failed: bool) -> None:
        """This rank leaves; whoever hears this does not take it for a death."""
        self._tell(**{"bye": "failed" if failed else "done", "rank": self.rank})
        for link in self.links.values():
            link.close()

    def _tell(self, **message) -> None:
        for link in list(self.links.values()):
            link.send(**message)

    def _ask(self) -> None:
        if not self._judge_at:
            self._states, self._judge_at = {}, time.monotonic() + ANSWER_S
            self._tell(ask=True)

    def _finish(self, text: str, status: int, silent: tuple[int, ...] = ()) -> None:
        if self.end is None:
            say(text)
            self._tell(end=status, silent=silent)
            self.end = status, silent

    def _name_lost(self) -> None:
        named = " and ".join(str(self.terms.seats[rank]) for rank in sorted(self.lost))
        self._finish(
            f"error: {named} died or cannot be reached; the other ranks stop: look for a message of its own, for the out-of-memory killer (dmesg) "
            f"and at its host, then {self.terms.then}",
            LOST_RANK_STATUS,
        )

    def _judge(self) -> None:
        """Everybody has said where it is, or had its time: does the job stand still?"""
        states, terms = self._states, self.terms
        limit = terms.slow_s if any(state["slow"] for state in states.values()) else terms.stall_s
        waited = max((state["for_s"] for state in states.values() if state["waits"]), default=0.0)
        still = waited >= limit and all(state["for_s"] >= 0.9 * limit for state in states.values())
        if not still and self._broken is None:
            self._tell(heard=True)
            return
        silent = tuple(rank for rank in sorted(self.links) if rank not in states)
        report = table(terms.seats, states)
        sentence = f"error: {verdict(terms.seats, states, silent, self._broken)}; {self._advice()}"
        with contextlib.suppress(OSError):
            if terms.folder.is_dir():
                (terms.folder / "stall.txt").write_text(
                    f"{time.strftime('%Y-%m-%d %H:%M:%S')}\n{report}\n{sentence}\n", encoding="utf-8"
                )
        self._finish(f"{report}\n{sentence}", STALL_STATUS, silent)

    def _advice(self) -> str:
        kept = (
            f"the table above is also in {self.terms.folder / 'stall.txt'}"
            if self.terms.folder.is_dir()
            else "the table is above"
        )
        return f"{kept}; mend that, or raise parallel.stall_s if it may take so long, and {self.terms.then}"


def table(seats: tuple[RankAddress, ...], states: dict[int, dict]) -> str:
    """Where every rank is, one a line."""
    rows = [("rank", "host", "pid", "what it does", "for", "line", "innermost line")]
    for seat in seats:
        state = states.get(seat.rank)
        told = (_doing(state), f"{state['for_s']:.0f} s", *state["line"]) if state else ("no answer", "", "", "")
        rows.append((str(seat.rank), seat.host, str(seat.pid), *told))
    return "\n".join(text_table(rows))


def _doing(state: dict) -> str:
    number = f" ({state['axis']} {state['number']})" if state["number"] else ""
    after = ', after "{}" ({} {})'.format(*state["after"]) if state["after"] else ""
    return f'{"waits in" if state["waits"] else "in"} "{state["text"]}"{number}{after}'


def blocking_ranks(states: dict[int, dict], silent: tuple[int, ...]) -> list[int]:
    """The ranks for which the others wait; empty when the states do not tell.

    Ranks that do not answer; else those that wait for nobody; else those that have begun fewer collectives of an axis than another rank that
    waits there; else, where all wait but most in one place, the few that wait in another.
    """
    if silent:
        return list(silent)
    if busy := [rank for rank, state in states.items() if not state["waits"]]:
        return sorted(busy)
    for state in states.values():
        if behind := [
            rank
            for rank in state["ranks"]
            if rank in states and states[rank]["counts"].get(state["axis"], 0) < state["number"]
        ]:
            fewest = min(states[rank]["counts"].get(state["axis"], 0) for rank in behind)
            return [rank for rank in behind if states[rank]["counts"].get(state["axis"], 0) == fewest]
    places: dict[str, list[int]] = {}
    for rank, state in sorted(states.items()):
        places.setdefault(state["text"], []).append(rank)
    *_, fewest = sorted(places.values(), key=len, reverse=True)
    return fewest if len(places) > 1 and len(fewest) * 2 <= len(states) else []


def verdict(
    seats: tuple[RankAddress, ...], states: dict[int, dict], silent: tuple[int, ...], broken: tuple[int, str] | None
) -> str:
    """One sentence on a job that stands still, or in which a collective raised an error (rank, text)."""
    culprits = blocking_ranks(states, silent)
    others = [state for rank, state in states.items() if rank not in culprits and state["waits"]]
    longest = max(others or list(states.values()), key=lambda state: state["for_s"], default=None)
    waiting = f'"{longest["text"]}" for {longest["for_s"]:.0f} s' if longest else ""
    error = f" (rank {broken[0]} got: {broken[1]})" if broken else ""
    if not culprits:
        return f"all ranks wait for one another, the first in {waiting}{error}"
    named = " and ".join(f"rank {rank} (host {seats[rank].host})" for rank in culprits[:8]) + (
        " and more" if len(culprits) > 8 else ""
    )
    one = len(culprits) == 1
    if silent:
        named = " and ".join(str(seats[rank]) for rank in silent[:8]) + (" and more" if len(silent) > 8 else "")
        where = f"{'does' if one else 'do'} not answer, stopped or stuck in C code,"
    else:
        state = states[culprits[0]]
        doing = f', waiting in "{state["text"]}",' if state["waits"] else ""
        where = f"{'is' if one else 'are'} elsewhere: {'it is' if one else 'the first is'} in {state['line'][0]}{doing}"
    return f"{named} {where} while the other ranks wait in {waiting}{error}"


def alive(pid: int) -> bool:
    """Whether a process of this machine runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False
    except OSError:
        with contextlib.suppress(OSError):
            os.kill(pid, 0)
            return True
        return False
