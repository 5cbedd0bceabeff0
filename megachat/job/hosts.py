"""Several hosts, before anything is started on them: the hostfile, and whether every host can be reached and holds the same as this one."""

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from megachat.errors import UserError
from megachat.job import host_probe as probe

ROOT = Path(__file__).resolve().parents[2]
RANK_MEMORY_BYTES = 500 * 2**20  # what python, torch and DeepSpeed take before there is a model
_CONNECT_S, _PROBE_S = 5, 60
_LINE = re.compile(r"(\S+)\s+slots=(\S+)")


@dataclass(frozen=True)
class Host:
    """A line of a hostfile. slots: ranks on it."""

    name: str
    slots: int


def parse_hostfile(path: str | Path) -> list[Host]:
    """The hosts of a file with lines `NAME slots=N`, comments and empty lines left out, in order. Raises UserError with a line for each mistake."""
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(
            f"the hostfile {path} cannot be read ({error.strerror}): name an existing file, as launch/hostfile.example"
        ) from None
    except UnicodeDecodeError:
        raise UserError(f"the hostfile {path} is no text file: write lines as `worker-1 slots=8`") from None
    hosts: dict[str, Host] = {}
    mistakes = []
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        found = _LINE.fullmatch(text)
        where = f"{path} line {number}"
        if not found:
            mistakes.append(f"{where}: {text!r} is not `NAME slots=N`, as `worker-1 slots=8`")
        elif not re.fullmatch("[0-9]+", found[2]):
            mistakes.append(f"{where}: slots={found[2]} of {found[1]} is not a number: write how many ranks run there")
        elif int(found[2]) == 0:
            mistakes.append(f"{where}: {found[1]} has no slots: write slots=1 or more, or take the line out")
        elif found[1] in hosts:
            mistakes.append(f"{where}: {found[1]} was listed before: keep one line for a host")
        else:
            hosts[found[1]] = Host(found[1], int(found[2]))
    if not hosts and not mistakes:
        mistakes.append(f"the hostfile {path} lists no host: write lines as `worker-1 slots=8`")
    if mistakes:
        raise UserError("\n".join(mistakes))
    return list(hosts.values())


def check_hosts(hosts: Sequence[Host], *, port: int, ssh_port: int | None = None, root: Path = ROOT) -> list[str]:
    """Probe every host over ssh, all at once, and compare them with this machine. Returns remarks that need no change.

    port: where rank 0, on the first host, will listen. Raises UserError with a line for each mistake: a host that is unknown, unreachable or
    refuses the key, no project or python at this machine's paths, other code or versions, more slots than GPUs or memory, the port in use.
    """
    with ThreadPoolExecutor(min(64, len(hosts))) as pool:
        # port 0, which any host has free: two names of one host would else find the port taken by each other's probe
        answers = list(pool.map(lambda host: _probe(host, port if host is hosts[0] else 0, ssh_port, root), hosts))
    mistakes = [answer for answer in answers if isinstance(answer, str)]
    found = [(host, answer) for host, answer in zip(hosts, answers, strict=True) if isinstance(answer, dict)]
    here = {"code": probe.code_hashes(root), "versions": probe.versions()}
    remarks = []
    for host, answer in found:
        mistakes += _differences(host, answer, here, root)
        mistakes += _too_many(host, answer, any(other["gpus"] for _, other in found))
        if not answer["gpus"] and host.slots > answer["cores"]:
            remarks.append(f"{host.name} has {answer['cores']} cores for {host.slots} ranks: it will be slow")
    if isinstance(answers[0], dict) and not answers[0]["port_is_free"]:
        mistakes.append(
            f"port {port} is in use on {hosts[0].name}, where rank 0 would listen: end the job that holds it or choose another with --master_port"
        )
    if mistakes:
        raise UserError("\n".join(mistakes))
    return remarks


def check_launcher_hostfile(nodes: int | None) -> None:
    """Raise UserError when the deepspeed launcher above this process was given a hostfile that is not there: it only warns, and uses one host.

    nodes: the hosts that the launcher says it uses (CROSS_SIZE); they must be those of the hostfile, unless some were left out on purpose.
    """
    for words, folder in _ancestors():
        asked = _launcher_hostfile(words)
        if asked is None:
            continue
        path = Path(folder) / asked
        if not path.is_file():
            raise UserError(
                f"the hostfile {asked} does not exist, so deepspeed would train on this host alone: name an existing file, or leave --hostfile out"
            )
        listed = len(parse_hostfile(path))
        chosen = any(word.startswith(("--inc", "--exc", "--num_n", "-i", "-e")) for word in words)
        if nodes is not None and nodes != listed and not chosen:
            raise UserError(
                f"the hostfile {asked} lists {listed} hosts but deepspeed started {nodes}: start it again with the file as it is now"
            )


def _launcher_hostfile(words: Sequence[str]) -> str | None:
    """The hostfile in the command line of `deepspeed`; None when it names none or is another program."""
    start = next(
        (
            number
            for number, word in enumerate(words[:4])
            if Path(word).name in ("deepspeed", "deepspeed.launcher.runner", "ds")
        ),
        None,
    )
    stop = next((number for number, word in enumerate(words) if Path(word).name == "pretrain.py"), len(words))
    options = [] if start is None else list(words[start + 1 : stop])
    for number, word in enumerate(options):
        name, equals, value = word.partition("=")
        if word.startswith("-H") and len(word) > 2:
            return word[2:].removeprefix("=")
        if name == "-H" or (name.startswith("--ho") and "--hostfile".startswith(name)):
            return value if equals else options[number + 1] if number + 1 < len(options) else None
    return None


