"""tools/doctor.py over two hosts, made of namespaces on this machine: their facts, their speed, a slow cable."""

import json
import subprocess
import sys

import pytest

from megachat.doctor.hosts import describe_hosts
from tests.runs.job import begin, finish
from tests.runs.network import two_hosts, why_not

REASON = why_not()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    with two_hosts(tmp_path_factory.mktemp("hosts")) as network:
        yield network


def doctor(hosts, text: str):
    line = [sys.executable, "tools/doctor.py", "--json", "--hostfile", hosts.hostfile("hosts", text)]
    return finish(begin(hosts.at("host-a", line)))


def test_hosts_side_by_side(hosts):
    """One with a trap behind a slow cable, one that does not answer."""
    hosts.do("host-b", "prlimit", "--pid", "1", "--nofile=300:300")  # sshd there and all that it starts
    try:
        hosts.do(
            "host-b",
            "tc",
            "qdisc",
            "add",
            "dev",
            "eth0",
            "root",
            "tbf",
            "rate",
            "200mbit",
            "burst",
            "64kb",
            "latency",
            "500ms",
        )
        slowed = True
    except (subprocess.CalledProcessError, FileNotFoundError):
        slowed = False  # the machine has no traffic control
    done = doctor(hosts, "host-a slots=2\nhost-b slots=1\nhost-d slots=1\n")
    assert done.status == 1, done.out + done.err
    examination = json.loads(done.out.splitlines()[-1])
    (mistake,) = examination["mistakes"]
    assert (
        mistake.startswith("the host host-d is unknown: correct its name in the hostfile")
        and examination["unlike"] == {}
    )
    assert {name: [trap["name"] for trap in report["traps"]] for name, report in examination["hosts"].items()} == {
        "host-a": [],
        "host-b": ["open-files"],
    }
    assert {name: len(rates) for name, rates in examination["matrix"].items()} == {"host-a": 1, "host-b": 1}
    assert min(rate for rates in examination["matrix"].values() for rate in rates) > 1e6
    assert set(examination["pairs"]) == {"host-a host-b", "host-b host-a"}
    if slowed:
        assert examination["pairs"]["host-b host-a"] < 25e6 * 1.1  # 200 Mbit/s
        assert examination["slow"]["pairs"] == ["host-b host-a"]
    lines = describe_hosts(examination, {"host-a": 2, "host-b": 1}).splitlines()
    assert [line.split()[:3] for line in lines[:2]] == [
        ["host", "slots", "cores"],
        ["host-a", "2", str(examination["hosts"]["host-a"]["facts"]["cores"])],
    ]
    assert lines[2].endswith(" open-files") and ("*" in lines[2]) == bool(
        slowed or "host-b device 0" in examination["slow"]["matrix"]
    )
    assert any(line.startswith("trap on host-b: open-files: a process may have 300 open files") for line in lines)
    assert lines[-2] == f"mistake: {mistake}"
    done = doctor(hosts, "host-a slot=2\n")
    assert done.status == 2 and done.errors[0].endswith("`worker-1 slots=8`")
