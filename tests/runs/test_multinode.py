"""Two hosts, made of namespaces on this machine: the launchers across them, and what is said when the hosts or the
network do not fit.

The first tests start each launcher as a user does. Where the start is not the subject, `on_both` forks deepspeed from a
warm process on each host.
"""

import re
import shutil
import socket
import sys
import time
from pathlib import Path

import pytest

from tests.limits import limit_s
from tests.runs.job import BIN, ROOT, Done, begin, bits_per_byte, checkpoint, command, finish, losses, train, until
from tests.runs.network import SUBNET, Network, two_hosts, why_not

REASON = why_not()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))
GRID = {"parallel": {"tensor": 2, "pipeline": 2}}
LONG = {"horizon": {"steps": 5000}, "evaluate": {"every": 0}, "checkpoint": {"every": 4}}  # ended by the test


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    with two_hosts(tmp_path_factory.mktemp("hosts")) as network:
        yield network


@pytest.fixture(scope="module")
def both(hosts) -> Path:
    """A hostfile with one rank on each host."""
    return hosts.hostfile("both", "host-a slots=1\nhost-b slots=1\n")


def ended(network: Network, host: str, *line, **variables: str) -> Done:
    return finish(begin(network.at(host, list(line), **variables)))


def without_ssh(hostfile: Path, node: int, program: list[str], address: str = "host-a") -> list:
    """The line that launch/no_ssh.sh executes on a host, after its checks."""
    line = [BIN / "deepspeed", "--quiet", "--no_ssh", "--hostfile", hostfile, "--node_rank", node]
    return [*line, "--master_addr", address, "--master_port", "29500", *program]


def on_both(network: Network, hostfile: Path, programs: list[list[str]], **address: str) -> list[Done]:
    """The end of a launcher on each host with its own program line."""
    started = [
        network.warm(host, without_ssh(hostfile, node, program, **address))
        for node, (host, program) in enumerate(zip(network.pids, programs, strict=True))
    ]
    return [finish(process) for process in started]


def test_pdsh_trains_on_two_hosts_as_one_host_does(hosts, both, two, place):
    secret = place.runs / "secret"
    secret.write_text("what both hosts know\n")
    line = ["bash", "launch/hostfile.sh", both, *command(place, "pdsh")[2:]]
    done = ended(hosts, "host-a", *line, MEGACHAT_SECRET_FILE=str(secret))
    assert done.status == 0, done.out + done.err
    assert "2 hosts with 2 ranks: reachable, same code, same versions" in done.out
    assert losses(place.runs / "pdsh") == losses(two) and bits_per_byte(place.runs / "pdsh") == bits_per_byte(two)


def test_a_grid_over_two_hosts_has_the_losses_of_one_host(hosts, place):
    """Four ranks: a tensor axis inside each host, a pipeline between them."""
    here = train(place, "grid_here", world=4, config=GRID)
    four = hosts.hostfile("four", "host-a slots=2\nhost-b slots=2\n")
    for done in on_both(hosts, four, [command(place, "grid", config=GRID)] * 2):
        assert done.status == 0, done.out + done.err
    assert losses(place.runs / "grid") == losses(here)


def test_mpirun_trains_on_two_hosts_as_one_host_does(hosts, both, two, place):
    done = ended(hosts, "host-a", "bash", "launch/mpirun.sh", both, *command(place, "mpi")[2:])
    assert done.status == 0, done.out + done.err
    assert losses(place.runs / "mpi") == losses(two)


def test_without_ssh_and_with_host_names_that_are_loopback_addresses(tmp_path, two, place):
    """As Debian's installer leaves /etc/hosts: 127.0.1.1 for the host's own name. No variable is set for gloo."""
    with two_hosts(tmp_path, loopback_names=True, known=False) as network:
        both = network.hostfile("both", "host-a slots=1\nhost-b slots=1\n")
        lines = [["bash", "launch/no_ssh.sh", both, node, "host-a", *command(place, "no_ssh")[2:]] for node in (0, 1)]
        started = [begin(network.at(host, line)) for host, line in zip(network.pids, lines, strict=True)]
        for done in [finish(process) for process in started]:
            assert done.status == 0, done.out + done.err
        assert losses(place.runs / "no_ssh") == losses(two)
        line = ["bash", "launch/torchrun.sh", "host-a:29400", *command(place, "torchrun")[2:]]
        variables = {"NODES": "2", "RANKS": "1"}
        started = [begin(network.at(host, line, **variables)) for host in network.pids]
        for done in [finish(process) for process in started]:
            assert done.status == 0, done.out + done.err
        assert losses(place.runs / "torchrun") == losses(two)
        done = ended(network, "host-a", sys.executable, "launch/check_hosts.py", both)
        assert done.status == 2 and len(done.errors) == 2, "ssh has not seen these hosts"
        for name, error in zip(network.pids, done.errors, strict=True):
            assert error.startswith(
                f"error: the host key of {name} is not known or has changed (Host key verification "
                f"failed.): run `ssh {name}"
            )


