"""Failure monitor: one thread per rank that detects dead, stalled or stopped ranks, reports which, and ends the job.

It reads the training thread's Progress and follows these rules:
- A job is stalled when a rank has waited for parallel.stall_s (in a collective, or in a note with waits=True) and no
  rank has recorded anything new in that time. While a rank is inside Progress.long_running(), the limit is 90 % of
  parallel.timeout_s instead, if that is longer.
- A rank is dead when its connection closes without a goodbye. An idle job sends nothing.
- STOP_SIGNALS and the end of a launcher above this process stop the job (the deepspeed runner may end without ending
  its ranks). Outside defer_stop() the job ends at once. Inside, the training thread saves and ends; all of them set a
  time limit, except SIGUSR1. A second SIGINT ends the job at once.

The monitor works while the training thread hangs in C code, as long as that code releases the interpreter lock.
An error in the monitor itself is reported once. It ends the monitor, not the job.
"""

import contextlib
import functools
import math
import os
import queue
import secrets
import selectors
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from megachat.errors import LOST_RANK_STATUS, STOPPED_STATUS
from megachat.job.links import JobKey, Link, introduce, listen, receive_greeting, shared_secret
from megachat.job.monitor_hub import ANSWER_S, RESUME_HINT, JobInfo, MonitorHub, hub_ranks
from megachat.job.monitor_links import (
    RankAddress,
    code_lines,
    end_process,
    handled_signals,
    is_alive,
    kill_process,
    launchers_above,
    local_address,
    machine_id,
    write_stderr,
)
from megachat.parallel.collectives import all_gather_objects
from megachat.parallel.mesh import Mesh
from megachat.parallel.progress import Progress

# Ctrl-C; SIGTERM comes before a kill; Slurm can send SIGUSR1 earlier, as a warning; the end of a terminal.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
SECOND_S = 2.0  # a SIGINT within this time is the same Ctrl-C: the terminal signals the ranks, and so do launchers
TICK_S = 0.25
CONNECT_S = 10.0
HANDSHAKE_S = 30.0  # with a hub that may have to turn away many strangers first
ECHO_S = 0.5  # wait after an error: a rank's death may be the cause and be reported a moment later
HUB_S = 2.0  # time for a hub to report before this rank reports
GOODBYE_S = 6.0  # ranks that fail print their error within 3 s; then the others end


