"""Measures the seconds from the death of a host to the next finished step on the other one, which no test asserts.

    python -m tests.runs.recovery --rounds 5

Two hosts of this machine (tests/runs/network.py, needs root) train a tiny model under launch/supervise.py, executed as
a user does. All processes of host-b are killed at a random step. Prints a JSON line per round, and the medians.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.runs.job import Place, begin, command, logged, make_place, until
from tests.runs.network import Network, two_hosts

CONFIG = {"horizon": {"steps": 5000}, "evaluate": {"every": 0, "prompts": []}, "checkpoint": {"every": 2}}


def measure(place: Place, network: Network, step: int) -> dict:
    """Returns the seconds from the kill to the next finished step, and what the job itself measured."""
    program = command(place, "left", config=CONFIG)[1:]
    line = [sys.executable, "launch/supervise.py", "--hosts", "1:2", "--meet", "host-a:29400", *program]
    run = place.runs / "left"
    jobs: list[subprocess.Popen] = []
    with contextlib.ExitStack() as stack:
        for host in network.pids:
            jobs.append(begin(network.at(host, line)))
            stack.callback(jobs[-1].communicate)
            stack.callback(os.killpg, jobs[-1].pid, signal.SIGKILL)
        until(lambda: any(values["step"] >= step for values in logged(run)), "a step")
        stack.enter_context(open(f"/proc/{network.pids['host-b']}/ns/net"))  # its end of the cable stays
        killed = time.time()
        os.kill(network.pids["host-b"], signal.SIGKILL)
        until(lambda: any("recovery/total_s" in values for values in logged(run)), "a step after the restart")
        lines = logged(run)
    position = next(index for index, values in enumerate(lines) if "recovery/total_s" in values)
    phases = {key: value for key, value in lines[position].items() if key.startswith("recovery/")}
    return {"kill_to_step_s": lines[position]["time"] - killed, "step": step, "load": os.getloadavg()[0]} | phases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    random.seed(arguments.seed)
    rounds = []
    for _ in range(arguments.rounds):
        with tempfile.TemporaryDirectory() as folder, two_hosts(Path(folder)) as network:
            (Path(folder) / "inputs").mkdir()
            rounds.append(measure(make_place(Path(folder) / "inputs"), network, random.randint(4, 60)))
            print(json.dumps(rounds[-1]), flush=True)
    keys = [key for key in rounds[0] if key.endswith("_s")]
    print(json.dumps({"median": {key: statistics.median(values[key] for values in rounds) for key in keys}}))


if __name__ == "__main__":
    main()