def test_a_killed_rank_is_named_first_and_ends_the_other_host_too(hosts, both, place):
    program = command(place, "killed_there", config=LONG)
    job = begin(hosts.at("host-a", ["deepspeed", "--hostfile", both, *program]))
    deadline = time.monotonic() + limit_s()
    while not checkpoint(place.runs / "killed_there", 4).is_dir():
        assert time.monotonic() < deadline and job.poll() is None, "no checkpoint"
        time.sleep(0.1)
    assert len(hosts.processes(program[2])) > 2
    hosts.do("host-b", "bash", "-c", f"kill -9 $(pgrep -f '^[^ ]*python[^ ]* -u launch/pretrain.py.*{program[2]}')")
    done = finish(job)
    assert done.status != 0
    first = next(line for line in (done.err + done.out).splitlines() if "error:" in line)
    assert "error: rank 1 (host host-b, pid " in first and "died or cannot be reached" in first, done.err
    deadline = time.monotonic() + limit_s()
    while left := hosts.processes(program[2]):
        assert time.monotonic() < deadline, left
        time.sleep(0.2)


def test_a_stalled_rank_is_named_with_its_host(hosts, both, place):
    """Stopped, it answers nobody, and no rank of its host is left to kill it: it ends as soon as it runs again."""
    program = command(place, "stalled_there", "--set", "parallel.stall_s=6", config=LONG)
    started = [
        hosts.warm(host, without_ssh(both, node, program, f"{SUBNET}.1")) for node, host in enumerate(hosts.pids)
    ]
    until(lambda: started[0].poll() is not None or checkpoint(place.runs / "stalled_there", 4).is_dir(), "a checkpoint")
    signal_rank = "kill -{} $(pgrep -f '^[^ ]*python[^ ]* -u launch/pretrain.py.*" + str(program[2]) + "')"
    hosts.do("host-b", "bash", "-c", signal_rank.format("STOP"))
    here = finish(started[0])
    hosts.do("host-b", "bash", "-c", signal_rank.format("CONT"))
    there = finish(started[1])
    assert here.status != 0 and there.status != 0
    error = next(line for line in (here.err + here.out).splitlines() if "error:" in line)
    assert re.search(r"error: rank 1 \(host host-b, pid \d+\) does not answer, stopped or stuck in C code", error), (
        error
    )
    table = (place.runs / "stalled_there" / "stall.txt").read_text()
    assert re.search(r"(?m)^1 +host-b +\d+ +no answer", table), table
    until(lambda: not hosts.processes(program[2]), "end of the ranks")


def test_hosts_that_cannot_be_used_are_reported_before_anything_starts(hosts, place):
    """An unreachable one, an unknown one, one that refuses the key, a port in use: each its sentence, all at once."""
    text = "host-a slots=1\nhost-b slots=1\nhost-c slots=1\nhost-d slots=1\n"
    key = hosts.folder / "user_key.pub"
    good = key.read_text()
    answers = "python3 -c 'import socket; socket.create_connection((\"127.0.0.1\", 29500))' 2>/dev/null"
    server = "python3 -m http.server 29500 >/dev/null 2>&1 &"
    hosts.do("host-a", "sh", "-c", f"{server} until {answers}; do sleep 0.1; done")
    try:
        key.write_text(good.replace("AAAA", "AAAB"))  # what sshd compares with
        done = ended(
            hosts, "host-a", "bash", "launch/hostfile.sh", hosts.hostfile("bad", text), *command(place, "bad_hosts")[2:]
        )
    finally:
        key.write_text(good)
    assert (done.status, done.out) == (2, "")
    refused, refused_b, down, unknown = done.errors
    assert refused.startswith("error: host-a refuses this user's ssh key") and refused_b.startswith(
        "error: host-b refuses"
    )
    assert down.startswith("error: host-c cannot be reached over ssh (") and unknown.startswith(
        "error: the host host-d is unknown: "
    )
    many = hosts.hostfile("many", "host-a slots=1\nhost-b slots=9999999\n")
    done = ended(hosts, "host-a", "bash", "launch/hostfile.sh", many, *command(place, "too_many")[2:])
    hosts.do("host-a", "pkill", "-f", "http.server 29500")
    assert done.status == 2
    slots, port = done.errors
    assert "too little for slots=9999999: set slots to" in slots and port.startswith(
        "error: port 29500 is in use on host-a, where rank 0"
    )


