"""Hostfiles, and messages about unusable hosts. ssh is a script that runs the command here or fails as ssh does."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from megachat.errors import UserError
from megachat.job.host_probe import code_hashes
from megachat.job.hosts import ROOT, Host, check_hosts, parse_hostfile, ssh_command
from megachat.job.launch import free_port

SSH = """#!/bin/sh
for command; do before=$name; name=$host; host=$command; done
case $name in
  nowhere) echo 'ssh: Could not resolve hostname nowhere: Name or service not known' >&2; exit 255 ;;
  locked) echo 'root@locked: Permission denied (publickey).' >&2; exit 255 ;;
  stranger) echo 'Host key verification failed.' >&2; exit 255 ;;
  down) echo 'ssh: connect to host down port 22: Connection timed out' >&2; exit 255 ;;
  closed) echo 'ssh: connect to host closed port 22: Connection refused' >&2; exit 255 ;;
  loud) echo 'Welcome!'; exit 0 ;;
  bare) exit 127 ;;
esac
exec sh -c "$command"
"""


@pytest.fixture
def port() -> int:
    return free_port()


@pytest.fixture
def programs(tmp_path, monkeypatch) -> Path:
    """A folder first in PATH, with ssh."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "ssh").write_text(SSH)
    (folder / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder


def written(tmp_path, text: str) -> Path:
    path = tmp_path / "hostfile"
    path.write_text(text)
    return path


def refusal(hosts: list[Host], port: int, **where) -> list[str]:
    with pytest.raises(UserError) as error:
        check_hosts(hosts, port=port, **where)
    return str(error.value).splitlines()


def test_a_hostfile_is_read_as_deepspeed_reads_it(tmp_path):
    path = written(tmp_path, "# two hosts\n\nworker-1 slots=2\n  worker-2\tslots=13 max_slots=16   # the big one\n")
    assert parse_hostfile(path) == [Host("worker-1", 2), Host("worker-2", 13)]
    from deepspeed.launcher.runner import _parse_hostfile

    assert dict(_parse_hostfile(path.read_text().splitlines())) == {"worker-1": 2, "worker-2": 13}
    assert parse_hostfile(ROOT / "launch" / "hostfile.example") == [Host("worker-1", 8), Host("worker-2", 8)]


def test_every_mistake_in_a_hostfile_is_reported_with_its_line(tmp_path):
    text = "a slots=1\nb slot=2\nc slots=x\nd slots=0\na slots=3\ne\nf slots=2 slots=3\ng slots=-1\n"
    with pytest.raises(UserError) as error:
        parse_hostfile(written(tmp_path, text))
    lines = str(error.value).splitlines()
    wanted = {
        2: "'b slot=2' is not `NAME slots=N`",
        3: "slots=x of c is not a number",
        4: "d has no slots",
        5: "a was listed before",
        6: "'e' is not",
        7: "is not `NAME slots=N`",
        8: "slots=-1 of g is not a number",
    }
    assert len(lines) == len(wanted)
    for line, (number, part) in zip(lines, wanted.items(), strict=True):
        assert f"hostfile line {number}: " in line and part in line


def test_a_byte_order_mark_and_max_slots_are_read_and_names_are_no_options(tmp_path):
    text = (
        "\ufeffworker-1 slots=2 max_slots=4\r\n10.0.0.2 slots=1 max-slots=1\r\nfe80::1%eth0 slots=1\nadmin@c slots=1\n"
    )
    hosts = [Host("worker-1", 2), Host("10.0.0.2", 1), Host("fe80::1%eth0", 1), Host("admin@c", 1)]
    assert parse_hostfile(written(tmp_path, text)) == hosts
    bad = "-oProxyCommand=x slots=1\na@-oX slots=1\nb;x slots=1\n$(x) slots=1\n"
    bad += "c slots=2 max_slots=1\nd slots=1 max_slots=x\n"
    with pytest.raises(UserError) as error:
        parse_hostfile(written(tmp_path, f"{bad}e slots={'9' * 5000}\n"))
    lines = str(error.value).splitlines()
    assert len(lines) == 7 and all("is no host name, which begins with a letter" in line for line in lines[:4])
    assert "max_slots=1 of c is not a number of at least slots=2" in lines[4] and "max_slots=x of d" in lines[5]


def test_ssh_is_never_given_a_name_as_an_option():
    line = ssh_command("worker-1", ["true"], ssh_port=2222)
    assert line[line.index("worker-1") - 1] == "--" and line.index("-p") < line.index("--")


def test_a_missing_or_empty_hostfile_is_reported(tmp_path):
    for path, part in (
        (tmp_path / "none", "cannot be read (No such file"),
        (written(tmp_path, "# nobody\n"), "lists no host"),
    ):
        with pytest.raises(UserError, match=part.replace("(", r"\(")):
            parse_hostfile(path)


def test_hosts_like_this_one_are_good(programs, port):
    assert check_hosts([Host("here", 1), Host("there", 1)], port=port) == []
    (remark,) = check_hosts([Host("here", 1 + len(os.sched_getaffinity(0)))], port=port)
    assert remark.startswith("here has ") and "it will be slow" in remark


def test_ssh_failures_are_distinguished_and_all_at_once(programs, port):
    names = ("nowhere", "locked", "stranger", "down", "closed", "loud", "bare", "here")
    messages = refusal([Host(name, 1) for name in names], port)
    parts = (
        "nowhere is unknown",
        "refuses this user's ssh key",
        "host key of stranger",
        "down cannot be reached",
        "closed has no ssh server",
    )
    parts = (*parts, "loud prints text of its own", f"bare has no python at {sys.executable}")
    assert len(messages) == len(parts)
    for line, part in zip(messages, parts, strict=True):
        assert part in line


def test_other_code_and_another_place_are_reported(programs, port, tmp_path):
    shutil.copytree(ROOT / "megachat", tmp_path / "megachat", ignore=shutil.ignore_patterns("__pycache__"))
    before = code_hashes(tmp_path)
    (tmp_path / "megachat" / "config.py").write_text("pass\n")
    assert {name for name, digest in code_hashes(tmp_path).items() if before[name] != digest} == {"megachat/config.py"}
    moved = (programs / "ssh").read_text().replace('"$command"', f'"$(echo "$command" | sed s,{ROOT},{tmp_path},g)"')
    (programs / "ssh").write_text(moved)
    if sys.executable.startswith(str(ROOT)):
        (tmp_path / ".venv").symlink_to(ROOT / ".venv")
    (message,) = refusal([Host("there", 1)], port)
    assert message.startswith(
        f"there has other code than this machine in {ROOT} (launch/pretrain.py, megachat/config.py): "
    )
    assert refusal([Host("there", 1)], port, root=tmp_path / "none") == [
        f"there has no folder {tmp_path / 'none'}: put the project at the same path on every host"
    ]


def test_slots_beyond_gpus_or_memory_are_refused(programs, port):
    (message,) = refusal([Host("here", 10**7)], port)
    assert "GB of memory, too little for slots=10000000: set slots to " in message
    (programs / "nvidia-smi").write_text("#!/bin/sh\necho 'GPU 0: one (UUID: 0)'\necho 'GPU 1: two (UUID: 1)'\n")
    (programs / "nvidia-smi").chmod(0o755)
    assert check_hosts([Host("here", 2)], port=port) == []
    assert refusal([Host("here", 3), Host("there", 2)], port) == ["here has 2 GPUs but slots=3: set slots to 2"]


def test_a_port_in_use_is_reported(programs):
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        (message,) = refusal([Host("here", 1), Host("there", 1)], port)
    assert (
        message.startswith(f"port {port} is in use on here, where rank 0 would listen: ") and "--master_port" in message
    )


def test_the_probe_needs_nothing_but_python(port):
    line = [sys.executable, "-S", "-", str(ROOT), str(port)]
    done = subprocess.run(
        line, input=(ROOT / "megachat" / "job" / "host_probe.py").read_text(), capture_output=True, text=True, cwd="/"
    )
    assert done.returncode == 0 and '"torch": "none"' in done.stdout, done.stderr
