"""Ranks that a tool starts on this machine, and what the programs have in common that it starts there."""

import argparse
import subprocess
import sys

import torch

from megachat.errors import UserError
from megachat.job.launch import free_port


def run_with_torchrun(what: str, ranks: int, program: list[str]) -> str:
    """Runs a program on `ranks` ranks of this machine and returns what they print.

    Raises UserError, "`what` failed: " and the first error that was printed.
    """
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}"]
    line = [*launcher, f"--master-port={free_port()}", *program]
    done = subprocess.run(line, capture_output=True, text=True)
    if done.returncode:
        errors = [text for text in done.stderr.splitlines() if text.startswith("error:")]
        last = (done.stderr or done.stdout).strip().splitlines()[-1:]
        raise UserError(f"{what} failed: {''.join((errors or last)[:1]).removeprefix('error: ')}")
    return done.stdout


def set_options(settings: list[str]) -> list[str]:
    """Returns the settings, each with its --set before it."""
    return [word for setting in settings for word in ("--set", setting)]


def rank_parser(description: str) -> argparse.ArgumentParser:
    """Returns the parser of a program that tools/bench.py starts on each rank, with the arguments of all of them."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--config", required=True)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--vocab-size", type=int, required=True)
    parser.add_argument("--rounds", type=int, required=True)
    return parser


def require_ranks(kind: str) -> None:
    """Raises UserError in a program that was not started as one of several ranks. kind: of tools/bench.py."""
    if not torch.distributed.is_torchelastic_launched():
        raise UserError(f"start it through tools/bench.py {kind}")
