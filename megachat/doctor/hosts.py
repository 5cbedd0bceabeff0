"""tools/doctor.py over the hosts of a hostfile: what is unlike, and how fast they multiply and talk to each other."""

import json
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from megachat.errors import UserError
from megachat.job.hosts import Host, last_json, remote_line, run_on
from megachat.text import text_table

SLOW = 0.9  # of the median
_EXAMINE_S, _MEASURE_S = 180, 300
_HEALTHY_OR_NOT = (0, 1)  # exit statuses of tools/doctor.py


def examine(hosts: Sequence[Host], options: Sequence[str], *, port: int, ssh_port: int | None) -> dict:
    """Every host's own report by name; "mistakes": of those that gave none; "unlike": fact -> host -> value, where hosts differ; "matrix":
    host -> FLOPs a second of each device; "pairs": "a b" -> bytes a second from a to b; "slow": what is below SLOW of its median."""

    def ask(host: Host) -> dict | str:
        line = [sys.executable, "tools/doctor.py", "--json", *options]
        try:
            return last_json(
                host.name, run_on(host, line, ssh_port=ssh_port, timeout_s=_EXAMINE_S, good=_HEALTHY_OR_NOT)
            )
        except UserError as error:
            return str(error)

    with ThreadPoolExecutor(min(64, len(hosts))) as pool:
        answers = dict(zip((host.name for host in hosts), pool.map(ask, hosts), strict=True))
    reports = {name: answer for name, answer in answers.items() if isinstance(answer, dict)}
    found = {
        "hosts": reports,
        "mistakes": [answer for answer in answers.values() if isinstance(answer, str)],
        "matrix": {},
        "pairs": {},
    }
    found["unlike"] = unlike({name: shown_facts(report["facts"]) for name, report in reports.items()})
    if reports:
        try:
            told = _measured(list(reports), port, ssh_port)
        except UserError as error:
            found["mistakes"].append(str(error))
        else:
            found["matrix"] = {name: rank["matrix"] for name, rank in zip(reports, told, strict=True)}
            names = list(reports)
            pairs = {pair: rate for rank in told for pair, rate in rank["pairs"].items()}
            found["pairs"] = {
                " ".join(names[int(place)] for place in pair.split()): rate for pair, rate in sorted(pairs.items())
            }
    devices = {
        f"{name} device {index}": rate for name, rates in found["matrix"].items() for index, rate in enumerate(rates)
    }
    found["slow"] = {"matrix": slow(devices), "pairs": slow(found["pairs"])}
    return found


def slow(rates: Mapping[str, float]) -> list[str]:
    """Names of those below SLOW of the median of all."""
    middle = statistics.median(rates.values()) if rates else 0.0
    return [name for name, rate in rates.items() if rate < SLOW * middle]


def shown_facts(facts: dict) -> dict[str, str]:
    """The facts on which hosts should agree, as text by name."""
    names = ("code", "python", "driver", "cuda", "cudnn", "nccl", "nvcc", "mpirun", "compiler")
    gpus = " + ".join(f"{facts['gpus'].count(name)} x {name}" for name in dict.fromkeys(facts["gpus"])) or "none"
    return {"gpus": gpus} | facts["packages"] | {name: str(facts[name]) for name in names if facts[name]}


def unlike(hosts: Mapping[str, Mapping[str, str]]) -> dict[str, dict[str, str]]:
    """Fact -> host -> value, of the facts that not all hosts have alike."""
    names = dict.fromkeys(fact for facts in hosts.values() for fact in facts)
    values = {name: {host: facts.get(name, "none") for host, facts in hosts.items()} for name in names}
    return {name: by_host for name, by_host in values.items() if len(set(by_host.values())) > 1}


