"""Ranks that a tool starts on this machine, and what the programs have in common that it starts."""

import argparse
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from megachat.errors import UserError, summary
from megachat.job.launch import become_rank, free_port
from megachat.job.links import secret_for_ranks


def run_local_ranks(function: Callable, world: int, *arguments, preload: list[str]) -> list:
    """Calls `function(*arguments)` in `world` new processes with their launch variables and one thread each; returns
    the results in the order of ranks.

    function: importable by name; arguments and results are pickled. preload: modules that are imported once for all.
    Raises UserError naming the first rank that failed, after ending all of them.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(preload)
    port, processes, results = free_port(), [], {}
    waiting: dict[Any, int] = {}  # the connection on which a rank reports -> the rank
    for rank in range(world):
        receiver, sender = context.Pipe(duplex=False)
        given = (rank, world, port, sender, function, arguments)
        processes.append(context.Process(target=_rank_process, args=given, daemon=True))
        processes[-1].start()
        sender.close()
        waiting[receiver] = rank
    ready: Any
    try:
        while waiting:
            for ready in wait(list(waiting)):
                rank = waiting.pop(ready)
                try:
                    problem, results[rank] = ready.recv()
                except EOFError:
                    problem = "the process died"
                if problem:
                    raise UserError(f"rank {rank} of {world} failed: {problem}")
    finally:
        for process in processes:
            process.kill()
    return [results[rank] for rank in range(world)]


def _rank_process(rank: int, world: int, port: int, sender: Connection, function: Callable, arguments: tuple) -> None:
    """Runs in each rank's process; sends (problem, result)."""
    become_rank(rank, world, port)
    torch.set_num_threads(1)  # the same on every layout, because threads change the order of sums
    try:
        sender.send((None, function(*arguments)))
    except BaseException as error:
        sender.send((summary(error), None))


def run_with_torchrun(what: str, ranks: int, program: list[str]) -> str:
    """Runs a program on `ranks` ranks of this machine and returns what they print.

    Raises UserError, "`what` failed: " and the first error that was printed.
    """
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}"]
    line = [*launcher, f"--master-port={free_port()}", *program]
    done = subprocess.run(line, capture_output=True, text=True, env=os.environ | secret_for_ranks())
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
