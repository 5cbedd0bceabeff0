"""From nothing to a trained model: make a corpus from this machine's Python, train a tokenizer, and pretrain under the
deepspeed launcher (two ranks on a CPU machine, all GPUs on a GPU machine). A second call reuses what exists.

The files are written below the current folder: data/python, data/tokenizer and runs/demo. Other options are passed to
pretrain, for example --set horizon.steps=20. On a CPU two seconds of passes decide whether the run is shortened, unless
--config, or --set with a key of horizon or batch, is given. MASTER_PORT: default a free port.
"""

import argparse
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from megachat.commands.options import Parser, importing, passed_on, require_minimum
from megachat.files import CONFIG_NAME
from megachat.installation import config_folder

if TYPE_CHECKING:
    from megachat.config import Config

DEMO_VOCAB_SIZE = 4096
DEMO_DATA, DEMO_TOKENIZER = Path("data/python"), Path("data/tokenizer")


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

    start("data", ["--source", "python", "--out", str(DEMO_DATA)], "megachat data")
    if not (DEMO_TOKENIZER / "tokenizer.json").exists():
        training = ["--data", str(DEMO_DATA), "--vocab-size", str(DEMO_VOCAB_SIZE), "--out", str(DEMO_TOKENIZER)]
        start("tokenizer", training, "megachat tokenizer")
    run_folder = Path(settings.run.folder) / (settings.run.name or Path(pretraining.config).stem)
    size = _size(settings, run_folder, pretraining, config)
    words = ["pretrain", "--config", config, "--resume", "auto", *passed_on(options), *size, *options.rest]
    status = run_with_deepspeed(words, options.ranks)
    if status or pretraining.dry_run:
        return status
    paths = ["--data", settings.data.folder, "--tokenizer", settings.data.tokenizer, "--run", str(run_folder)]
    return start("unigram", [*paths, *passed_on(options)], "megachat unigram")


def _size(settings: "Config", run_folder: Path, pretraining: argparse.Namespace, config: str) -> list[str]:
    """Returns options that give the run the size for this machine, which the user's come after."""
    chosen = any(word.startswith(("horizon.", "batch.")) for word in pretraining.set) or shutil.which("nvidia-smi")
    if pretraining.config != config or (chosen and not (run_folder / CONFIG_NAME).exists()):
        return []
    with importing():
        from megachat.programs.demo_size import size_settings
    return [word for setting in size_settings(settings, run_folder, DEMO_VOCAB_SIZE) for word in ("--set", setting)]
