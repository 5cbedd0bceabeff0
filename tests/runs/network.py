"""Two hosts on this machine: each with its own network, host name, processes, /etc/hosts and sshd, joined by a cable (a
veth pair).

They are namespaces of one process each and lie nowhere else: when it ends, or the tests die, the kernel takes network,
mounts and processes away. ssh keys and settings lie in a temporary folder; a wrapper named ssh, first in PATH, has
every program use them.
"""

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.limits import limit_s
from tests.runs.forked import STUBS
from tests.runs.job import BIN, ROOT, environment
from tests.runs.warm import Launcher

SUBNET = "10.77.7"
_SSHD = """\
Port 22
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/user_key.pub
StrictModes no
UsePAM no
PidFile none
PasswordAuthentication no
PermitRootLogin yes
MaxStartups 100
"""
# Variables that select threads and CPU instructions, and with them the last bits of results. Commands that come over
# ssh need those of the tests, because ssh passes none.
_ARITHMETIC = (
    "OMP_NUM_THREADS ATEN_CPU_CAPABILITY MKL_CBWR MKL_ENABLE_INSTRUCTIONS ONEDNN_MAX_CPU_ISA DNNL_MAX_CPU_ISA"
).split()
_SSH = """\
Host *
  User root
  IdentityFile {folder}/user_key
  IdentitiesOnly yes
  UserKnownHostsFile {folder}/known_hosts
  GlobalKnownHostsFile /dev/null
  LogLevel ERROR
"""
# what process 1 of a host does; it ends with the process that made it, because of unshare --kill-child
_INIT = """
set -e
mount --make-rprivate /
mount -t tmpfs none /run && mkdir /run/sshd
mount --bind {folder}/{name}.hosts /etc/hosts
hostname {name}
ip link set lo up
[ -z "{other}" ] || mount --bind "{other}" "{root}/megachat"
touch {folder}/{name}.up
exec {sshd} -D -e -f {folder}/sshd_config
"""


def why_not() -> str | None:
    """What this machine lacks for two hosts; None when it can be done."""
    if os.geteuid() != 0:
        return "two hosts on this machine need root"
    for program, package in (
        ("ip", "iproute2"),
        ("unshare", "util-linux"),
        ("sshd", "openssh-server"),
        ("pdsh", "pdsh"),
        ("ssh", "openssh-client"),
    ):
        if shutil.which(program, path=_path()) is None:
            return f"two hosts on this machine need {program}: apt-get install {package}"
    tried = subprocess.run(
        ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "true"], capture_output=True, text=True
    )
    return f"this machine gives no namespaces ({tried.stderr.strip()})" if tried.returncode else None


def _path() -> str:
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


@dataclass(frozen=True)
class Network:
    """The hosts, by name: "host-a" is SUBNET.1 and "host-b" SUBNET.2.

    folder: keys, hostfiles and what else a test puts there.
    """

    folder: Path
    pids: dict[str, int]

    def at(self, host: str, line: list, **variables: str) -> list:
        """The command line that runs `line` on a host as its user would: from the project's folder, with ssh, pdsh and
        the launchers in PATH.
        """
        given = environment() | self.paths | variables
        given.pop("PYTHONPATH", None)
        shell = 'cd "$0" && exec "$@"'  # after entering: the folder may be another one there
        enter = ["nsenter", "-t", self.pids[host], "--net", "--uts", "--mount", "--pid"]
        return [
            *enter,
            "env",
            "-i",
            *(f"{key}={value}" for key, value in given.items()),
            "bash",
            "-c",
            shell,
            ROOT,
            *line,
        ]

    @property
    def paths(self) -> dict[str, str]:
        """The variables with which programs on a host find ssh, pdsh and the launchers."""
        return {"PATH": f"{self.folder}/bin:{STUBS}:{BIN}:{_path()}"}

    def do(self, host: str, *line: str) -> str:
        """Run a short command on a host and return what it printed."""
        return subprocess.run(
            [str(part) for part in self.at(host, list(line))],
            check=True,
            capture_output=True,
            text=True,
            timeout=limit_s(),
        ).stdout

    def warm(self, host: str, line: list, **variables: str) -> Launcher:
        """Starts a Python program on a host, forked from a warm process."""
        return Launcher(line, self.paths | variables, host=self.pids[host])

    def hostfile(self, name: str, text: str) -> Path:
        path = self.folder / name
        path.write_text(text)
        return path

    def processes(self, words: str) -> list[str]:
        """Command lines on both hosts that hold `words`."""
        return [
            line
            for host in self.pids
            for line in self.do(host, "ps", "-eo", "args", "-ww").splitlines()
            if words in line
        ]


