"""Connections between ranks and strangers at a listening port: limits, the handshake, the secret."""

import contextlib
import json
import os
import secrets
import selectors
import socket
import subprocess
import threading
import time
from pathlib import Path

import pytest

from megachat.errors import UserError
from megachat.job import elastic, links
from megachat.job.links import (
    LINE_BYTES,
    Entrance,
    JobKey,
    Link,
    introduce,
    listen,
    receive_greeting,
    secret_for_ranks,
    shared_secret,
)
from tests.limits import limit_s

ROOT = Path(__file__).resolve().parents[3]
KEY = JobKey(b"a secret that the ranks share", "job 1")
DEEP = b"[" * 200_000 + b"\n"


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


class Host:
    """The listening side in a thread: an Entrance that lets in each rank once."""

    def __init__(self, key: JobKey = KEY):
        self.selector, self.ranks, self.refused = selectors.DefaultSelector(), {}, []
        self.listener = listen(0, "127.0.0.1")
        self.port = self.listener.getsockname()[1]
        self.entrance = Entrance(self.listener, self.selector, key, self._let_in, lambda *who: self.refused.append(who))
        self.most_strangers, self._ends = 0, False
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _let_in(self, link: Link, rank: int, message: dict) -> bool:
        if rank in self.ranks:
            return False
        self.ranks[rank] = link, message
        self.selector.modify(link, selectors.EVENT_READ, lambda link: None)
        return True

    def _run(self) -> None:
        while not self._ends:
            for key, _ in self.selector.select(0.02):
                key.data(key.fileobj)
            self.entrance.tick(time.monotonic())
            self.most_strangers = max(self.most_strangers, len(self.entrance._strangers))
        self.entrance.close()
        for link, _ in self.ranks.values():
            link.close()
        self.selector.close()

    def __enter__(self) -> "Host":
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._ends = True
        self._thread.join(limit_s())

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=limit_s())

    def enter(self, rank: int, key: JobKey = KEY, **facts) -> bool:
        link, deadline = Link(self.connect()), time.monotonic() + limit_s()
        greeting = receive_greeting(link, deadline)
        assert greeting is not None
        return introduce(link, greeting, key, rank, deadline, **facts)


def is_dropped(connection: socket.socket) -> bool:
    """Waits for the other side to close the connection."""
    with contextlib.suppress(ConnectionError):
        while connection.recv(1 << 16):
            pass
    return True


def pair() -> tuple[socket.socket, Link]:
    one = socket.create_server(("127.0.0.1", 0))
    sender = socket.create_connection(one.getsockname())
    return sender, Link(one.accept()[0])


def test_ranks_with_the_key_are_let_in_and_others_are_refused():
    with Host() as host:
        assert host.enter(1, host="b") and host.ranks[1][1]["host"] == "b"
        assert not host.enter(2, JobKey(b"another secret of some length", KEY.job))
        assert not host.enter(3, JobKey(b"", KEY.job))
        assert not host.enter(4, KEY._replace(job="job 2")), "a proof counts in one job only"
        with pytest.raises(ConnectionError):
            host.enter(1)
        assert list(host.ranks) == [1] and host.refused == [("127.0.0.1", rank) for rank in (2, 3, 4)]


def test_a_proof_counts_for_one_rank_and_one_challenge():
    greeting, challenge = links.Greeting("server's", True), "client's"
    proofs = {
        KEY.proof(side, rank, one, other)
        for side in ("rank", "hub")
        for rank in (1, 2)
        for one, other in ((greeting.challenge, challenge), (challenge, greeting.challenge), ("x", challenge))
    }
    assert len(proofs) == 12
    with Host() as host:
        heard = Link(host.connect())
        first = receive_greeting(heard, time.monotonic() + limit_s())
        message = {"rank": 1, "challenge": challenge, "proof": KEY.proof("rank", 1, first.challenge, challenge)}
        replayed = Link(host.connect())
        replayed.send(**message)
        assert is_dropped(replayed.socket) and not host.ranks
        heard.send(**message | {"rank": 2})
        assert is_dropped(heard.socket) and not host.ranks


@pytest.mark.parametrize("rank", [1.5, 1.0, True, -1, 2**31, "1", None, [1]])
def test_a_rank_is_a_number_even_of_one_who_knows_the_secret(rank):
    with Host() as host:
        with contextlib.closing(Link(host.connect())) as link:
            challenge = receive_greeting(link, time.monotonic() + limit_s()).challenge
            link.send(rank=rank, challenge="c", proof=KEY.proof("rank", rank, challenge, "c"))
            assert is_dropped(link.socket)
        assert not host.ranks and not host.refused


def test_a_listener_without_the_secret_is_not_believed():
    """It can only refuse or answer with a proof of its own making."""
    for answer in ({"refused": True}, {"proof": "0" * 64}, {"proof": None}, {"proof": "\udcff"}, {}):
        client, link = pair()
        with client:
            client.sendall(json.dumps(answer).encode() + b"\n")
            assert not introduce(link, links.Greeting("x", True), KEY, 1, time.monotonic() + limit_s())


