"""Does a layout compute what one process computes? `python tools/verify.py --config configs/d4_cpu.json --depth 2 --layout tp=2,pp=2,dp=2`

Starts one process and the layout's ranks on this machine's CPU, in float32, and compares loss, every gradient and every weight after two
steps. With --resume: does a run that is saved, ended, loaded and gone on with equal one that never stopped, in its losses, documents, weights,
optimizers' state and counters? Exit status: 0 equal, 1 different, 2 could not be compared.
"""

import argparse
import contextlib
import json
import multiprocessing
import re
import sys
import tempfile
from multiprocessing.connection import wait
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a clone that was not installed

from megachat.config import Config, load_config  # noqa: E402
from megachat.data.tokenizer import load_tokenizer  # noqa: E402
from megachat.errors import UserError, user_errors_end_the_program  # noqa: E402
from megachat.files import write_atomically  # noqa: E402
from megachat.job.launch import become_rank, describe_environment, free_port  # noqa: E402
from megachat.planning.plan import resolve  # noqa: E402

DEFAULT_VOCABULARY = 4096
_AXES = {"dp": "data", "tp": "tensor", "pp": "pipeline"}


def parse_layout(text: str) -> dict[str, int]:
    """ "tp=2,pp=2" to {"data": 1, "tensor": 2, "pipeline": 2}. Raises UserError."""
    sizes = {"data": 1, "tensor": 1, "pipeline": 1}
    for part in text.split(","):
        match = re.fullmatch(r"\s*(dp|tp|pp)\s*=\s*([1-9]\d*)\s*", part)
        if not match:
            raise UserError(f"--layout {text}: {part!r} is not an axis and its size; give them as tp=2,pp=2,dp=2")
        sizes[_AXES[match[1]]] = int(match[2])
    return sizes


def rank_program(rank: int, world: int, port: int, config: Config, vocab_size: int, folder: Path, status) -> None:
    """What each rank's process runs; sends None or an error's text through `status`."""
    become_rank(rank, world, port)
    import torch

    from megachat.job.join import end_collectives
    from megachat.programs.verify import observe

    torch.set_num_threads(1)  # as many on every layout: threads change the order of sums
    try:
        observe(config, vocab_size, torch.device("cpu"), folder)
        end_collectives()
        status.send(None)
    except BaseException as error:
        status.send(f"{type(error).__name__}: {error}")


def run(config: Config, world: int, vocab_size: int, folder: Path) -> None:
    """Start `world` ranks and wait for them. Raises UserError naming the first that failed."""
    folder.mkdir()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["megachat.programs.verify"])
    port, ranks = free_port(), []
    for rank in range(world):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(
            target=rank_program, args=(rank, world, port, config, vocab_size, folder, sender), daemon=True
        )
        process.start()
        sender.close()
        ranks.append((process, receiver))
    waiting = {receiver: rank for rank, (_, receiver) in enumerate(ranks)}
    try:
        while waiting:
            for receiver in wait(list(waiting)):
                rank = waiting.pop(receiver)
                try:
                    problem = receiver.recv()
                except EOFError:
                    problem = "the process died"
                if problem:
                    raise UserError(f"rank {rank} of {world} failed: {problem}")
    finally:
        for process, _ in ranks:
            process.kill()