class FailureMonitor:
    """Used as `with FailureMonitor(rank) as monitor: mesh = ...; monitor.connect(mesh, ...); train`.

    Signals and launchers are monitored from the start, the other ranks from connect() on. When the block ends with an
    exception, __exit__ waits a moment: if another rank is the cause, the monitor ends this process meanwhile.
    restart_hint: what the user does once the cause is fixed.
    """

    _progress: Progress  # set by connect(), like _job
    _job: JobInfo

    def __init__(self, rank: int, *, restart_hint: str = RESUME_HINT):
        self.rank, self.restart_hint = rank, restart_hint
        self.stop_requested = ""  # the reason why training must save and end
        self.before_stop: Callable[[], object] = lambda: None  # called before a requested stop ends this process
        self._stop_is_deferred = False
        self._grace_s = 0.0  # from SIGTERM to the end once it is deferred
        self._name = f"rank {rank} (host {socket.gethostname()}, pid {os.getpid()})"
        self._hub: MonitorHub | None = None
        self._hub_links: list[Link | None] = []  # to rank 0's hub and to the backup monitor's; None once closed
        self._interrupted_at = math.inf  # time.monotonic() of the first SIGINT
        self._failed_rank: int | None = None  # a rank that ended with an error
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()  # for the monitor's thread
        # how this process ends if nothing else happens -> when (time.monotonic()); inf: there is no such reason now
        self._deadlines: dict[Callable[[], None], float] = dict.fromkeys(
            (self._end_without_hub, self._end_with_failed_rank, self._end_late_stop, self._end_unanswered_stop),
            math.inf,
        )
        self._last_report = 0.0
        self._leaving = ""  # "done" or "failed" once the block is left
        self._selector = selectors.DefaultSelector()
        self._wakeup_in, self._wakeup_out = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name="failure monitor", daemon=True)

    def __enter__(self):
        for end in (self._wakeup_in, self._wakeup_out):
            end.setblocking(False)
        self._selector.register(self._wakeup_out, selectors.EVENT_READ, self._on_wakeup)
        for pid, name in launchers_above():
            with contextlib.suppress(OSError, AttributeError):  # the launcher has ended already, or this is not Linux
                on_end = functools.partial(self._on_launcher_end, pid=pid, name=name)
                self._selector.register(os.pidfd_open(pid), selectors.EVENT_READ, on_end)
        # Python runs handlers in the main thread, which may hang. The wakeup fd gets the signal's number at once.
        self._previous_fd = signal.set_wakeup_fd(self._wakeup_in.fileno(), warn_on_full_buffer=False)
        self._handlers = {number: signal.signal(number, lambda *_: None) for number in handled_signals(STOP_SIGNALS)}
        os.register_at_fork(after_in_child=self._after_fork)
        self._thread.start()
        return self

    def connect(self, mesh: Mesh, *, address: str, stall_s: float, slow_s: float, folder: Path) -> None:
        """Connects this rank to the hubs; all ranks call it. A rank that cannot be reached is reported, not monitored.

        address: rank 0's host as the launcher named it. folder: where stall.txt is written.
        """
        self._progress = mesh.world.progress
        if mesh.world.size == 1:
            return
        world, name = mesh.world, "connecting the failure monitor"
        here = RankAddress(self.rank, socket.gethostname(), os.getpid(), machine_id())
        every = all_gather_objects((tuple(here), secrets.token_bytes(16)), world, name=name)
        addresses = tuple(RankAddress(*fields) for fields, _ in every)
        key = JobKey(shared_secret() + every[0][1], "failure monitor")
        self._job = JobInfo(addresses, key, stall_s, max(stall_s, slow_s), folder, self.restart_hint)
        hubs, hub_address = hub_ranks(addresses), None
        if self.rank in hubs:
            loopback = "127.0.0.1" if len({other.machine for other in addresses}) == 1 else ""
            listener = listen(0, loopback)
            host = loopback or (address if self.rank == 0 else local_address(address) or here.host)
            hub_address = host, listener.getsockname()[1]
            self._call(functools.partial(self._begin_hub, listener))
        hub_addresses = all_gather_objects(hub_address, world, name=name)
        links = [self._connect_to(rank, hub_addresses[rank]) for rank in hubs]
        self._call(functools.partial(self._begin, links))

    def __exit__(self, kind, error, trace):
        if isinstance(error, RuntimeError) and self._hub_links:
            now = self._progress.now
            if now.waits:
                text = (str(error).strip().splitlines() or [kind.__name__])[-1]
                self._call(functools.partial(self._report_broken, f'{text} in "{now.text}"'))
            # the thread ends this process if another rank is the cause
            self._thread.join(ANSWER_S + HUB_S + ECHO_S if now.waits else ECHO_S)
        self._leaving = "failed" if error else "done"
        self._wake()
        self._thread.join(HUB_S)
        signal.set_wakeup_fd(self._previous_fd)
        for number, handler in self._handlers.items():
            signal.signal(number, signal.SIG_IGN if self.stop_requested else handler)  # a second signal changes nothing
        if not self._thread.is_alive():
            self._close()

    @contextlib.contextmanager
    def defer_stop(self, grace_s: float) -> Iterator[None]:
        """From here on a stop request only sets `stop_requested`. Inside the block, all but SIGUSR1 still end the job
        after grace_s.

        After the block everything is saved and the job ends by itself, so a stop request is not obeyed at once again.
        """
        self._stop_is_deferred, self._grace_s = True, grace_s
        yield
        self._deadlines[self._end_late_stop] = math.inf

    def _after_fork(self) -> None:
        """Detaches a forked child. Its signals are not this rank's, and its copy of a connection would hide a death."""
        if not self._leaving:
            signal.set_wakeup_fd(-1)
            for number in self._handlers:
                signal.signal(number, signal.SIG_DFL)
        for link in (*filter(None, self._hub_links), *(self._hub.links.values() if self._hub else ())):
            link.close()

    def _close(self) -> None:
        """Gives the descriptors back: the wakeup pipe, connections and launchers."""
        for key in list(self._selector.get_map().values()):
            if isinstance(key.fileobj, Link | socket.socket):
                key.fileobj.close()
            else:
                os.close(key.fd)
        self._selector.close()
        self._wakeup_in.close()

    def _call(self, function: Callable[[], None]) -> None:
        """Runs the function in the monitor's thread as soon as possible."""
        self._calls.put(function)
        self._wake()

    def _wake(self) -> None:
        with contextlib.suppress(OSError):
            self._wakeup_in.send(b"\0")

    # ---- everything below runs in the monitor's thread

    def _run(self) -> None:
        try:
            while not self._leaving:
                for key, _ in self._selector.select(TICK_S):
                    key.data(key.fileobj)
                self._tick(time.monotonic())
            self._send_hubs(bye=self._leaving)
            if self._hub:
                self._hub.leave(self._leaving)
        except Exception as error:
            write_stderr(
                f"the failure monitor of rank {self.rank} ended with {type(error).__name__}: {error}; "
                "the job continues without it"
            )

    def _tick(self, now: float) -> None:
        if self._hub:
            self._hub.tick(now)
            if self._hub.end:
                self._end_with_job(*self._hub.end)
        while not self._calls.empty():
            self._calls.get()()
        for end, deadline in self._deadlines.items():
            if now >= deadline:
                self._deadlines[end] = math.inf
                end()
        if any(self._hub_links) and (entry := self._progress.now).waits:
            limit = self._job.slow_s if self._progress.slow else self._job.stall_s
            if now - max(entry.since, self._last_report) >= limit:
                self._last_report = now - limit + 1.0  # report again in a second
                self._send_hubs(stalled=True)

    def _on_wakeup(self, pipe: socket.socket) -> None:
        numbers = pipe.recv(4096)
        for number in STOP_SIGNALS:
            if number not in numbers:
                continue
            now, reason = time.monotonic(), f"{self._name} was requested to stop ({number.name})"
            if number == signal.SIGINT and now - self._interrupted_at > SECOND_S:
                self._stop(f"{reason} again")
                continue
            if number == signal.SIGINT:
                self._interrupted_at = min(self._interrupted_at, now)
            self._request_stop(reason, limited=number != signal.SIGUSR1)

    # ---- this rank and the hubs

    def _connect_to(self, hub_rank: int, address: tuple[str, int]) -> Link | None:
        """Returns a connection to a rank's hub; None, which is reported for rank 0's, if that cannot be reached."""
        deadline = time.monotonic() + HANDSHAKE_S
        try:
            link = Link(socket.create_connection(address, timeout=CONNECT_S))
            greeting = receive_greeting(link, deadline)
            if greeting and introduce(link, greeting, self._job.key, self.rank, deadline):
                return link
            link.close()
            raise ConnectionError("another program is there, or a rank with another secret")
        except OSError as error:
            if hub_rank == 0:
                write_stderr(
                    f"rank {self.rank} cannot reach rank 0 at {address[0]} port {address[1]} ({error}): "
                    "stalls and deaths will not be reported"
                )
            return None

    def _begin_hub(self, listener: socket.socket) -> None:
        self._hub = MonitorHub(self._job, self.rank, listener, self._selector)

    def _begin(self, links: list[Link | None]) -> None:
        self._hub_links = links
        for link in filter(None, links):
            self._selector.register(link, selectors.EVENT_READ, self._on_hub_message)

    def _send_hubs(self, **message) -> None:
        for link in filter(None, self._hub_links):
            link.send(**message)

    def _on_hub_message(self, link: Link) -> None:
        messages = link.receive()
        if messages is None:
            self._drop_hub(link, said_goodbye=False)
            return
        for message in messages:
            if self._hub and link is self._hub_links[0]:
                self._hub.stand_down()
            if "report_state" in message:
                link.send(state=self._state())
            elif "end" in message:
                self._end_with_job(message["end"], message["silent"])
            elif "failed" in message:
                self._on_failed_rank(message["failed"])
            elif "bye" in message:
                if message["bye"] == "failed":
                    self._on_failed_rank(message["rank"])
                self._drop_hub(link, said_goodbye=True)
                return

    def _state(self) -> dict:
        """Returns what this rank is doing, for the hub."""
        entry, progress = self._progress.now, self._progress
        thread = entry.thread if entry.waits else threading.main_thread().ident
        return entry._asdict() | {
            "slow": progress.slow,
            "for_s": time.monotonic() - entry.since,
            "counts": dict(progress.counts),
            "lines": code_lines(thread),
        }

    def _report_broken(self, text: str) -> None:
        """Reports a collective that raised an error, which another rank may have caused."""
        if self._failed_rank is not None:
            self._end_with_failed_rank()
        self._send_hubs(broken=text)

    def _drop_hub(self, link: Link, said_goodbye: bool) -> None:
        with contextlib.suppress(KeyError):
            self._selector.unregister(link)
        link.close()
        primary, backup = self._hub_links
        self._hub_links = [None if other is link else other for other in self._hub_links]
        if link is primary and not said_goodbye:
            self._deadlines[self._end_without_hub] = time.monotonic() + (HUB_S if backup else 0.0)

    def _on_failed_rank(self, rank: int) -> None:
        if self._failed_rank is None and rank != self.rank:
            self._failed_rank = rank
            self._deadlines[self._end_with_failed_rank] = time.monotonic() + GOODBYE_S

    # ---- the end of this process, for each reason

    def _end(self, status: int, message: str = "") -> None:
        """Ends this process now. All other ways to end it lead here."""
        if message:
            write_stderr(message)
        if status == STOPPED_STATUS:
            self.before_stop()
        end_process(status)

    def _end_with_job(self, status: int, silent: Sequence[int]) -> None:
        """Ends because a hub ended the job. Kills the silent ranks of this machine, which a SIGTERM would not end."""
        for address in (self._job.addresses[rank] for rank in silent):
            if address.machine == self._job.addresses[self.rank].machine and address.rank != self.rank:
                kill_process(address.pid)
        self._end(status)

    def _end_without_hub(self) -> None:
        """Ends because rank 0 is gone and no hub has reported why."""
        text = (
            f"error: {self._job.addresses[0]} died or cannot be reached, so {self._name} stops: "
            f"look at its host, then {self.restart_hint}"
        )
        self._end(LOST_RANK_STATUS, text if self._is_first_of_machine() else "")

    def _end_with_failed_rank(self) -> None:
        """Ends because another rank failed. That rank printed its error on its host's console."""
        assert self._failed_rank is not None
        failed = self._job.addresses[self._failed_rank]
        on_other_machine = failed.machine != self._job.addresses[self.rank].machine
        text = f"error: {failed} stopped with an error, see its host's log; {self._name} stops too"
        self._end(LOST_RANK_STATUS, text if on_other_machine and self._is_first_of_machine() else "")

    def _is_first_of_machine(self) -> bool:
        """Returns whether no lower rank of this machine is alive, so that one rank per machine prints the error."""
        here = self._job.addresses[self.rank]
        lower = self._job.addresses[: self.rank]
        return not any(is_alive(other.pid) for other in lower if other.machine == here.machine)

    # ---- this rank is requested to stop

    def _on_launcher_end(self, descriptor: int, pid: int, name: str) -> None:
        self._selector.unregister(descriptor)
        os.close(descriptor)
        self._request_stop(f"the launcher {name} (pid {pid}) of {self._name} has ended", limited=True)

    def _request_stop(self, reason: str, limited: bool) -> None:
        """Stops, or has the training thread stop. limited: it has grace_s for that."""
        if not self._stop_is_deferred or self._failed_rank is not None:
            self._stop(reason)
            return
        if not self.stop_requested:
            self.stop_requested = reason
            notice = f"{reason}: the job saves after this step or the next, and ends"
            notice += "; a second Ctrl-C ends it at once" * (self._interrupted_at < math.inf)
            if link := next(filter(None, self._hub_links), None):
                link.send(stop_notice=notice)
            else:
                write_stderr(notice)
        if limited and self._deadlines[self._end_late_stop] == math.inf:
            self._deadlines[self._end_late_stop] = time.monotonic() + self._grace_s

    def _stop(self, reason: str) -> None:
        """Ends this process through a hub, which ends the others as well, or alone where there is none."""
        if self._failed_rank is not None:
            self._end(STOPPED_STATUS)  # the launcher ends all ranks because of that one, which reports its error
        link = next(filter(None, self._hub_links), None)
        if link is None:
            self._end(STOPPED_STATUS, f"error: {reason}, so the job stops: {self.restart_hint}")
        elif self._deadlines[self._end_unanswered_stop] == math.inf:
            self._deadlines[self._end_unanswered_stop] = time.monotonic() + HUB_S
            link.send(stop=reason)

    def _end_late_stop(self) -> None:
        """Stops at once, because the training thread has not saved and ended in time."""
        self._stop(f"{self.stop_requested}, and step and save took longer than checkpoint.stop_s={self._grace_s:g}")

    def _end_unanswered_stop(self) -> None:
        """Ends because no hub has answered this rank's request to stop."""
        self._end(STOPPED_STATUS, f"error: {self._name} was requested to stop, and no other rank answers")