@pytest.mark.parametrize(
    "words",
    [
        DEEP,
        b"x" * (LINE_BYTES + 1),
        b"[1]\n",
        b"null\n",
        b"\xff\xfe\n",
        b"GET / HTTP/1.0\r\n\r\n",
        b'{"rank": ' + b"9" * 5000 + b"}\n",
        *(
            json.dumps({"rank": rank, "challenge": "c", "proof": "p"}).encode() + b"\n"
            for rank in (1.5, True, -1, 2**31, "1", None, [1])
        ),
        b'{"rank": 1, "challenge": 5, "proof": "p"}\n',
        b'{"rank": 1, "challenge": "c"}\n',
        b'{"rank": 1, "challenge": "\\ud800", "proof": "\\ud800"}\n',
    ],
    ids=lambda words: repr(words[:40]),
)
def test_garbage_is_dropped_at_once_and_a_rank_still_gets_in(words):
    before = open_files()
    with Host() as host:
        with host.connect() as stranger:
            stranger.sendall(words)
            assert is_dropped(stranger)
        assert host.enter(1) and not host.entrance._strangers
    assert open_files() <= before


def test_a_message_in_pieces_and_one_that_never_ends():
    """However small the pieces are, no byte is searched twice."""
    sender, link = pair()
    searched = []

    class Counting(bytearray):
        def rfind(self, what, start):
            searched.append(len(self) - start)
            return super().rfind(what, start)

    link._rest = Counting()
    with sender:
        text = json.dumps({"text": "x" * 5000}).encode() + b'\n{"next": 1}\n{"la'
        for byte in text:
            sender.sendall(bytes([byte]))
        messages = []
        while len(messages) < 2:
            messages += link.receive(only_next=True)
        assert [list(message) for message in messages] == [["text"], ["next"]] and sum(searched) <= len(text)
        threading.Thread(target=sender.sendall, args=(b"x" * LINE_BYTES,), daemon=True).start()
        searched.clear()
        while (received := link.receive()) == []:
            assert len(link._rest) <= LINE_BYTES
        assert received is None and sum(searched) <= LINE_BYTES + (1 << 16)


def test_silent_and_slow_strangers_are_dropped_after_their_time(monkeypatch):
    monkeypatch.setattr(links, "STRANGER_S", 0.5)
    with Host() as host:
        silent, slow = host.connect(), host.connect()
        ended = time.monotonic() + limit_s()
        with contextlib.suppress(ConnectionError):
            while time.monotonic() < ended:
                slow.sendall(b" ")
                time.sleep(0.05)
        assert is_dropped(silent) and is_dropped(slow)
        monkeypatch.setattr(links, "STRANGER_S", limit_s())  # for a rank that a busy machine slows down
        assert host.enter(1)
        silent.close()
        slow.close()


def test_a_crowd_of_strangers_takes_few_descriptors_and_keeps_no_rank_out(monkeypatch):
    """2,000 connections, some silent, some garbage, some that end at once: more than this side may have open."""
    monkeypatch.setattr(links, "_LEAST_S", 0.2)
    monkeypatch.setattr(links, "_MOST_STRANGERS", 200)
    with Host() as host, contextlib.ExitStack() as crowd:
        for number in range(2000):
            stranger = host.connect()
            if number % 4 == 1:
                stranger.sendall(secrets.token_bytes(100) + b"\n")
            elif number % 4 == 2:
                stranger.sendall(b"x" * 1000)
            if number % 4 == 3:
                stranger.close()
            else:
                crowd.callback(stranger.close)
            if number % 500 == 499:
                assert host.enter(number)
        assert 100 < host.most_strangers <= 200
        host.entrance.close()
    assert len(host.ranks) == 4


def test_without_descriptors_the_listener_waits_and_goes_on(monkeypatch):
    with Host() as host:
        accept, times = socket.socket.accept, []

        def full(self):
            times.append(self)
            if len(times) < 4:
                raise OSError(24, "Too many open files")
            return accept(self)

        monkeypatch.setattr(socket.socket, "accept", full)
        assert host.enter(1)
        assert len(times) == 4, "it tried again after a while, not all the time"


