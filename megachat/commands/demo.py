"""From nothing to a trained model: make a corpus from this machine's Python, train a tokenizer, and pretrain under the
deepspeed launcher (two ranks on a CPU machine, all GPUs on a GPU machine). A second call reuses what exists.

The files are written below the current folder: data/python, data/tokenizer and runs/demo. Other options are passed to
pretrain, for example --set horizon.steps=20. MASTER_PORT: default a free port.
"""

import argparse
from pathlib import Path

from megachat.commands.options import Parser, passed_on, require_minimum
from megachat.installation import config_folder

DATA, TOKENIZER = Path("data/python"), Path("data/tokenizer")


def add_arguments(parser: Parser) -> None:
    """Adds the options of `megachat demo`."""
    parser.add_argument("--ranks", type=int, help="default: all GPUs; 2 without GPUs")


def run(options: argparse.Namespace) -> int:
    """Prepares, trains and compares the result with the unigram entropy; returns the exit status."""
    require_minimum(options, ranks=1)
    from megachat.commands.main import check_passed_on, start

    config = str(config_folder() / "demo.json")
    pretraining, settings = check_passed_on(["--config", config, *options.rest])
    from megachat.job.local_job import run_with_deepspeed

    start("data", ["--source", "python", "--out", str(DATA)], "megachat data")
    if not (TOKENIZER / "tokenizer.json").exists():
        training = ["--data", str(DATA), "--vocab-size", "4096", "--out", str(TOKENIZER)]
        start("tokenizer", training, "megachat tokenizer")
    status = run_with_deepspeed(
        ["pretrain", "--config", config, "--resume", "auto", *passed_on(options), *options.rest], options.ranks
    )
    if status or pretraining.dry_run:
        return status
    run_folder = str(Path(settings.run.folder) / (settings.run.name or Path(pretraining.config).stem))
    paths = ["--data", settings.data.folder, "--tokenizer", settings.data.tokenizer, "--run", run_folder]
    return start("unigram", [*paths, *passed_on(options)], "megachat unigram")