def _measured(names: Sequence[str], port: int, ssh_port: int | None) -> list[dict]:
    """What every host's rank of megachat/doctor/rank.py tells, in their order. Raises UserError with the first complaint."""
    started = []
    for rank, name in enumerate(names):
        told = {
            "RANK": rank,
            "WORLD_SIZE": len(names),
            "LOCAL_RANK": 0,
            "LOCAL_SIZE": 1,
            "MASTER_ADDR": names[0],
            "MASTER_PORT": port,
        }
        line = ["env", *(f"{key}={value}" for key, value in told.items()), sys.executable, "megachat/doctor/rank.py"]
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "stdin": subprocess.DEVNULL}
        started.append(subprocess.Popen(remote_line(name, line, ssh_port), **streams))
    mistakes, first = [], ""
    for rank, (name, process) in enumerate(zip(names, started, strict=True)):
        try:
            out, err = process.communicate(timeout=_MEASURE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
            err += f"no answer within {_MEASURE_S} s"
        if process.returncode:
            lines = err.strip().splitlines() or ["no message"]
            mistakes.append(
                f"{name} could not be measured: {next((x for x in lines if x.startswith('error:')), lines[-1]).removeprefix('error: ')}"
            )
        first = out if rank == 0 else first
    if mistakes:
        raise UserError("\n".join(mistakes))
    return json.loads(first.splitlines()[-1])


def described(found: dict, slots: Mapping[str, int]) -> str:
    """The table of the hosts, then what is unlike and slow."""
    matrix, pairs, reports = found["matrix"], found["pairs"], found["hosts"]
    rows = [("host", "slots", "cores", "memory", "gpus", "matrix TFLOP/s", "slowest to", "GB/s", "traps")]
    for name, report in reports.items():
        rates = [
            _marked(f"{rate / 1e12:.3g}", f"{name} device {n}" in found["slow"]["matrix"])
            for n, rate in enumerate(matrix.get(name, []))
        ]
        pair, rate = min(
            ((pair, rate) for pair, rate in pairs.items() if pair.split()[0] == name),
            key=lambda item: item[1],
            default=("- -", None),
        )
        speed = "-" if rate is None else _marked(f"{rate / 1e9:.3g}", pair in found["slow"]["pairs"])
        memory, traps = (
            f"{report['facts']['memory_bytes'] / 1e9:.0f} GB",
            ", ".join(trap["name"] for trap in report["traps"]) or "none",
        )
        gpus = shown_facts(report["facts"])["gpus"]
        rows.append(
            (
                name,
                str(slots[name]),
                str(report["facts"]["cores"]),
                memory,
                gpus,
                " ".join(rates) or "-",
                pair.split()[1],
                speed,
                traps,
            )
        )
    lines = [*text_table(rows), f"(* below {SLOW} of the median of all)"]
    same = next(iter(reports.values()), None)
    if same and len(reports) > 1:
        alike = [f"{name} {value}" for name, value in shown_facts(same["facts"]).items() if name not in found["unlike"]]
        lines += ["", "the same on all: " + ", ".join(alike)]
    lines += [
        f"unlike: {fact}: " + ", ".join(f"{host} {value}" for host, value in by_host.items())
        for fact, by_host in found["unlike"].items()
    ]
    if len(pairs) > 2:
        names = list(reports)
        lines += ["", "GB/s from row to column"]
        grid = [("", *names)]
        for one in names:
            cells = [(f"{one} {other}", pairs.get(f"{one} {other}")) for other in names]
            grid.append(
                (
                    one,
                    *(
                        "-" if rate is None else _marked(f"{rate / 1e9:.3g}", pair in found["slow"]["pairs"])
                        for pair, rate in cells
                    ),
                )
            )
        lines += text_table(grid)
    for name, report in reports.items():
        lines += [
            f"trap on {name}: {trap['name']}: {trap['what']}\n    repair there: {trap['repair']}"
            for trap in report["traps"]
        ]
    lines += [f"slow: {name}" for kind in ("matrix", "pairs") for name in found["slow"][kind]]
    lines += [f"mistake: {line}" for mistake in found["mistakes"] for line in mistake.splitlines()]
    return "\n".join(
        [
            *lines,
            "all hosts are healthy and alike"
            if is_healthy(found)
            else "this is not as it should be: see the lines above",
        ]
    )


def is_healthy(found: dict) -> bool:
    """Nothing was found on any host or between them."""
    return not (
        found["mistakes"]
        or found["unlike"]
        or any(found["slow"].values())
        or any(report["traps"] for report in found["hosts"].values())
    )


def _marked(text: str, marked: bool) -> str:
    return text + "*" * marked
