"""Inspects, compares and converts checkpoints: `python tools/convert_checkpoint.py inspect runs/demo`.

A CHECKPOINT is a step's folder, a run's folder (its newest complete checkpoint), or a folder of another format. Every
conversion is proved: what was written is read back, and the output is kept only if both models give the same logits and
all tensors are equal. The certificate, TARGET.certificate.json, records that. Exit status: 0 done, good or equal; 1
different (diff); 2 not good (verify) or refused.
"""

import argparse
import json
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a clone that was not installed

from megachat.errors import UserError, user_errors_end_the_program  # noqa: E402

# Commands import what they need after the command line is parsed: torch takes seconds.

# Format's command -> (help of "to", help of "from").
ABOUT = {
    "nanochat": ("to nanochat's files", "from nanochat's files"),
    "hf": ("to transformers' NanoChat class", "from transformers' NanoChat class"),
    "safetensors": ("everything as plain safetensors and JSON", "back from to-safetensors"),
}


def inspect_command(checkpoint: Path, step: int | None, as_json: bool) -> None:
    from megachat.convert.formats import open_checkpoint
    from megachat.convert.inspection import format_inspection, inspect_checkpoint

    values = inspect_checkpoint(open_checkpoint(checkpoint, step))
    print(json.dumps(values, indent=1) if as_json else format_inspection(values))


def verify_command(checkpoint: Path) -> None:
    from megachat.convert.inspection import verify_checkpoint

    checked, problems = verify_checkpoint(checkpoint)
    if problems:
        raise UserError("\n".join(f"{checkpoint}: {problem}" for problem in problems))
    print(f"good: {checked}")


def diff_command(left: Path, right: Path) -> int:
    from megachat.convert.differences import compare_checkpoints
    from megachat.convert.formats import open_checkpoint

    differences = compare_checkpoints(open_checkpoint(left), open_checkpoint(right))
    for difference in differences:
        print(f"{difference.kind:6} {difference}")
    counted = sum(difference.counts for difference in differences)
    print(f"{counted} differences" if counted else "equal")
    return 1 if counted else 0


def convert_command(direction: str, name: str, source: Path, target: Path, **options) -> None:
    """Converts "to" or "from" the named format and prints what the proof measured."""
    from megachat.convert.conversion import certificate_path, export_checkpoint, import_checkpoint

    convert = export_checkpoint if direction == "to" else import_checkpoint
    certificate = convert(name, source, target, **options)
    numbers = certificate["numbers"]
    print(
        f"wrote {target}: {certificate['tensors']['compared']} tensors equal; over {numbers['positions']} positions "
        f"largest logit difference {numbers['largest_logit_difference']:.2e}, KL {numbers['mean_kl_nats']:.2e} nats, "
        f"same argmax {numbers['argmax_agreement']:.2%}"
    )
    for remark in certificate["remarks"]:
        print(f"remark: {remark}")
    print(f"certificate: {certificate_path(target)}")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, run, about: str, **paths: str):
        command = commands.add_parser(name, help=about, description=about)
        command.set_defaults(run=run)
        for path, metavar in paths.items():
            command.add_argument(path, metavar=metavar, type=Path)
        return command

    command = add("inspect", inspect_command, "show what a checkpoint of any format contains", checkpoint="CHECKPOINT")
    command.add_argument("--json", dest="as_json", action="store_true", help="as JSON")
    command.add_argument("--step", type=int, help="of a nanochat folder that has several (default: the newest)")
    add("verify", verify_command, "check that all files are as saved and all tensors whole", checkpoint="CHECKPOINT")
    add("diff", diff_command, "show which tensors and facts differ, and by how much", left="LEFT", right="RIGHT")
    for name, (about_export, about_import) in ABOUT.items():
        export = add(
            f"to-{name}", partial(convert_command, "to", name), about_export, source="CHECKPOINT", target="FOLDER"
        )
        imported = add(
            f"from-{name}", partial(convert_command, "from", name), about_import, source="FOLDER", target="TARGET"
        )
        imported.epilog = "TARGET is a new run folder, or a new step's folder (step_000020) without a run around it."
        for command in (export, imported):
            command.add_argument("--tokenizer", type=Path, help="its folder, if it is not detected automatically")
        if name == "nanochat":
            export.add_argument("--ranks", type=int, default=1, help="of the nanochat job that continues (default 1)")
            export.add_argument(
                "--tables",
                choices=("float32", "bfloat16"),
                default="float32",
                help="dtype of embeddings (default float32)",
            )
            imported.add_argument("--step", type=int, help="which one (default: the newest)")
            imported.add_argument("--fresh-optimizer", action="store_true", help="leave out its optimizer's state")
    return parser


@user_errors_end_the_program
def main() -> int | None:
    options = vars(build_parser().parse_args())
    return options.pop("run")(**options)


if __name__ == "__main__":
    main()
