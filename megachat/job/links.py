"""Connections between ranks, and who is let in: JSON objects, one per line, after a handshake in both directions.

Anyone on the network can connect to a listening port. Such a connection is a stranger until its first message proves,
by an HMAC over fresh random numbers of both sides, that it knows the job's secret. Strangers are limited in number,
time and bytes. Without a secret the key is empty: the handshake then only distinguishes ranks from other programs.
"""

import contextlib
import errno
import hmac
import json
import os
import resource
import secrets
import selectors
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from megachat.errors import UserError

SEND_S = 2.0
LINE_BYTES = 1 << 18  # the longest message, a rank's facts, has about 20 KB
STRANGER_S = 10.0  # for a connection to prove that it is a rank
_LEAST_S = 1.0  # which it gets even if others queue
_MOST_STRANGERS = 256  # at once; a quarter of the usual limit of open files
_GREETING = "megachat"
_LEAST_SECRET = 16  # characters; from one handshake that was overheard, a shorter one can be guessed
_MOST_SECRET = 4096


class Link:
    """One connection between ranks: JSON objects, one per line, in both directions."""

    def __init__(self, connection: socket.socket):
        self.socket, self._rest = connection, bytearray()
        connection.settimeout(SEND_S)
        # a host that is gone closes nothing; with these the kernel notices within 20 s
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in (("TCP_KEEPIDLE", 5), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
            if hasattr(socket, option):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def fileno(self) -> int:
        return self.socket.fileno()

    def send(self, **message) -> None:
        """Sends a message. Errors are ignored: receive() and the time limits detect a lost peer."""
        with contextlib.suppress(OSError):
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, *, only_next: bool = False) -> list[dict] | None:
        """Returns the messages that have arrived, or only the next. None when the other end has closed, has died or
        sends anything else than JSON objects in lines of at most LINE_BYTES.
        """
        try:
            most = 1 << 16
            if only_next:  # what follows it is left to the selector
                ahead = self.socket.recv(most, socket.MSG_PEEK)
                most = ahead.find(b"\n") + 1 or len(ahead) or 1
            data = self.socket.recv(most)
        except TimeoutError:
            return []
        except OSError:
            return None
        if not data:
            return None
        searched = len(self._rest)  # each byte is searched once, however small the pieces are
        self._rest += data
        end = self._rest.rfind(b"\n", searched)
        if end < 0:
            return [] if len(self._rest) <= LINE_BYTES else None
        lines = bytes(self._rest[:end]).split(b"\n")
        del self._rest[: end + 1]
        try:
            messages = [json.loads(line) for line in lines]
        except (ValueError, RecursionError):
            return None
        return messages if all(isinstance(message, dict) for message in messages) else None

    def next_message(self, deadline: float) -> dict | None:
        """Returns the next message; None when the other end closed, or at the deadline (of time.monotonic())."""
        while time.monotonic() < deadline:
            messages = self.receive(only_next=True)
            if messages is None:
                return None
            if messages:
                return messages[0]
        return None

    def close(self) -> None:
        self.socket.close()


def listen(port: int, host: str = "") -> socket.socket:
    """Listens on the address `host`, or on every interface. port: 0 for a free one."""
    if host:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=4096)
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=4096)
    return socket.create_server(("", port), backlog=4096)


# ---- the handshake


class JobKey(NamedTuple):
    """What the two ends of a connection must have in common. secret: may be empty. job: a public name of the job."""

    secret: bytes
    job: str

    def proof(self, side: str, rank: int, challenge: str, counter_challenge: str) -> str:
        """Returns what only someone with the key can answer to the challenge. side: "rank" or "hub"."""
        text = json.dumps([side, self.job, rank, challenge, counter_challenge])
        return hmac.new(self.secret, text.encode(), "sha256").hexdigest()


def shared_secret() -> bytes:
    """Returns the job's secret from MEGACHAT_SECRET or the file MEGACHAT_SECRET_FILE, empty if neither is set.

    Raises UserError if the file cannot be read, the secret is shorter than 16 characters, or both are set.
    """
    path, secret = os.environ.get("MEGACHAT_SECRET_FILE"), os.fsencode(os.environ.get("MEGACHAT_SECRET", ""))
    if path and secret:
        raise UserError("MEGACHAT_SECRET and MEGACHAT_SECRET_FILE are both set: unset one")
    if not path and not secret:
        return b""
    name = "MEGACHAT_SECRET"
    if path:
        name = f"the secret in {path} (MEGACHAT_SECRET_FILE)"
        try:
            with Path(path).open("rb") as file:
                secret = file.read(_MOST_SECRET + 1)
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or error
            raise UserError(f"MEGACHAT_SECRET_FILE={path} cannot be read ({why}): name a readable file") from None
    secret = secret.strip()
    if not _LEAST_SECRET <= len(secret) <= _MOST_SECRET:
        raise UserError(
            f"{name} has {len(secret)} characters, not {_LEAST_SECRET} to {_MOST_SECRET}: "
            "make one with `openssl rand -hex 32`"
        )
    return secret