@contextlib.contextmanager
def two_hosts(
    folder: Path, *, other_tree: Path | None = None, known: bool = True, loopback_names: bool = False
) -> Iterator[Network]:
    """The hosts, up and reachable.

    other_tree: what host-b has in place of the folder megachat/. known: each other's host keys are known.

    loopback_names: a host's own name is 127.0.1.1 to itself, as Debian's installer writes it.
    """
    _write_settings(folder, known, loopback_names)
    holders, pids = {}, {}
    try:
        for name, tree in (("host-a", None), ("host-b", other_tree)):
            init = _INIT.format(
                folder=folder, name=name, other=tree or "", root=ROOT, sshd=shutil.which("sshd", path=_path())
            )
            line = [
                "unshare",
                "--net",
                "--uts",
                "--mount",
                "--pid",
                "--fork",
                "--kill-child",
                "--mount-proc",
                "bash",
                "-c",
                init,
            ]
            log = open(folder / f"{name}.log", "w")
            holders[name] = subprocess.Popen(
                line, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
            log.close()
            _until(lambda name=name: (folder / f"{name}.up").exists(), holders[name], folder / f"{name}.log")
            children = Path(f"/proc/{holders[name].pid}/task/{holders[name].pid}/children").read_text().split()
            pids[name] = int(children[0])
        network = Network(folder, pids)
        _run(
            "nsenter",
            "-t",
            pids["host-a"],
            "--net",
            "ip",
            "link",
            "add",
            "eth0",
            "type",
            "veth",
            "peer",
            "name",
            "eth0",
            "netns",
            pids["host-b"],
        )
        for number, name in enumerate(pids, 1):
            network.do(name, "ip", "address", "add", f"{SUBNET}.{number}/24", "dev", "eth0")
            network.do(name, "ip", "link", "set", "eth0", "up")
        if known:
            for name in pids:
                _until(lambda name=name: _answers(network, name), holders[name], folder / f"{name}.log")
        yield network
    finally:
        for holder in holders.values():
            holder.kill()  # its child, process 1 of the host, is killed with it, and so is everything there
            holder.wait()


def _write_settings(folder: Path, known: bool, loopback_names: bool) -> None:
    for key in ("host_key", "user_key"):
        _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", folder / key)
    passed = [f"{name}={os.environ[name]}" for name in _ARITHMETIC if os.environ.get(name)]
    set_env = f"SetEnv {' '.join(passed)}\n" if passed else ""
    (folder / "sshd_config").write_text(_SSHD.format(folder=folder) + set_env)
    (folder / "ssh_config").write_text(_SSH.format(folder=folder))
    public = " ".join((folder / "host_key.pub").read_text().split()[:2])
    names = f"host-a,host-b,{SUBNET}.1,{SUBNET}.2"
    (folder / "known_hosts").write_text(f"{names} {public}\n" if known else "")
    for name in ("host-a", "host-b"):
        loopback = f"127.0.1.1 {name}\n" if loopback_names else ""
        lines = f"127.0.0.1 localhost\n{loopback}{SUBNET}.1 host-a\n{SUBNET}.2 host-b\n{SUBNET}.3 host-c\n"
        (folder / f"{name}.hosts").write_text(lines)
    (folder / "bin").mkdir()
    wrapper = folder / "bin" / "ssh"
    wrapper.write_text(f'#!/bin/sh\nexec {shutil.which("ssh", path=_path())} -F {folder}/ssh_config "$@"\n')
    wrapper.chmod(0o755)


def _answers(network: Network, name: str) -> bool:
    address = f"{SUBNET}.{1 + (name == 'host-b')}"
    try:
        return (
            network.do(name, "ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=2", address, "hostname").strip()
            == name
        )
    except subprocess.SubprocessError:
        return False


def _until(true, holder: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + limit_s()
    while not true():
        assert holder.poll() is None and time.monotonic() < deadline, f"the host is not up: {log.read_text()}"
        time.sleep(0.02)


def _run(*line) -> None:
    subprocess.run([str(part) for part in line], check=True, capture_output=True, timeout=limit_s())
