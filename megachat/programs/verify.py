"""The program behind tools/verify.py, from the command line to the exit status.

Compares layouts with one process on this machine's CPU, in float32: loss, every gradient and every weight after two
steps. With --resume, compares a run that is saved, ended, loaded and continued with one that never stopped: losses,
documents, weights, optimizers' state and counters. Exit status: 0 equal, 1 different, 2 could not be compared.
"""

import argparse
import contextlib
import json
import multiprocessing
import re
import tempfile
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from megachat.config import Config, load_config
from megachat.data.tokenizer import load_tokenizer
from megachat.errors import UserError
from megachat.files import write_atomically
from megachat.job.launch import become_rank, describe_environment, free_port

DEFAULT_VOCABULARY = 4096
AXES = {"dp": "data", "tp": "tensor", "pp": "pipeline"}


def parse_layout(text: str) -> dict[str, int]:
    """Returns "tp=2,pp=2" as {"data": 1, "tensor": 2, "pipeline": 2}. Raises UserError."""
    sizes = {"data": 1, "tensor": 1, "pipeline": 1}
    for part in text.split(","):
        match = re.fullmatch(r"\s*(dp|tp|pp)\s*=\s*([1-9]\d*)\s*", part)
        if not match:
            raise UserError(f"--layout {text}: {part!r} is not an axis and its size; give them as tp=2,pp=2,dp=2")
        sizes[AXES[match[1]]] = int(match[2])
    return sizes


def _rank_process(rank: int, world: int, port: int, config: Config, vocab_size: int, folder: Path, status) -> None:
    """Runs in each rank's process; sends None or an error's text through `status`."""
    become_rank(rank, world, port)
    import torch

    from megachat.job.join import end_collectives
    from megachat.programs.verify_layout import run_rank

    torch.set_num_threads(1)  # the same on every layout, because threads change the order of sums
    try:
        run_rank(config, vocab_size, torch.device("cpu"), folder)
        end_collectives()
        status.send(None)
    except BaseException as error:
        status.send(f"{type(error).__name__}: {error}")


def run_ranks(config: Config, world: int, vocab_size: int, folder: Path) -> None:
    """Runs `verify_layout.run_rank` on `world` new processes. Raises UserError naming the first rank that failed."""
    folder.mkdir()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["megachat.programs.verify_layout"])
    port, processes = free_port(), []
    waiting: dict[Any, int] = {}  # the connection on which a rank reports -> the rank
    for rank in range(world):
        receiver, sender = context.Pipe(duplex=False)
        arguments = (rank, world, port, config, vocab_size, folder, sender)
        processes.append(context.Process(target=_rank_process, args=arguments, daemon=True))
        processes[-1].start()
        sender.close()
        waiting[receiver] = rank
    ready: Any
    try:
        while waiting:
            for ready in wait(list(waiting)):
                rank = waiting.pop(ready)
                try:
                    problem = ready.recv()
                except EOFError:
                    problem = "the process died"
                if problem:
                    raise UserError(f"rank {rank} of {world} failed: {problem}")
    finally:
        for process in processes:
            process.kill()


def parse_arguments() -> argparse.Namespace:
    """Parses the command line; ends the program if it is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--config", required=True, help="JSON file with what differs from the defaults")
    add(
        "--layout",
        action="append",
        default=[],
        help="axes and sizes, for example tp=2,pp=2,dp=2; repeatable; with --resume one process by default",
    )
    add("--resume", action="store_true", help="compare stopping, saving, loading and continuing with not stopping")
    add(
        "--onto",
        metavar="LAYOUT",
        action="append",
        default=[],
        help="with --resume: continue on this layout instead, in float32; repeatable",
    )
    add("--keep", type=Path, metavar="FOLDER", help="with --resume: new folder in which the runs are kept")
    add("--depth", type=int, help="scale the model down to this depth")
    add("--rows", type=int, default=4, help="rows per data-parallel rank and step (default 4)")
    add("--set", metavar="SECTION.KEY=VALUE", action="append", default=[], help="override a setting; repeatable")
    add("--out", type=Path, default=Path("verify.json"), help="the certificate (default verify.json)")
    arguments = parser.parse_args()
    if arguments.rows < 1 or (arguments.depth is not None and arguments.depth < 1):
        parser.error("--rows and --depth must be 1 or more")
    if not arguments.resume and (arguments.onto or arguments.keep):
        parser.error("--onto and --keep require --resume")
    if not arguments.resume and not arguments.layout:
        parser.error("give a --layout to compare with one process")
    if arguments.keep and arguments.keep.exists():
        raise UserError(f"--keep {arguments.keep} exists: name a folder that does not")
    return arguments


def main() -> int:
    """Verifies every layout, writes the certificate and returns the exit status."""
    arguments = parse_arguments()
    config = load_config(arguments.config, arguments.set)
    layouts = [parse_layout(text) for text in arguments.layout or ["dp=1"]]
    targets = [parse_layout(text) for text in arguments.onto]
    vocab_size = config.model.vocab_size
    if vocab_size is None:
        exists = (Path(config.data.tokenizer) / "tokenizer.json").exists()
        vocab_size = load_tokenizer(config.data.tokenizer).vocab_size if exists else DEFAULT_VOCABULARY
    import torch

    from megachat.programs.verify_layout import verify_layout  # imports DeepSpeed, which takes seconds: after parsing
    from megachat.programs.verify_resume import verify_resumes

    sizes = {"depth": arguments.depth, "rows": arguments.rows}
    certificates = []
    with contextlib.ExitStack() as stack:
        parent = arguments.keep or stack.enter_context(tempfile.TemporaryDirectory(prefix="verify-"))
        for number, layout in enumerate(layouts):
            folder = Path(parent) / str(number)
            folder.mkdir(parents=True)
            if arguments.resume:
                certificates += verify_resumes(config, layout, targets, vocab_size, folder, **sizes)
            else:
                certificates.append(verify_layout(config, layout, vocab_size, folder, run_ranks, **sizes))
    passed = all(entry["passed"] for entry in certificates)
    kind = "resumes" if arguments.resume else "layouts"
    document = {"passed": passed, "environment": describe_environment(torch.device("cpu")), kind: certificates}
    write_atomically(arguments.out, (json.dumps(document, indent=1) + "\n").encode())
    print(f"certificate: {arguments.out}")
    return 0 if passed else 1
