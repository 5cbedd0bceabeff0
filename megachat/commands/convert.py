"""Inspects, compares and converts checkpoints: `megachat convert to-nanochat runs/demo out/nanochat`.

A CHECKPOINT is a step's folder, a run's folder (its newest complete checkpoint), or a folder of another format. Every
conversion is proved: what was written is read back, and the output is kept only if both models give the same logits and
all tensors are equal. The certificate, TARGET.certificate.json, records that. Exit status: 0 done, good or equal; 1
different (diff); 2 not good (verify) or refused.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

from megachat.commands import inspect
from megachat.commands.options import Parser, add_no_color, add_quiet, importing

# Format's command -> (help of "to", help of "from").
FORMAT_HELP = {
    "nanochat": ("to nanochat's files", "from nanochat's files"),
    "hf": ("to a folder that transformers loads anywhere", "from such a folder, or one of transformers' NanoChat"),
    "safetensors": ("everything as plain safetensors and JSON", "back from to-safetensors"),
}


def add_arguments(parser: Parser) -> None:
    """Adds the commands of `megachat convert`."""
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="action")

    def add(name: str, about: str, **paths: str):
        command = commands.add_parser(name, help=about, description=about)
        add_quiet(command, default=argparse.SUPPRESS)
        add_no_color(command, default=argparse.SUPPRESS)
        for path, metavar in paths.items():
            command.add_argument(path, metavar=metavar, type=Path)
        return command

    inspect.add_options(add("inspect", "show what a checkpoint contains", checkpoint="CHECKPOINT"))
    add("verify", "check that all files are as saved", checkpoint="CHECKPOINT")
    command = add("diff", "show which tensors and facts differ", left="LEFT", right="RIGHT")
    command.add_argument("--json", action="store_true", help="as JSON")
    command.add_argument("--verbose", action="store_true", help="also each difference")
    for name, (about_export, about_import) in FORMAT_HELP.items():
        export = add(f"to-{name}", about_export, source="CHECKPOINT", target="FOLDER")
        export.set_defaults(to_format=name)
        imported = add(f"from-{name}", about_import, source="FOLDER", target="TARGET")
        imported.set_defaults(from_format=name)
        imported.epilog = "TARGET is a new run folder, or a new step's folder (step_000020) without a run around it."
        for command in (export, imported):
            command.add_argument("--tokenizer", type=Path, help="its folder, if it is not detected automatically")
        if name == "nanochat":
            ranks = "of the nanochat job that continues (default 1)"
            export.add_argument("--ranks", type=int, default=1, help=ranks)
            tables = "dtype of embeddings (default float32)"
            export.add_argument("--tables", choices=("float32", "bfloat16"), default="float32", help=tables)
            imported.add_argument("--step", type=int, help="which one (default: the newest)")
            imported.add_argument("--fresh-optimizer", action="store_true", help="leave out its optimizer's state")


def run(options: argparse.Namespace) -> int | None:
    """Runs the command; returns the exit status."""
    if "to_format" in options:
        from megachat.checkpoint.facts import require_checkpoint_folder

        require_checkpoint_folder(options.source)
    with importing():
        from megachat.programs import convert

    calls: dict[str, Callable[..., int | None]] = {
        "inspect": convert.inspect_command,
        "verify": convert.verify_command,
        "diff": convert.diff_command,
    }
    left_out = ("quiet", "no_color", "action", "json")
    values = {name: value for name, value in vars(options).items() if name not in left_out}
    if "json" in options:
        values["as_json"] = options.json
    return calls.get(options.action, convert.convert_command)(**values)
