"""Checks before a start on several hosts: the hostfile, and that every host can be reached and equals this one."""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from megachat.errors import UserError, raise_if_unreadable
from megachat.files import path_kind
from megachat.installation import ROOT
from megachat.job import host_probe

RANK_MEMORY_BYTES = 500 * 2**20  # what python, torch and DeepSpeed take before there is a model
_SSH_CONNECT_S, _PROBE_S = 5, 60
# Names reach ssh, pdsh and shells. A name that begins with "-" would be an option, e.g. -oProxyCommand=...
_HOST_NAME = re.compile(r"[\w:][\w.:%-]*(@[\w:][\w.:%-]*)?")


@dataclass(frozen=True)
class Host:
    """A line of a hostfile. slots: the number of ranks on the host."""

    name: str
    slots: int


def parse_hostfile(path: str | Path) -> list[Host]:
    """Returns the hosts of a file with lines `NAME slots=N`, and perhaps Open MPI's ` max_slots=M`.

    Comments, empty lines and a byte order mark are ignored. Raises UserError with a line for each mistake.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise_if_unreadable(f"the hostfile {path}", error)
        raise UserError(
            f"the hostfile {path} cannot be read ({error.strerror}): name an existing file, see launch/hostfile.example"
        ) from None
    except UnicodeDecodeError:
        raise UserError(f"the hostfile {path} is not a text file: write lines like `worker-1 slots=8`") from None
    hosts: dict[str, Host] = {}
    mistakes = []
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        match = re.fullmatch(r"(\S+)\s+slots=(\S+)(?:\s+max[_-]slots=(\S+))?", text)
        name, slots, most = match.groups() if match else ("", "", None)
        if not match:
            mistake = f"{text!r} is not `NAME slots=N`, e.g. `worker-1 slots=8`"
        elif not _HOST_NAME.fullmatch(name):
            mistake = f"{name!r} is no host name, which begins with a letter or digit: write the name that ssh knows"
        elif not re.fullmatch("[0-9]{1,9}", slots):
            mistake = f"slots={slots} of {name} is not a number: write how many ranks run there"
        elif int(slots) == 0:
            mistake = f"{name} has no slots: write slots=1 or more, or remove the line"
        elif most is not None and not (re.fullmatch("[0-9]{1,9}", most) and int(most) >= int(slots)):
            mistake = f"max_slots={most} of {name} is not a number of at least slots={slots}: correct or remove it"
        elif name in hosts:
            mistake = f"{name} was listed before: keep one line per host"
        else:
            hosts[name] = Host(name, int(slots))
            continue
        mistakes.append(f"{path} line {number}: {mistake}")
    if not hosts and not mistakes:
        mistakes.append(f"the hostfile {path} lists no host: write lines like `worker-1 slots=8`")
    if mistakes:
        raise UserError("\n".join(mistakes))
    return list(hosts.values())


def check_hosts(hosts: Sequence[Host], *, port: int, ssh_port: int | None = None, root: Path = ROOT) -> list[str]:
    """Probes every host over ssh, all at once, and compares it with this machine. Returns remarks that need no change.

    port: where rank 0, on the first host, will listen. Raises UserError with a line for each mistake. A host may be
    unknown, be unreachable or refuse the key. It may lack the project or python at this machine's paths, or have other
    code or versions. It may have more slots than GPUs or memory, and the port may be in use.
    """
    with ThreadPoolExecutor(min(64, len(hosts))) as pool:
        # port 0 is free on any host; two names of one host would otherwise find the port taken by each other's probe
        answers = list(pool.map(lambda host: _probe(host, port if host is hosts[0] else 0, ssh_port, root), hosts))
    mistakes = [answer for answer in answers if isinstance(answer, str)]
    probes = [(host, answer) for host, answer in zip(hosts, answers, strict=True) if isinstance(answer, dict)]
    here = {"code": host_probe.code_hashes(root), "versions": host_probe.versions()}
    with_gpus = any(probe["gpus"] for _, probe in probes)
    remarks = []
    for host, probe in probes:
        mistakes += _differences_from_here(host, probe, here, root) + _excess_slots(host, probe, with_gpus)
        if not probe["gpus"] and host.slots > probe["cores"]:
            remarks.append(f"{host.name} has {probe['cores']} cores for {host.slots} ranks: it will be slow")
    if isinstance(answers[0], dict) and not answers[0]["port_is_free"]:
        mistakes.append(
            f"port {port} is in use on {hosts[0].name}, where rank 0 would listen: "
            "end the job that holds it or choose another with --master_port"
        )
    if mistakes:
        raise UserError("\n".join(mistakes))
    return remarks


def check_launcher_hostfile() -> None:
    """Raises UserError if the deepspeed launcher above was given a missing hostfile: it only warns, and uses one host.

    Its number of hosts must be that of the hostfile, unless some were excluded on purpose.
    """
    import psutil  # a dependency of DeepSpeed

    nodes = os.environ.get("CROSS_SIZE")  # set by deepspeed
    for process in psutil.Process().parents():
        try:
            words, folder = process.cmdline(), process.cwd()
        except psutil.Error:
            continue
        name = _launcher_hostfile(words)
        if name is None:
            continue
        path = Path(folder) / name
        if not path_kind(path):
            raise UserError(
                f"the hostfile {name} does not exist, so deepspeed would train on this host alone: "
                "name an existing file, or omit --hostfile"
            )
        listed = len(parse_hostfile(path))
        chosen = any(word.startswith(("--inc", "--exc", "--num_n", "-i", "-e")) for word in words)
        if nodes and nodes != str(listed) and not chosen:
            raise UserError(
                f"the hostfile {name} lists {listed} hosts but deepspeed started {nodes}: "
                "start it again with the file as it is now"
            )


def _launcher_hostfile(words: Sequence[str]) -> str | None:
    """Returns the hostfile in a command line of `deepspeed`; None when it names none or is another program."""
    names = [Path(word).name for word in words]
    launchers = {"deepspeed", "deepspeed.launcher.runner", "ds"}
    start = next((number for number, name in enumerate(names[:4]) if name in launchers), None)
    if start is None:
        return None
    stop = names.index("pretrain.py") if "pretrain.py" in names else len(words)
    options = list(words[start + 1 : stop])
    for word, following in zip(options, [*options[1:], None], strict=True):
        name, equals, value = word.partition("=")
        if word.startswith("-H") and len(word) > 2:
            return word[2:].removeprefix("=")
        if name == "-H" or (name.startswith("--ho") and "--hostfile".startswith(name)):
            return value if equals else following
    return None


def ssh_command(name: str, words: Sequence[str], ssh_port: int | None = None, root: Path = ROOT) -> list[str]:
    """Returns the command that runs `words` on a host over ssh, in the project's folder there, without questions."""
    port = ["-p", str(ssh_port)] if ssh_port else []
    remote = shlex.join(["cd", str(root)]) + " && exec " + shlex.join(words)
    return ["ssh", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={_SSH_CONNECT_S}", *port, "--", name, remote]


def run_on_host(
    name: str,
    words: Sequence[str],
    *,
    text="",
    ssh_port: int | None = None,
    root=ROOT,
    timeout_s: float = _PROBE_S,
    accepted=(0,),
) -> dict:
    """Runs `words` on the host with `text` on standard input, and returns the JSON object in the last line of its
    output.

    accepted: exit statuses that are not failures. Raises UserError that says why there is no answer.
    """
    try:
        done = subprocess.run(
            ssh_command(name, words, ssh_port, root), input=text, capture_output=True, text=True, timeout=timeout_s
        )
    except FileNotFoundError:
        raise UserError(
            "there is no ssh on this machine: install openssh-client, or start every host by hand with launch/no_ssh.sh"
        ) from None
    except subprocess.TimeoutExpired:
        raise UserError(f"{name} did not answer over ssh within {timeout_s:g} s: try `ssh {name} true`") from None
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    if done.returncode in accepted:
        try:
            return json.loads(done.stdout.splitlines()[-1])
        except (ValueError, IndexError):
            problem = "prints text of its own when ssh runs a command there: keep its shell start-up files silent"
    elif done.returncode == 255:
        raise UserError(_explain_ssh_failure(name, done.stderr, last))
    elif done.returncode in (1, 2) and "cd:" in done.stderr:
        problem = f"has no folder {root}: put the project at the same path on every host"
    elif done.returncode in (126, 127):
        problem = (
            f"has no python at {words[0]}: install the project at the same path on every host (bash launch/setup.sh)"
        )
    else:
        problem = f"could not be examined with {words[0]} ({last}): install the project there as here"
    raise UserError(f"{name} {problem}")


def _probe(host: Host, port: int, ssh_port: int | None, root: Path) -> dict | str:
    """Returns the host's answer, or the sentence that says why there is none."""
    source = Path(host_probe.__file__).read_text(encoding="utf-8")
    try:
        words = [sys.executable, "-", str(root), str(port)]
        return run_on_host(host.name, words, text=source, ssh_port=ssh_port, root=root)
    except UserError as error:
        return str(error)


def _explain_ssh_failure(name: str, text: str, last: str) -> str:
    lower = text.lower()
    if "could not resolve" in lower or "name or service not known" in lower:
        return f"the host {name} is unknown: correct its name in the hostfile or add it to DNS or /etc/hosts"
    if "permission denied" in lower:
        return (
            f"{name} refuses this user's ssh key: add it there with `ssh-copy-id {name}`, so that ssh needs no password"
        )
    if "host key" in lower:
        return f"the host key of {name} is not known or has changed ({last}): run `ssh {name} true` once and accept it"
    if "refused" in lower:
        return f"{name} has no ssh server at this port ({last}): start sshd there, or name its port with --ssh_port"
    return f"{name} cannot be reached over ssh ({last}): check that it is up, and the network and firewall between"


def _differences_from_here(host: Host, probe: dict, here: dict, root: Path) -> list[str]:
    mistakes = []
    if files := _unequal_keys(probe["code"], here["code"]):
        names = ", ".join(files[:3]) + (f" and {len(files) - 3} more" if len(files) > 3 else "")
        mistakes.append(
            f"{host.name} has other code than this machine in {root} ({names}): copy the same files to every host"
        )
    for name in _unequal_keys(probe["versions"], here["versions"]):
        mistakes.append(
            f"{host.name} has {name} {probe['versions'].get(name)}, this machine has {here['versions'].get(name)}: "
            "install the same on every host"
        )
    return mistakes


def _unequal_keys(one: dict, other: dict) -> list[str]:
    return sorted(key for key in one.keys() | other.keys() if one.get(key) != other.get(key))


def _excess_slots(host: Host, probe: dict, with_gpus: bool) -> list[str]:
    """GPUs are a limit. On CPUs more ranks than cores are only slow, but ranks beyond its memory bring a host down."""
    if with_gpus:
        fix = f"set slots to {probe['gpus']}" if probe["gpus"] else "set slots to what it has, or remove its line"
        return [f"{host.name} has {probe['gpus']} GPUs but slots={host.slots}: {fix}"] * (host.slots > probe["gpus"])
    fitting = max(1, probe["memory_bytes"] // RANK_MEMORY_BYTES)
    memory = f"{probe['memory_bytes'] / 1e9:.1f} GB of memory, too little for slots={host.slots}"
    return [f"{host.name} has {memory}: set slots to {fitting} or fewer"] * (host.slots > fitting)