def test_a_cut_cable_is_reported_by_ssh_and_by_the_ranks(hosts, both, place):
    hosts.do("host-b", "ip", "link", "set", "eth0", "down")
    try:
        done = ended(hosts, "host-a", sys.executable, "launch/check_hosts.py", both)
        assert done.status == 2 and re.match(
            r"error: host-b cannot be reached over ssh \(.*(No route to host|timed out)", done.errors[0]
        ), done.err
        program = command(place, "cut", "--set", "parallel.rendezvous_s=6")
        here, there = on_both(hosts, both, [program] * 2, address=f"{SUBNET}.1")
    finally:
        hosts.do("host-b", "ip", "link", "set", "eth0", "up")
    assert (here.status, there.status) == (2, 2)
    assert here.errors[0].startswith("error: rank 1 of 2 did not arrive within 6 s, here is rank 0 on host-a: ")
    assert f"rank 1 on host-b could not reach rank 0 at {SUBNET}.1:29500 within 6 s (" in there.err
    assert not (place.runs / "cut").exists()


def test_a_node_rank_that_is_given_twice_is_refused(hosts, place):
    program = command(place, "again", "--set", "parallel.rendezvous_s=60")
    three = hosts.hostfile("three", "a slots=1\nb slots=1\nc slots=1\n")
    nodes = (("host-a", 0), ("host-a", 1), ("host-b", 1))
    started = [hosts.warm(host, without_ssh(three, node, program)) for host, node in nodes]
    ends = [finish(process) for process in started]
    assert [done.status for done in ends] == [2, 2, 2]
    for done in ends:
        assert re.search(
            r"rank 1 arrived twice, from host-(a and from host-b|b and from host-a): give every host its own", done.err
        ), done.err


def test_another_config_on_a_host_is_refused(hosts, both, place):
    program = command(place, "unlike_hosts")
    here, there = on_both(hosts, both, [program, [*program, "--set", "run.seed=7"]])
    assert (here.status, there.status) == (2, 2)
    assert here.errors == [
        (
            "error: rank 1 on host-b has another config than rank 0 on host-a (run.seed): start all ranks "
            "with the same --config and --set"
        )
    ]
    assert not (place.runs / "unlike_hosts").exists()


def test_other_code_on_a_host_is_refused(tmp_path, place):
    other = tmp_path / "megachat"
    shutil.copytree(ROOT / "megachat", other, ignore=shutil.ignore_patterns("__pycache__"))
    with open(other / "schedule.py", "a") as file:
        file.write("# one line more\n")
    folder = tmp_path / "hosts"
    folder.mkdir()
    with two_hosts(folder, other_tree=other) as network:
        both = network.hostfile("both", "host-a slots=1\nhost-b slots=1\n")
        program = command(place, "other_code")
        checked = ended(network, "host-a", "bash", "launch/hostfile.sh", both, *program[2:])
        assert checked.status == 2
        assert checked.errors == [
            (
                f"error: host-b has other code than this machine in {ROOT} (megachat/schedule.py): copy "
                f"the same files to every host"
            )
        ]
        direct = ended(network, "host-a", "deepspeed", "--hostfile", both, *program)
    assert direct.status != 0 and not (place.runs / "other_code").exists()
    assert (
        "error: rank 1 on host-b has other code than rank 0 on host-a (megachat/schedule.py): copy the same files"
        in direct.err
    )


def test_a_port_in_use_ends_both_hosts(hosts, both, place):
    holds = "import socket, time; held = socket.create_server(('', 29500)); print(1, flush=True); time.sleep(3600)"
    holder = begin(hosts.at("host-a", [sys.executable, "-c", holds]))
    assert holder.stdout.readline() == "1\n"
    program = command(place, "taken", "--set", "parallel.rendezvous_s=8")
    here, there = on_both(hosts, both, [program] * 2)
    hosts.do("host-a", "pkill", "-f", "create_server")
    finish(holder)
    assert (here.status, there.status) == (2, 2)
    assert "error: port 29500 on host-a, where rank 0 listens, cannot be used (Address already in use): " in here.err
    assert "is another program, not rank 0 of this job" in there.err and not (place.runs / "taken").exists()


def test_nothing_is_left_behind(tmp_path):
    before = {path.name for path in Path("/sys/class/net").iterdir()}
    with pytest.raises(RuntimeError, match="in the middle"), two_hosts(tmp_path, known=False) as network:
        pids = list(network.pids.values())
        assert all(Path(f"/proc/{pid}").exists() for pid in pids) and socket.gethostname() not in network.pids
        raise RuntimeError("in the middle")
    deadline = time.monotonic() + limit_s()  # the kernel takes a moment
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert {path.name for path in Path("/sys/class/net").iterdir()} == before