def secret_for_ranks() -> dict[str, str]:
    """Returns the environment variable of a new secret for the ranks that this process starts on this host; nothing if
    the user gave them one. This process keeps its own environment: it may be a notebook's.
    """
    if os.environ.get("MEGACHAT_SECRET") or os.environ.get("MEGACHAT_SECRET_FILE"):
        return {}
    return {"MEGACHAT_SECRET": secrets.token_hex(32)}


class Greeting(NamedTuple):
    """The first message on a connection, from the listening side. has_secret: whether it requires one."""

    challenge: str
    has_secret: bool


def receive_greeting(link: Link, deadline: float) -> Greeting | None:
    """Returns the listening side's greeting; None if another program listens there, or none came in time."""
    message = link.next_message(deadline) or {}
    challenge = message.get("challenge")
    if message.get("greeting") != _GREETING or not isinstance(challenge, str):
        return None
    return Greeting(challenge, message.get("has_secret") is True)


def introduce(link: Link, greeting: Greeting, key: JobKey, rank: int, deadline: float, **facts) -> bool:
    """Introduces this rank; returns whether both sides have the same key.

    facts: what else the listening side wants to know. Raises ConnectionError if the other side ends or is silent.
    """
    challenge = secrets.token_hex(16)
    link.send(rank=rank, challenge=challenge, proof=key.proof("rank", rank, greeting.challenge, challenge), **facts)
    answer = link.next_message(deadline)
    if answer is None:
        raise ConnectionError("it closed the connection or fell silent")
    return _equal(answer.get("proof"), key.proof("hub", rank, challenge, greeting.challenge))


def _equal(text: object, proof: str) -> bool:
    return isinstance(text, str) and hmac.compare_digest(text.encode(errors="replace"), proof.encode())


class Entrance:
    """The listening side of the handshake, for a thread that runs a selector whose data are functions of the file.

    let_in: is called with (link, rank, the introduction) of each connection that has proved itself, and returns
    whether it takes the link. refused: is called with (address, rank) of one whose key differs.
    """

    def __init__(
        self,
        listener: socket.socket,
        selector: selectors.BaseSelector,
        key: JobKey,
        let_in: Callable[[Link, int, dict], bool],
        refused: Callable[[str, int], object] = lambda address, rank: None,
    ):
        self._listener, self._selector, self._key = listener, selector, key
        self._let_in, self._refused = let_in, refused
        self._strangers: dict[Link, tuple[float, str]] = {}  # -> when it came and its challenge, the oldest first
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._most = _MOST_STRANGERS if files == resource.RLIM_INFINITY else min(_MOST_STRANGERS, files // 4)
        self._accepts = self._open = True
        listener.setblocking(False)
        selector.register(listener, selectors.EVENT_READ, self._accept)

    def tick(self, now: float) -> None:
        """Drops the strangers whose time is over. To be called several times per second."""
        for link, (since, _) in list(self._strangers.items()):
            if now - since < STRANGER_S:
                break
            self._drop(link)
        if self._open and not self._accepts and self._has_room(now):
            self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
            self._accepts = True

    def close(self) -> None:
        """Stops listening and drops all strangers."""
        if not self._open:
            return
        self._pause()
        self._open = False
        self._listener.close()
        for link in list(self._strangers):
            self._drop(link)

    def _has_room(self, now: float) -> bool:
        """Returns whether one more can be let in, if need be in place of one that has had its least time."""
        return len(self._strangers) < self._most or now - next(iter(self._strangers.values()))[0] >= _LEAST_S

    def _pause(self) -> None:
        """Leaves further connections in the kernel's queue until tick() finds room."""
        if self._accepts:
            self._selector.unregister(self._listener)
        self._accepts = False

    def _accept(self, listener: socket.socket) -> None:
        now = time.monotonic()
        if not self._has_room(now):
            self._pause()
            return
        if len(self._strangers) >= self._most:
            self._drop(next(iter(self._strangers)))
        try:
            link = Link(listener.accept()[0])
        except OSError as error:  # usually a connection that is gone already
            if error.errno in (errno.EMFILE, errno.ENFILE):
                self._pause()
            return
        challenge = secrets.token_hex(16)
        self._strangers[link] = now, challenge
        self._selector.register(link, selectors.EVENT_READ, self._identify)
        link.send(greeting=_GREETING, challenge=challenge, has_secret=bool(self._key.secret))

    def _identify(self, link: Link) -> None:
        if link not in self._strangers:  # dropped in this round of the selector
            return
        messages = link.receive()
        if messages == []:
            return
        if messages:
            message, challenge = messages[0], self._strangers[link][1]
            rank, counter = message.get("rank"), message.get("challenge")
            if type(rank) is int and 0 <= rank < 2**31 and isinstance(counter, str) and "proof" in message:
                if not _equal(message["proof"], self._key.proof("rank", rank, challenge, counter)):
                    self._refused(_peer(link), rank)
                    link.send(refused=True)
                elif self._let_in(link, rank, message):
                    del self._strangers[link]
                    link.send(proof=self._key.proof("hub", rank, counter, challenge))
                    return
        self._drop(link)

    def _drop(self, link: Link) -> None:
        self._selector.unregister(link)
        link.close()
        del self._strangers[link]


def _peer(link: Link) -> str:
    with contextlib.suppress(OSError):
        return link.socket.getpeername()[0]
    return "a connection that has ended"
