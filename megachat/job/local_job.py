"""Starts a job on this machine under the deepspeed launcher, for programs that are not started by one themselves."""

import os
import shutil
import signal
import subprocess
from collections.abc import Mapping
from types import FrameType

from megachat.job.launch import free_port
from megachat.job.launcher_process import launcher_line
from megachat.job.links import secret_for_ranks

_STOPPED_LAUNCHER = 1  # deepspeed's status after a signal, whatever that of its ranks is


def run_with_deepspeed(arguments: list[str], ranks: int | None = None) -> int:
    """Runs `megachat ARGUMENTS` on ranks of this machine and returns the launcher's exit status.

    ranks: default all GPUs, 2 without GPUs. Rank 0 listens on MASTER_PORT if that is set, else on a free port.
    """
    environment = os.environ | secret_for_ranks()
    if not shutil.which("nvidia-smi"):
        ranks = ranks or 2
        environment["DS_ACCELERATOR"] = "cpu"  # otherwise the launcher searches for an accelerator and warns
    count = ["--num_accelerators", str(ranks)] if ranks else []
    port = os.environ.get("MASTER_PORT") or str(free_port())
    launcher = [*launcher_line("deepspeed"), "--quiet", *count, "--master_port", port]
    return run_launcher([*launcher, "--module", "megachat", *arguments], environment)


def run_launcher(line: list[str], environment: Mapping[str, str] | None = None) -> int:
    """Runs a launcher and returns its exit status, after a signal that of the signal: 130 or 143. Ctrl-C and SIGTERM
    are left to it: its ranks save first.
    """
    process, stops = subprocess.Popen(line, env=environment), list[int]()

    def pass_on(number: int, frame: FrameType | None) -> None:
        stops.append(number)
        process.send_signal(number)

    # The terminal sends Ctrl-C to the launcher, too, which ends after the ranks have saved.
    before = signal.signal(signal.SIGINT, lambda number, frame: stops.append(number))
    signal.signal(signal.SIGTERM, pass_on)
    try:
        status = process.wait()
    finally:
        signal.signal(signal.SIGINT, before)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if stops and status == _STOPPED_LAUNCHER:
        return 128 + stops[0]
    return 128 - status if status < 0 else status
