"""What `megachat verify` does: runs the comparisons and writes the certificate."""

import argparse
import contextlib
import tempfile
from pathlib import Path

from megachat.config import Config, load_config
from megachat.data.tokenizer import METADATA_FILE, load_tokenizer
from megachat.files import check_writable, write_json
from megachat.planning.layouts import parse_layout
from megachat.programs.verify_config import check_layout

DEFAULT_VOCABULARY = 4096


def vocabulary_without_text(config: Config) -> int:
    """Returns the size of the vocabulary for random tokens: the config's, else the tokenizer's, if there is one."""
    if config.model.vocab_size is not None:
        return config.model.vocab_size
    exists = (Path(config.data.tokenizer) / METADATA_FILE).exists()
    return load_tokenizer(config.data.tokenizer).vocab_size if exists else DEFAULT_VOCABULARY


def _run_rank(config: Config, vocab_size: int, folder: Path, reference: Path | None) -> None:
    import torch

    from megachat.job.join import end_collectives
    from megachat.programs.verify_layout import run_rank

    run_rank(config, vocab_size, torch.device("cpu"), folder, reference)
    end_collectives()


def run_ranks(config: Config, world: int, vocab_size: int, folder: Path, reference: Path | None) -> None:
    """Runs `verify_layout.run_rank` on `world` new processes. Raises UserError naming the first rank that failed."""
    from megachat.job.local_ranks import run_local_ranks

    folder.mkdir()
    preload = ["megachat.programs.verify_layout"]
    run_local_ranks(_run_rank, world, config, vocab_size, folder, reference, preload=preload)


def verify(arguments: argparse.Namespace) -> dict:
    """Verifies every layout, writes the certificate and returns it. arguments: of `megachat verify`."""
    config = load_config(arguments.config, arguments.set)
    layouts = [parse_layout(text) for text in arguments.layout or ["dp=1"]]
    targets = [parse_layout(text) for text in arguments.onto]
    vocab_size = vocabulary_without_text(config)
    for layout in (*layouts, *targets):
        check_layout(config, layout, vocab_size, depth=arguments.depth, dry=arguments.dry)
    check_writable(arguments.out)
    from megachat.programs.verify_layout import verify_layout  # imports DeepSpeed, which takes seconds: after parsing
    from megachat.programs.verify_resume import verify_resumes

    if arguments.dry:
        from megachat.programs.verify_dry import verify_dry

        walked = [verify_dry(config, layout, vocab_size, every_rank=arguments.every_rank) for layout in layouts]
        return _finish(arguments, "layouts", walked)
    sizes = {"depth": arguments.depth, "rows": arguments.rows}
    certificates = []
    with contextlib.ExitStack() as stack:
        parent = arguments.keep or stack.enter_context(tempfile.TemporaryDirectory(prefix="verify-"))
        for number, layout in enumerate(layouts):
            folder = Path(parent) / str(number)
            folder.mkdir(parents=True)
            if arguments.resume:
                how = {"times": arguments.times or 1, "profile": arguments.profile}
                certificates += verify_resumes(config, layout, targets, vocab_size, folder, **sizes, **how)
            else:
                certificates.append(verify_layout(config, layout, vocab_size, folder, run_ranks, **sizes))
    return _finish(arguments, "resumes" if arguments.resume else "layouts", certificates)


def _finish(arguments: argparse.Namespace, kind: str, certificates: list[dict]) -> dict:
    import torch

    from megachat.job.launch import describe_environment

    passed = all(entry["passed"] for entry in certificates)
    document = {"passed": passed, "environment": describe_environment(torch.device("cpu")), kind: certificates}
    write_json(arguments.out, document)
    print(f"certificate: {arguments.out}")
    return document
