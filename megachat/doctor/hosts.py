"""Compares the hosts of a hostfile: what differs, how fast they multiply, and how fast they communicate."""

import json
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from megachat.errors import UserError
from megachat.job.hosts import Host, run_on_host, ssh_command
from megachat.text import text_table

SLOW_RATE = 0.9  # of the median
_EXAMINE_S, _MEASURE_S = 180, 300
_HEALTHY_OR_NOT = (0, 1)  # exit statuses of the doctor
_COMPARED = ("code", "python", "driver", "cuda", "cudnn", "nccl", "nvcc", "mpirun", "compiler")


def examine_hosts(hosts: Sequence[Host], options: Sequence[str], *, port: int, ssh_port: int | None) -> dict:
    """Runs the doctor and megachat/doctor/rank.py on every host and returns what they report.

    "hosts": host -> its report; "mistakes": why a host has no report or was not measured;
    "unlike": fact -> host -> value, where hosts differ; "matrix": host -> FLOPs per second of each device;
    "pairs": "a b" -> bytes per second from a to b; "slow": the devices and pairs below SLOW_RATE times their median.
    """

    def examine_host(host: Host) -> dict | str:
        line = [sys.executable, "-m", "megachat", "doctor", "--json", *options]
        try:
            return run_on_host(host.name, line, ssh_port=ssh_port, timeout_s=_EXAMINE_S, accepted=_HEALTHY_OR_NOT)
        except UserError as error:
            return str(error)

    with ThreadPoolExecutor(min(64, len(hosts))) as pool:
        answers = dict(zip((host.name for host in hosts), pool.map(examine_host, hosts), strict=True))
    reports = {name: answer for name, answer in answers.items() if isinstance(answer, dict)}
    mistakes = [answer for answer in answers.values() if isinstance(answer, str)]
    matrix: dict[str, list[float]] = {}
    pairs: dict[str, float] = {}
    if reports:
        names = list(reports)
        try:
            ranks = _measure_hosts(names, port, ssh_port)
        except UserError as error:
            mistakes.append(str(error))
        else:
            matrix = {name: rank["matrix"] for name, rank in zip(names, ranks, strict=True)}
            by_rank = {pair: rate for rank in ranks for pair, rate in rank["pairs"].items()}
            pairs = {
                " ".join(names[int(rank)] for rank in pair.split()): rate for pair, rate in sorted(by_rank.items())
            }
    devices = {f"{name} device {index}": rate for name, rates in matrix.items() for index, rate in enumerate(rates)}
    return {
        "hosts": reports,
        "mistakes": mistakes,
        "matrix": matrix,
        "pairs": pairs,
        "unlike": differing_facts({name: comparable_facts(report["facts"]) for name, report in reports.items()}),
        "slow": {"matrix": slow_names(devices), "pairs": slow_names(pairs)},
    }


def slow_names(rates: Mapping[str, float]) -> list[str]:
    """Returns the names whose rate is below SLOW_RATE times the median of all."""
    median = statistics.median(rates.values()) if rates else 0.0
    return [name for name, rate in rates.items() if rate < SLOW_RATE * median]


def comparable_facts(facts: dict) -> dict[str, str]:
    """Returns the facts that should be the same on all hosts, as text."""
    gpus = " + ".join(f"{facts['gpus'].count(name)} x {name}" for name in dict.fromkeys(facts["gpus"])) or "none"
    return {"gpus": gpus} | facts["packages"] | {name: str(facts[name]) for name in _COMPARED if facts[name]}


def differing_facts(hosts: Mapping[str, Mapping[str, str]]) -> dict[str, dict[str, str]]:
    """Returns fact -> host -> value, for the facts that are not the same on all hosts."""
    names = dict.fromkeys(fact for facts in hosts.values() for fact in facts)
    values = {name: {host: facts.get(name, "none") for host, facts in hosts.items()} for name in names}
    return {name: by_host for name, by_host in values.items() if len(set(by_host.values())) > 1}