def _ancestors() -> list[tuple[list[str], str]]:
    """(command line, working folder) of the processes above this one, as far as they may be seen."""
    import psutil  # DeepSpeed needs it, so it is there

    found = []
    for process in psutil.Process().parents():
        try:
            found.append((process.cmdline(), process.cwd()))
        except psutil.Error:
            continue
    return found


def remote_line(name: str, words: Sequence[str], ssh_port: int | None = None, root: Path = ROOT) -> list[str]:
    """The command line that runs `words` on a host over ssh, in the project's folder there, with nobody to answer questions."""
    at = ["-p", str(ssh_port)] if ssh_port else []
    remote = shlex.join(["cd", str(root)]) + " && exec " + shlex.join(words)
    return ["ssh", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={_CONNECT_S}", *at, name, remote]


def run_on(
    host: Host,
    words: Sequence[str],
    *,
    text="",
    ssh_port: int | None = None,
    root=ROOT,
    timeout_s: float = _PROBE_S,
    good=(0,),
) -> str:
    """What `words` print on the host, given `text` on standard input. good: exit statuses that are no failure.

    Raises UserError with the sentence that says why there is no answer.
    """
    name = host.name
    try:
        done = subprocess.run(
            remote_line(name, words, ssh_port, root), input=text, capture_output=True, text=True, timeout=timeout_s
        )
    except FileNotFoundError:
        raise UserError(
            "there is no ssh on this machine: install openssh-client, or start every host by hand with launch/no_ssh.sh"
        ) from None
    except subprocess.TimeoutExpired:
        raise UserError(f"{name} did not answer over ssh within {timeout_s:g} s: try `ssh {name} true`") from None
    if done.returncode in good:
        return done.stdout
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    if done.returncode == 255:
        raise UserError(_ssh_refusal(name, done.stderr, last))
    if done.returncode in (1, 2) and "cd:" in done.stderr:
        raise UserError(f"{name} has no folder {root}: put the project at the same path on every host")
    if done.returncode in (126, 127):
        raise UserError(
            f"{name} has no python at {words[0]}: install the project at the same path on every host (bash launch/setup.sh)"
        )
    raise UserError(f"{name} could not be examined with {words[0]} ({last}): install the project there as here")


def last_json(name: str, told: str) -> dict:
    """The last line that the host printed, as JSON. Raises UserError when it is something else."""
    try:
        return json.loads(told.splitlines()[-1])
    except (ValueError, IndexError):
        raise UserError(
            f"{name} prints text of its own when ssh runs a command there: keep its shell start-up files silent"
        ) from None


def _probe(host: Host, port: int, ssh_port: int | None, root: Path) -> dict | str:
    """The host's answer, or the sentence that says why there is none."""
    source = Path(probe.__file__).read_text(encoding="utf-8")
    try:
        return last_json(
            host.name,
            run_on(host, [sys.executable, "-", str(root), str(port)], text=source, ssh_port=ssh_port, root=root),
        )
    except UserError as error:
        return str(error)


def _ssh_refusal(name: str, text: str, last: str) -> str:
    """What ssh's own failure means."""
    lower = text.lower()
    if "could not resolve" in lower or "name or service not known" in lower:
        return f"the host {name} is unknown: correct its name in the hostfile or add it to DNS or /etc/hosts"
    if "permission denied" in lower:
        return f"{name} refuses this user's ssh key: add it there with `ssh-copy-id {name}`, so that ssh asks for no password"
    if "host key" in lower:
        return f"the host key of {name} is not known or has changed ({last}): run `ssh {name} true` once and accept it"
    if "refused" in lower:
        return f"{name} has no ssh server at this port ({last}): start sshd there, or name its port with --ssh_port"
    return f"{name} cannot be reached over ssh ({last}): check that it is up, and the network and firewall between"


def _differences(host: Host, answer: dict, here: dict, root: Path) -> list[str]:
    told = []
    files = _unlike(answer["code"], here["code"])
    if files:
        names = ", ".join(files[:3]) + (f" and {len(files) - 3} more" if len(files) > 3 else "")
        told.append(
            f"{host.name} has other code than this machine in {root} ({names}): copy the same files to every host"
        )
    for name in _unlike(answer["versions"], here["versions"]):
        told.append(
            f"{host.name} has {name} {answer['versions'].get(name)}, this machine has {here['versions'].get(name)}: install the same on every host"
        )
    return told


def _unlike(one: dict, other: dict) -> list[str]:
    return sorted(key for key in one.keys() | other.keys() if one.get(key) != other.get(key))


def _too_many(host: Host, answer: dict, with_gpus: bool) -> list[str]:
    """GPUs are counted. On CPUs more ranks than cores are only slow, but ranks that do not fit in memory bring the host down."""
    if with_gpus:
        if host.slots > answer["gpus"]:
            return [
                f"{host.name} has {answer['gpus']} GPUs but slots={host.slots}: set slots to {answer['gpus'] or 'what it has, or take it out'}"
            ]
        return []
    fit = max(1, answer["memory_bytes"] // RANK_MEMORY_BYTES)
    if host.slots > fit:
        gigabytes = answer["memory_bytes"] / 1e9
        return [
            f"{host.name} has {gigabytes:.1f} GB of memory, too little for slots={host.slots}: set slots to {fit} or fewer"
        ]
    return []
