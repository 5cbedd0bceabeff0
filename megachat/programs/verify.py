"""The program behind tools/verify.py, from the command line to the exit status.

Compares layouts with one process on this machine's CPU, in two steps in float32: losses, every gradient, and every
weight after updates from equal gradients. With --resume, compares a run that is saved, ended, loaded and continued with
one that never stopped: losses, documents, weights, optimizers' state and counters. Exit status: 0 equal, 1 different, 2
could not be compared.
"""

import argparse
import contextlib
import json
import tempfile
from pathlib import Path

from megachat.config import Config, load_config
from megachat.data.tokenizer import METADATA_FILE, load_tokenizer
from megachat.errors import UserError
from megachat.files import write_atomically

DEFAULT_VOCABULARY = 4096


def _run_rank(*arguments) -> None:
    import torch

    from megachat.job.join import end_collectives
    from megachat.programs.verify_layout import run_rank

    config, vocab_size, folder, reference = arguments
    run_rank(config, vocab_size, torch.device("cpu"), folder, reference)
    end_collectives()


def run_ranks(config: Config, world: int, vocab_size: int, folder: Path, reference: Path | None) -> None:
    """Runs `verify_layout.run_rank` on `world` new processes. Raises UserError naming the first rank that failed."""
    from megachat.job.local_ranks import run_local_ranks

    folder.mkdir()
    preload = ["megachat.programs.verify_layout"]
    run_local_ranks(_run_rank, world, config, vocab_size, folder, reference, preload=preload)


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
    # after the command line: these import torch and DeepSpeed, which takes seconds
    import torch

    from megachat.job.launch import describe_environment
    from megachat.job.local_ranks import parse_layout
    from megachat.programs.verify_layout import verify_layout
    from megachat.programs.verify_resume import verify_resumes

    config = load_config(arguments.config, arguments.set)
    layouts = [parse_layout(text) for text in arguments.layout or ["dp=1"]]
    targets = [parse_layout(text) for text in arguments.onto]
    vocab_size = config.model.vocab_size
    if vocab_size is None:
        exists = (Path(config.data.tokenizer) / METADATA_FILE).exists()
        vocab_size = load_tokenizer(config.data.tokenizer).vocab_size if exists else DEFAULT_VOCABULARY
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
