"""Several gloo processes on this machine running one function: how every test with more than one rank is written.

Ranks are forked from a server process that has torch and DeepSpeed loaded, because importing them takes seconds and
forking does not.
"""

import faulthandler
import multiprocessing
import os
import pickle
import signal
import tempfile
import threading
import time
import traceback
from multiprocessing.connection import wait
from pathlib import Path

from megachat.job.launch import free_port
from tests.limits import limit_s

PRELOADED = [
    "numpy",
    "pytest",
    "torch",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "megachat.programs.pretrain",
    "megachat.checkpoint.storage",
    "torch._dynamo",
    "megachat.programs.evaluate",
    "megachat.programs.verify_layout",
    "setuptools",  # this and the next two: imported when an engine is built
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.ops.op_builder.all_ops",
    "tests.frozen",  # the last
]
_SHOW_STACK = signal.SIGUSR2  # has a rank write its stack, wherever it is
_GRACE_SEC = 1.0  # after the first failure: the others' own failures are worth reading


class RankError(RuntimeError):
    """A rank raised, died, or did not answer in time; the message holds the rank and its traceback."""


def warm_context():
    """Returns the multiprocessing context whose processes are forked from a server that has everything imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def run_ranks(function, world: int, *args, timeout_s: float | None = None) -> list:
    """Call `function(*args)` in `world` new processes and return what each returned, in rank order.

    function: importable by name (defined at the top level of a module). In every process torch.distributed runs on
    gloo, torch uses one thread, and RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_SIZE, MASTER_ADDR and MASTER_PORT are set.
    Arguments and results are pickled. Raises RankError, after ending every process, when a rank raises, dies, or does
    not answer within timeout_s (default: what a hang takes).
    """
    context, timeout_s = warm_context(), timeout_s or limit_s()
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        port = free_port()
        processes, pipes = [], []
        for rank in range(world):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(
                target=_rank, args=(sender, folder, rank, world, port, function, args), daemon=True
            )
            process.start()
            sender.close()
            processes.append(process)
            pipes.append(receiver)
        try:
            return _collect(pipes, processes, time.monotonic() + timeout_s, Path(folder))
        finally:
            for process in processes:
                process.kill()
            for process in processes:
                process.join()


def end_with_the_tests() -> None:
    """Have this forked rank killed when the process that asked for it is gone, however that ended: nobody else would
    end it.
    """

    def watch() -> None:
        wait([multiprocessing.parent_process().sentinel])
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def _rank(sender, folder: str, rank: int, world: int, port: int, function, args) -> None:
    end_with_the_tests()
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_SIZE=str(world))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    import torch
    import torch.distributed as dist

    try:
        with open(Path(folder, f"stack{rank}"), "w") as stack:
            faulthandler.register(_SHOW_STACK, file=stack)
            torch.set_num_threads(1)
            dist.init_process_group(
                "gloo", store=dist.FileStore(str(Path(folder, "store")), world), rank=rank, world_size=world
            )
            result = function(*args)
            answer = pickle.dumps(
                (True, result)
            )  # plain pickle: tensors by value, because this process ends before they are read
            dist.barrier()  # nobody leaves while another still talks to it
            faulthandler.unregister(_SHOW_STACK)
        sender.send_bytes(answer)
        dist.destroy_process_group()
    except BaseException:
        sender.send_bytes(pickle.dumps((False, traceback.format_exc())))


def _collect(pipes: list, processes: list, deadline: float, folder: Path) -> list:
    waiting, results, failures = dict(zip(pipes, range(len(pipes)), strict=True)), {}, {}
    while waiting and (ready := wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))):
        for pipe in ready:
            rank = waiting.pop(pipe)
            try:
                good, value = pickle.loads(pipe.recv_bytes())
            except EOFError:
                good, value = False, "the process died\n"
            (results if good else failures)[rank] = value
        if failures:
            deadline = min(deadline, time.monotonic() + _GRACE_SEC)
    if failures:
        raise RankError("\n".join(f"rank {rank} of {len(pipes)}:\n{text}" for rank, text in failures.items()))
    if waiting:
        stacks = "".join(
            f"\nrank {rank}:\n{_stack(processes[rank], folder / f'stack{rank}')}" for rank in sorted(waiting.values())
        )
        raise RankError(
            f"no answer from ranks {sorted(waiting.values())} of {len(pipes)} in time; where they were:{stacks}"
        )
    return [results[rank] for rank in range(len(pipes))]


def _stack(process, path: Path) -> str:
    """Where a process is that answers nobody."""
    if not path.exists():
        return "(not started)"
    os.kill(process.pid, _SHOW_STACK)
    deadline = time.monotonic() + limit_s(1)
    while "in <module>" not in path.read_text() and time.monotonic() < deadline:  # the end of the main thread, the last
        time.sleep(0.01)
    return path.read_text()
