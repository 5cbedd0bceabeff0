"""Starts a job on this machine under the deepspeed launcher, for programs that are not started by one themselves."""

import os
import shutil
import signal
import subprocess
import sys

from megachat.job.launch import free_port
from megachat.job.links import secret_for_ranks


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
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--quiet", *count, "--master_port", port]
    process = subprocess.Popen([*launcher, "--module", "megachat", *arguments], env=environment)
    # The terminal sends Ctrl-C to the launcher, too, which ends after the ranks have saved.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: process.send_signal(number))
    try:
        status = process.wait()
    finally:
        signal.signal(signal.SIGINT, before)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    return 128 - status if status < 0 else status
