"""The watch: a thread on every rank that names a rank which died, stands still or was told to stop, and ends the job everywhere.

Rules, all of which concern the training thread's Progress:
- A job stands still when one rank waits (in a collective, or a note with waits=True) for parallel.stall_s and no rank has begun or noted
  anything new meanwhile. Work that may keep others waiting longer is declared with Progress.long_running(); then nine tenths of parallel.timeout_s count.
- A rank is dead when its connection closes without a farewell. An idle job sends nothing.
- SIGTERM, SIGUSR1 and the end of a launcher among this process's ancestors (the deepspeed runner leaves its ranks behind) stop the job: while
  it trains, by asking the training thread to save, which has a limited time but after SIGUSR1; before, at once.
The thread needs the interpreter lock now and then; nothing else of the training thread, which may hang in C code. What goes wrong in the watch
itself is told once and ends the watch, never the job.
"""

import contextlib
import functools
import os
import secrets
import selectors
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from megachat.errors import LOST_RANK_STATUS, STOPPED_STATUS
from megachat.job.monitor_hub import ANSWER_S, RESUME, JobInfo, MonitorHub, alive
from megachat.job.monitor_links import (
    Link,
    RankAddress,
    code_place,
    end_process,
    kill,
    launchers_above,
    listen,
    machine,
    own_address,
    say,
)
from megachat.parallel.collectives import all_gather_objects
from megachat.parallel.mesh import Mesh
from megachat.parallel.progress import Progress

_STOPPING = (
    signal.SIGTERM,
    signal.SIGUSR1,
)  # the first before a kill, the second as slurm and others are asked to warn
TICK_S = 0.25
CONNECT_S = 10.0
VERDICT_S = 0.5  # an error may be the echo of a death that the kernel is about to tell
HUB_S = 2.0  # for the hub, or the deputy, to speak before this rank does
FAREWELL_S = 6.0  # ranks that fail speak within 3 s; then the others go