def test_the_secret_comes_from_the_environment_or_a_file(monkeypatch, tmp_path):
    for name in ("MEGACHAT_SECRET", "MEGACHAT_SECRET_FILE"):
        monkeypatch.delenv(name, raising=False)
    assert shared_secret() == b""
    monkeypatch.setenv("MEGACHAT_SECRET", "")
    made = secret_for_ranks()["MEGACHAT_SECRET"]
    assert len(made) == 64 and made != secret_for_ranks()["MEGACHAT_SECRET"]
    assert shared_secret() == b"", "the environment of this process stays as it is"
    monkeypatch.setenv("MEGACHAT_SECRET", "0123456789abcdef")
    assert secret_for_ranks() == {}
    assert shared_secret() == b"0123456789abcdef"
    path = tmp_path / "secret"
    monkeypatch.setenv("MEGACHAT_SECRET_FILE", str(path))
    with pytest.raises(UserError, match="are both set"):
        shared_secret()
    monkeypatch.setenv("MEGACHAT_SECRET", "")
    assert secret_for_ranks() == {}
    with pytest.raises(UserError, match=rf"MEGACHAT_SECRET_FILE={path} cannot be read \(No such file"):
        shared_secret()
    path.write_bytes(b"0123456789abcdef\n")
    assert shared_secret() == b"0123456789abcdef"
    for content in (b"\n", b"short\n", b"x" * 10_000):
        path.write_bytes(content)
        with pytest.raises(UserError, match="has .* characters, not 16 to 4096: make one with"):
            shared_secret()


@pytest.mark.parametrize("hosts, given", [("1", False), ("2", False), ("1", True)])
def test_a_supervisor_of_one_host_gives_its_ranks_a_secret(hosts, given, monkeypatch):
    seen = []
    monkeypatch.setattr(elastic.run, "main", lambda line: seen.append(os.environ.get("MEGACHAT_SECRET", "")))
    monkeypatch.setattr(elastic.api, "LocalElasticAgent", elastic.api.LocalElasticAgent)
    monkeypatch.setenv("MEGACHAT_SECRET", "the user's secret" if given else "")
    monkeypatch.delenv("MEGACHAT_SECRET_FILE", raising=False)
    elastic.supervise(["program"], hosts=hosts, ranks=2, meet=None, restarts=0)
    assert len(seen[0]) == (17 if given else 64 if hosts == "1" else 0)


@pytest.mark.parametrize("given", ["", "the user's secret"])
@pytest.mark.parametrize("script", ["run.sh config", "mpirun.sh hostfile config", "slurm.sbatch config"])
def test_scripts_that_start_all_ranks_give_them_a_secret(script, given, tmp_path):
    """Programs of the same names stand in for the launchers."""
    shown = 'printf "%s|%s" "$MEGACHAT_SECRET" "$*"'
    for name in ("mpirun", "srun"):
        (tmp_path / name).write_text(f"#!/bin/sh\n{shown}\n")
    (tmp_path / "python").write_text(f'#!/bin/sh\n[ "$2" != megachat.job.launcher_process ] || {shown}\n')
    for name in ("deepspeed", "scontrol"):  # the first one is searched only
        (tmp_path / name).write_text("#!/bin/sh\n")
    for path in tmp_path.iterdir():
        path.chmod(0o755)
    variables = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "MEGACHAT_SECRET": given}
    variables |= {"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_ID": "7", "MASTER_PORT": "29500"}
    name, *arguments = script.split()
    line = ["bash", ROOT / "launch" / name, *arguments]
    done = subprocess.run(line, env=variables, cwd=ROOT, capture_output=True, text=True, check=True)
    secret, _, command = done.stdout.partition("|")
    assert secret == given or (not given and len(secret) == 64)
    assert secret not in command and ("mpirun" not in script or "-x MEGACHAT_SECRET " in command)


def test_the_hosts_of_a_hostfile_get_the_secrets_file_and_never_the_secret(tmp_path):
    shown = """cat "$DS_ENV_FILE"; printf "%s\\n" "$*" | sed 's/.*config //'"""
    launcher = f'#!/bin/sh\n[ "$2" != megachat.job.launcher_process ] || {{ {shown}; }}\n'
    (tmp_path / "python").write_text(launcher)
    (tmp_path / "deepspeed").write_text("")  # searched only
    for name in ("python", "deepspeed"):
        (tmp_path / name).chmod(0o755)
    (tmp_path / ".deepspeed_env").write_text("OTHER=1")
    variables = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(tmp_path), "TMPDIR": str(tmp_path)}
    line = [
        "bash",
        ROOT / "launch/hostfile.sh",
        "hosts",
        "config",
        "--set",
        'norms=["mlp"]',
        "--set",
        'prompts=["a b"]',
    ]
    how = {"cwd": ROOT, "capture_output": True, "text": True}
    done = subprocess.run(line, env=variables | {"MEGACHAT_SECRET_FILE": "/etc/secret"}, **how)
    *variables_of_hosts, words = done.stdout.splitlines()
    assert variables_of_hosts == ["OTHER=1", "MEGACHAT_SECRET_FILE=/etc/secret"], done.stderr
    assert words == r"""--set norms=\[\"mlp\"\] --set prompts=["a b"]""", "deepspeed quotes what has blanks"
    done = subprocess.run(line, env=variables | {"MEGACHAT_SECRET": "0123456789abcdef"}, **how)
    assert done.returncode == 2 and done.stderr.startswith("error: pdsh would show MEGACHAT_SECRET: put it into a file")