def verify_layout(asked: Config, sizes: dict[str, int], arguments, vocab_size: int, folder: Path) -> dict:
    """Run one process and the layout, compare, print; returns the certificate."""
    from megachat.programs.verify import (
        SCALAR_GRADIENT_TOLERANCE,
        certificate,
        compare,
        parameter_order,
        verification_config,
    )

    rows = arguments.rows * sizes["data"]
    name = ",".join(f"{short}={sizes[axis]}" for short, axis in _AXES.items())
    config = verification_config(asked, **sizes, depth=arguments.depth, rows_a_rank=arguments.rows)
    world = sizes["data"] * sizes["tensor"] * sizes["pipeline"]
    plan = resolve(config, world, vocab_size)  # refuses what does not fit before anything is started
    alone = verification_config(asked, data=1, tensor=1, pipeline=1, depth=arguments.depth, rows_a_rank=rows)
    print(f"{name}: {world} ranks against one process; depth {plan.dims.depth}, {plan.parameters['total']:,} parameters, {rows} rows of "
          f"{plan.dims.sequence_len} tokens a step", flush=True)  # fmt: skip
    run(alone, 1, vocab_size, folder / f"one-{name}")
    run(config, world, vocab_size, folder / name)
    differences = list(compare(folder / name, folder / f"one-{name}", parameter_order(plan.dims)))
    facts = {"layout": sizes, "config": config.model_dump(mode="json", exclude_defaults=True), "vocab_size": vocab_size}
    told = certificate(differences, **facts)
    for kind in ("loss", "gradient", "weight"):
        own = [difference for difference in differences if difference.name.startswith(kind)]
        for tolerance in sorted({entry.tolerance for entry in own}):
            held = [entry for entry in own if entry.tolerance == tolerance]
            beyond = sum(entry.outside > 0 for entry in held)
            outside = f", with elements beyond it: {beyond}" if beyond else ""
            what = "gradients of scalars" if tolerance == SCALAR_GRADIENT_TOLERANCE else kind
            print(
                f"  {what}: {len(held)} compared, largest error {max(entry.error for entry in held):.2e}, tolerance {tolerance:g}{outside}"
            )
    if first := told["first_difference"]:
        share = f"{first['outside']:.3%} of its elements outside {first['tolerance']:g}"
        print(f"  DIFFERENT: {first['name']} first: error {first['error']:.3g}, {share}")
    else:
        print(
            f"  equal ({told['flipped_share']:.1%} of a weight's elements may differ: rounding decides some steps' sign)"
        )
    return told


@user_errors_end_the_program
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="JSON file with what differs from the defaults")
    parser.add_argument(
        "--layout",
        action="append",
        help="axes and sizes, as tp=2,pp=2,dp=2; repeatable; with --resume one process if left out",
    )
    parser.add_argument("--resume", action="store_true", help="stop, save, load and go on, against not stopping")
    parser.add_argument("--onto", action="append", default=[], metavar="LAYOUT", help="with --resume: go on with on this layout instead, in float32; "
                        "repeatable")  # fmt: skip
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="with --resume: the runs' new folder, which stays")
    parser.add_argument("--depth", type=int, help="scale the model down to this depth")
    parser.add_argument("--rows", type=int, default=4, help="rows a data-parallel rank in a step (default 4)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override a setting; repeatable"
    )
    parser.add_argument("--out", type=Path, default=Path("verify.json"), help="the certificate (default verify.json)")
    arguments = parser.parse_args()
    if arguments.rows < 1 or (arguments.depth is not None and arguments.depth < 1):
        parser.error("--rows and --depth are 1 or more")
    if not arguments.resume and (arguments.onto or arguments.keep):
        parser.error("--onto and --keep belong to --resume")
    if not arguments.resume and not arguments.layout:
        parser.error("--layout says which layout is compared with one process")
    if arguments.keep and arguments.keep.exists():
        raise UserError(f"--keep {arguments.keep} exists: name a folder that does not")
    config = load_config(arguments.config, arguments.set)
    layouts, onto = ([parse_layout(text) for text in texts] for texts in (arguments.layout or ["dp=1"], arguments.onto))
    vocab_size = config.model.vocab_size
    if vocab_size is None:
        known = (Path(config.data.tokenizer) / "tokenizer.json").exists()
        vocab_size = load_tokenizer(config.data.tokenizer).vocab_size if known else DEFAULT_VOCABULARY
    import torch

    with (
        contextlib.nullcontext(arguments.keep)
        if arguments.keep
        else tempfile.TemporaryDirectory(prefix="verify-") as folder
    ):
        told = []
        for number, sizes in enumerate(layouts):
            own = Path(folder) / str(number)
            own.mkdir(parents=True)
            if arguments.resume:
                from megachat.programs.verify_resume import verify_resumes  # after parsing, as torch is

                told += verify_resumes(config, sizes, onto or [sizes], arguments, vocab_size, own)
            else:
                told.append(verify_layout(config, sizes, arguments, vocab_size, own))
    passed = all(entry["passed"] for entry in told)
    kind = "resumes" if arguments.resume else "layouts"
    document = {"passed": passed, "environment": describe_environment(torch.device("cpu")), kind: told}
    write_atomically(arguments.out, (json.dumps(document, indent=1) + "\n").encode())
    print(f"certificate: {arguments.out}")
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