class FailureMonitor:
    """Used as `with FailureMonitor(rank) as watch: mesh = ...; watch.connect(mesh, ...); train`.

    Signals and launchers are watched from the start, the other ranks from connect() on.
    Leaving the block in order says farewell. Leaving it with an exception waits a moment: if another rank is the cause, this process ends there.
    """

    def __init__(self, rank: int = 0, *, then: str = RESUME):
        self.rank, self.then = rank, then  # then: what a user does after the job has ended and the cause is gone
        self._progress: Progress | None = None
        self._terms: JobInfo | None = None
        self._hub: MonitorHub | None = None
        self._hubs: list[Link | None] = []  # to rank 0's hub and to the deputy's; None once it has gone
        self._joining: list = []  # what connect() hands over to the thread
        self._due: dict[str, float] = {}  # what this rank does by itself at a time, unless a hub speaks before
        self._failed: int | None = None  # a rank that said it has an error of its own
        self._reported = 0.0
        self._leaving = ""
        self.stop_requested = ""  # why the training shall save and end
        self.before_stop: Callable[[], object] = lambda: None  # called before this process ends because it was told to
        self._grace_s: float | None = None  # while the training heeds that
        self._selector = selectors.DefaultSelector()
        self._bell, self._ear = socket.socketpair()
        self._launchers = launchers_above()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def __enter__(self):
        for end in (self._bell, self._ear):
            end.setblocking(False)
        self._selector.register(self._ear, selectors.EVENT_READ, self._rung)
        for pid, name in self._launchers:
            with contextlib.suppress(OSError, AttributeError):  # gone already, or not Linux
                gone = functools.partial(self._launcher_gone, pid=pid, name=name)
                self._selector.register(os.pidfd_open(pid), selectors.EVENT_READ, gone)
        # the handler does nothing: Python runs it in the main thread, which may hang; the number of the signal rings the bell at once
        self._wakeup = signal.set_wakeup_fd(self._bell.fileno(), warn_on_full_buffer=False)
        self._handlers = {number: signal.signal(number, lambda *_: None) for number in _STOPPING}
        os.register_at_fork(after_in_child=self._forked)
        self._thread.start()
        return self

    def connect(self, mesh: Mesh, *, address: str, stall_s: float, slow_s: float, folder: Path) -> None:
        """Meet the other ranks; all call it. address: rank 0's host as the launcher gave it. folder: where stall.txt goes.

        A rank that cannot be reached is told and not watched.
        """
        self.rank, self._progress, world = mesh.world.rank, mesh.world.progress, mesh.world.size
        if world == 1:
            return
        listener = listen()
        here = address if self.rank == 0 else own_address(address)
        seat = RankAddress(self.rank, socket.gethostname(), os.getpid(), machine(), here, listener.getsockname()[1])
        told = all_gather_objects((tuple(seat), secrets.token_hex(8)), mesh.world, name="meeting of the watch")
        seats = tuple(RankAddress(*fields) for fields, _ in told)
        self._terms = JobInfo(seats, told[0][1], stall_s, max(stall_s, slow_s), folder, self.then)
        deputy = next((other.rank for other in seats if other.machine != seats[0].machine), 1)
        hub = MonitorHub(self._terms, self.rank) if self.rank in (0, deputy) else None
        hubs = [self._reach(seats[rank], warn=rank == 0) for rank in (0, deputy)]
        self._joining.append((hub, listener, hubs))
        self._ring()

    def __exit__(self, kind, error, trace):
        if isinstance(error, RuntimeError) and self._hubs:
            now = self._progress.now
            if now.waits:
                text = (str(error).strip().splitlines() or [kind.__name__])[-1]
                self._joining.append(f'{text} in "{now.text}"')
                self._ring()
            self._thread.join(
                ANSWER_S + HUB_S + VERDICT_S if now.waits else VERDICT_S
            )  # it ends this process when another rank is the cause
        self._leaving = "failed" if error else "done"
        self._ring()
        self._thread.join(HUB_S)
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._handlers.items():
            signal.signal(
                number, signal.SIG_IGN if self.stop_requested else handler
            )  # told again while it ends as told

    @contextlib.contextmanager
    def defer_stop(self, grace_s: float) -> Iterator[None]:
        """While inside, being told to stop sets `asked` instead of ending the job, which still ends grace_s seconds after a SIGTERM."""
        self._grace_s = grace_s
        yield
        self._due.pop("_stop_late", None)

    def _forked(self) -> None:
        """In a forked child: its signals are not this rank's, and a connection that it held would hide this rank's death."""
        if not self._leaving:
            signal.set_wakeup_fd(-1)
            for number in _STOPPING:
                signal.signal(number, signal.SIG_DFL)
        for link in (*filter(None, self._hubs), *(self._hub.links.values() if self._hub else ())):
            link.close()

    # ---- below: the thread

    def _run(self) -> None:
        try:
            while not self._leaving:
                for key, _ in self._selector.select(TICK_S):
                    key.data(key.fileobj)
                self._tick()
            for link in filter(None, self._hubs):
                link.send(bye=self._leaving)
            if self._hub:
                self._hub.leave(self._leaving == "failed")
        except Exception as error:
            say(f"the watch of rank {self.rank} ended with {type(error).__name__}: {error}; the job goes on without it")

    def _tick(self) -> None:
        if self._hub:
            self._hub.tick()
            if self._hub.end:
                self._end(*self._hub.end)
        now = time.monotonic()
        for act, at in list(self._due.items()):
            if now >= at:
                del self._due[act]
                getattr(self, act)()
        state = self._progress.now if self._progress and self._terms and any(self._hubs) else None
        if state and state.waits:
            limit = self._terms.slow_s if self._progress.slow else self._terms.stall_s
            if now - max(state.since, self._reported) >= limit:
                self._reported = now - limit + 1.0  # again in a second
                self._to_hub("_report_to_deputy", stalled=True)

    def _ring(self) -> None:
        with contextlib.suppress(OSError):
            self._bell.send(b"\0")

    def _rung(self, ear) -> None:
        data = ear.recv(4096)
        for what in list(self._joining):
            self._joining.remove(what)
            if isinstance(what, str):
                self._broken(what)
            else:
                self._begin(*what)
        for number in _STOPPING:
            if number in data:
                self._told_to_stop(f"{self._me()} was told to stop ({number.name})", at_last=number == signal.SIGTERM)

    def _begin(self, hub: MonitorHub | None, listener: socket.socket, hubs: list[Link | None]) -> None:
        self._hub, self._hubs = hub, hubs
        if hub:
            self._selector.register(listener, selectors.EVENT_READ, self._guest)
        else:
            listener.close()
        for link in filter(None, hubs):
            self._selector.register(link, selectors.EVENT_READ, self._from_hub)

    def _me(self) -> str:
        return (
            str(self._terms.seats[self.rank])
            if self._terms
            else f"rank {self.rank} (host {socket.gethostname()}, pid {os.getpid()})"
        )

    # ---- this rank as one of many

    def _reach(self, seat: RankAddress, warn: bool) -> Link | None:
        try:
            link = Link(socket.create_connection((seat.address, seat.port), timeout=CONNECT_S))
        except OSError as error:
            if warn:
                say(
                    f"rank {self.rank} cannot reach rank 0 at {seat.address} port {seat.port} ({error}): stalls and deaths will not be told"
                )
            return None
        link.send(token=self._terms.token, rank=self.rank)
        return link

    def _to_hub(self, otherwise: str, **message) -> None:
        """Send to rank 0's hub; when nobody has reacted in time, `otherwise` is done."""
        self._due.setdefault(otherwise, time.monotonic() + (ANSWER_S + HUB_S if self._hubs[0] else 0.0))
        self._unheard = message
        if self._hubs[0]:
            self._hubs[0].send(**message)

    def _report_to_deputy(self) -> None:
        if self._hubs[1]:
            self._hubs[1].send(**self._unheard)

    def _from_hub(self, link: Link) -> None:
        messages = link.receive()
        if messages is None:
            self._hub_gone(link, in_order=False)
            return
        for message in messages:
            self._due.pop("_report_to_deputy", None)
            if "ask" in message:
                link.send(state=self._state())
            elif "end" in message:
                self._end(message["end"], message["silent"])
            elif "failed" in message:
                self._other_failed(message["failed"])
            elif "bye" in message:
                if message["bye"] == "failed":
                    self._other_failed(message["rank"])
                self._hub_gone(link, in_order=True)
                return

    def _end(self, status: int, silent: Sequence[int]) -> None:
        """End this process, and those of this machine that answer nobody, which no SIGTERM would end."""
        for seat in (self._terms.seats[rank] for rank in silent):
            if seat.machine == self._terms.seats[self.rank].machine and seat.rank != self.rank:
                kill(seat.pid)
        self._leave(status)

    def _leave(self, status: int) -> None:
        if status == STOPPED_STATUS:
            self.before_stop()
        end_process(status)

    def _hub_gone(self, link: Link, in_order: bool) -> None:
        with contextlib.suppress(KeyError):
            self._selector.unregister(link)
        was_first = link is self._hubs[0]
        self._hubs = [None if other is link else other for other in self._hubs]
        if was_first and not in_order:
            deputy_acts = self._hubs[1] is not None
            self._due["_tell_hub_lost"] = time.monotonic() + (HUB_S if deputy_acts else 0.0)

    def _tell_hub_lost(self) -> None:
        seats, own = self._terms.seats, self._terms.seats[self.rank]
        if not any(
            alive(other.pid) for other in seats[: self.rank] if other.machine == own.machine
        ):  # one on each machine speaks
            say(f"error: {seats[0]} died or cannot be reached, so {own} stops: look at its host, then {self.then}")
        end_process(LOST_RANK_STATUS)

    def _other_failed(self, rank: int) -> None:
        if self._failed is None and rank != self.rank:
            self._failed = rank
            self._due["_follow"] = time.monotonic() + FAREWELL_S

    def _follow(self) -> None:
        """A rank stopped with an error that it told itself, on its own host's console."""
        seats, own = self._terms.seats, self._terms.seats[self.rank]
        elsewhere = seats[self._failed].machine != own.machine
        if elsewhere and not any(alive(other.pid) for other in seats[: self.rank] if other.machine == own.machine):
            say(f"error: {seats[self._failed]} stopped with an error, which its host's log tells; {own} stops with it")
        end_process(LOST_RANK_STATUS)

    def _broken(self, text: str) -> None:
        if self._failed is not None:
            self._follow()
        if any(self._hubs):
            self._to_hub("_report_to_deputy", broken=text)

    def _state(self) -> dict:
        now, progress = self._progress.now, self._progress
        thread = now.thread if now.waits else threading.main_thread().ident
        told = {
            "text": now.text,
            "axis": now.axis,
            "ranks": now.ranks,
            "number": now.number,
            "waits": now.waits,
            "after": now.after,
        }
        return told | {
            "slow": progress.slow,
            "for_s": time.monotonic() - now.since,
            "counts": dict(progress.counts),
            "line": code_place(thread),
        }

    # ---- this rank told to stop

    def _launcher_gone(self, descriptor: int, pid: int, name: str) -> None:
        self._selector.unregister(descriptor)
        os.close(descriptor)
        self._told_to_stop(f"the launcher {name} (pid {pid}) above {self._me()} has gone", at_last=True)

    def _told_to_stop(self, reason: str, at_last: bool) -> None:
        if self._grace_s is None or self._failed is not None:
            self._stop(reason)
            return
        if not self.stop_requested:
            told = f"{reason}: the job saves after this step and ends"
            first = next(filter(None, self._hubs), None)
            if first:
                first.send(asked=told)
            else:
                say(told)
        self.stop_requested = self.stop_requested or reason
        if at_last:
            self._due.setdefault("_stop_late", time.monotonic() + self._grace_s)

    def _stop_late(self) -> None:
        self._stop(f"{self.stop_requested}, and step and save took longer than checkpoint.stop_s={self._grace_s:g}")

    def _stop(self, reason: str) -> None:
        if self._failed is not None:  # the launcher ends all because one failed, which that one tells
            self._leave(STOPPED_STATUS)
        if not any(self._hubs):
            say(f"error: {reason}, so the job stops: {self.then}")
            self._leave(STOPPED_STATUS)
        if "_stop_alone" not in self._due:
            self._due["_stop_alone"] = time.monotonic() + HUB_S
            next(link for link in self._hubs if link).send(stop=reason)

    def _stop_alone(self) -> None:
        say(f"error: {self._me()} was told to stop, and no other rank answers")
        self._leave(STOPPED_STATUS)

    # ---- this rank as the hub's

    def _guest(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            link = Link(listener.accept()[0])
            self._selector.register(link, selectors.EVENT_READ, self._introduce)

    def _introduce(self, link: Link) -> None:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            messages = link.receive()
            if messages == []:
                return
            first = messages[0]
            if secrets.compare_digest(first["token"], self._terms.token):
                self._hub.join(first["rank"], link)
                self._selector.modify(link, selectors.EVENT_READ, lambda _: self._from_rank(first["rank"], link))
                for message in messages[1:]:
                    self._hub.hear(first["rank"], message)
                return
        self._selector.unregister(link)
        link.close()

    def _from_rank(self, rank: int, link: Link) -> None:
        messages = link.receive()
        if messages is None:
            self._selector.unregister(link)
            self._hub.lose(rank)
            return
        for message in messages:
            self._hub.hear(rank, message)