def _measure_hosts(names: Sequence[str], port: int, ssh_port: int | None) -> list[dict]:
    """Runs megachat/doctor/rank.py on every host and returns its results in the order of `names`. Raises UserError."""
    processes = []
    for rank, name in enumerate(names):
        variables: dict[str, object] = {"RANK": rank, "WORLD_SIZE": len(names), "LOCAL_RANK": 0, "LOCAL_SIZE": 1}
        variables |= {"MASTER_ADDR": names[0], "MASTER_PORT": port}
        settings = [f"{key}={value}" for key, value in variables.items()]
        line = ssh_command(name, ["env", *settings, sys.executable, "megachat/doctor/rank.py"], ssh_port)
        pipe = subprocess.PIPE
        processes.append(subprocess.Popen(line, stdout=pipe, stderr=pipe, stdin=subprocess.DEVNULL, text=True))
    mistakes, outputs = [], []
    for name, process in zip(names, processes, strict=True):
        try:
            output, errors = process.communicate(timeout=_MEASURE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            output, errors = process.communicate()
            errors += f"no answer within {_MEASURE_S} s"
        outputs.append(output)
        if process.returncode:
            lines = errors.strip().splitlines() or ["no message"]
            reason = next((line for line in lines if line.startswith("error:")), lines[-1]).removeprefix("error: ")
            mistakes.append(f"{name} could not be measured: {reason}")
    if mistakes:
        raise UserError("\n".join(mistakes))
    return json.loads(outputs[0].splitlines()[-1])


def describe_hosts(examination: dict, slots: Mapping[str, int]) -> str:
    """Returns the report as text: a table of the hosts, then what differs, is slow or wrong."""
    pairs, reports, slow = examination["pairs"], examination["hosts"], examination["slow"]
    rows = [("host", "slots", "cores", "memory", "gpus", "matrix TFLOP/s", "slowest to", "GB/s", "traps")]
    for name, report in reports.items():
        facts, rates = report["facts"], examination["matrix"].get(name, [])
        products = [_rate(rate / 1e12, f"{name} device {n}" in slow["matrix"]) for n, rate in enumerate(rates)]
        pair = min((pair for pair in pairs if pair.split()[0] == name), key=pairs.__getitem__, default="- -")
        memory, gpus = f"{facts['memory_bytes'] / 1e9:.0f} GB", comparable_facts(facts)["gpus"]
        cells = (name, str(slots[name]), str(facts["cores"]), memory, gpus, " ".join(products) or "-")
        names_of_traps = ", ".join(trap["name"] for trap in report["traps"]) or "none"
        rows.append((*cells, pair.split()[1], _pair_rate(examination, pair), names_of_traps))
    lines = [*text_table(rows), f"(* below {SLOW_RATE} of the median of all)"]
    if len(reports) > 1:
        facts = comparable_facts(next(iter(reports.values()))["facts"])
        same = [f"{name} {value}" for name, value in facts.items() if name not in examination["unlike"]]
        lines += ["", "the same on all: " + ", ".join(same)]
    for fact, by_host in examination["unlike"].items():
        lines.append(f"differs: {fact}: " + ", ".join(f"{host} {value}" for host, value in by_host.items()))
    if len(pairs) > 2:
        grid = [("", *reports)]
        grid += [(sender, *(_pair_rate(examination, f"{sender} {name}") for name in reports)) for sender in reports]
        lines += ["", "GB/s from row to column", *text_table(grid)]
    for name, report in reports.items():
        for trap in report["traps"]:
            lines += [f"trap on {name}: {trap['name']}: {trap['what']}", f"    repair there: {trap['repair']}"]
    lines += [f"slow: {name}" for kind in ("matrix", "pairs") for name in slow[kind]]
    lines += [f"mistake: {line}" for mistake in examination["mistakes"] for line in mistake.splitlines()]
    good = "all hosts are healthy and alike"
    return "\n".join([*lines, good if is_healthy(examination) else "there are problems: see the lines above"])


def is_healthy(examination: dict) -> bool:
    """Returns True if there is no problem on any host or between them."""
    traps = any(report["traps"] for report in examination["hosts"].values())
    return not (examination["mistakes"] or examination["unlike"] or any(examination["slow"].values()) or traps)


def _rate(value: float, slow: bool) -> str:
    return f"{value:.3g}" + "*" * slow


def _pair_rate(examination: dict, pair: str) -> str:
    rate = examination["pairs"].get(pair)
    return "-" if rate is None else _rate(rate / 1e9, pair in examination["slow"]["pairs"])
