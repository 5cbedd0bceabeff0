"""Look into checkpoints, compare them, and convert them: `python tools/convert_checkpoint.py inspect runs/demo`.

A CHECKPOINT is a step's folder, a run's folder (then its newest complete checkpoint), or a folder of another format. Every conversion is
proved: what was written is read back, and the output is there only if both models give the same logits and all tensors are equal; the
certificate, TARGET.certificate.json, says so. Exit status: 0 done, good or equal; 1 different (diff); 2 not good (verify) or refused.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a clone that was not installed

from megachat.convert import conversions  # noqa: E402
from megachat.convert.conversion import certificate_path  # noqa: E402
from megachat.convert.difference import difference  # noqa: E402
from megachat.convert.formats import open_checkpoint  # noqa: E402
from megachat.convert.inspection import describe, inspect, verify  # noqa: E402
from megachat.errors import UserError, user_errors_end_the_program  # noqa: E402


def inspect_command(checkpoint: Path, step: int | None, as_json: bool) -> None:
    told = inspect(open_checkpoint(checkpoint, step))
    print(json.dumps(told, indent=1) if as_json else describe(told))


def verify_command(checkpoint: Path) -> None:
    told, problems = verify(checkpoint)
    if problems:
        raise UserError("\n".join(f"{checkpoint}: {problem}" for problem in problems))
    print(f"good: {told}")


def diff_command(left: Path, right: Path) -> int:
    found = difference(left, right)
    for entry in found:
        print(f"{entry.kind:6} {entry}")
    different = sum(entry.counts for entry in found)
    print(f"{different} differences" if different else "equal")
    return 1 if different else 0


def conversion(convert):
    """The command of a conversion: it prints what was measured."""

    def command(source: Path, target: Path, **options) -> None:
        told = convert(source, target, **options)
        numbers, tensors = told["numbers"], told["tensors"]
        print(
            f"wrote {target}: {tensors['compared']} tensors equal; over {numbers['positions']} positions largest logit difference "
            f"{numbers['largest_logit_difference']:.2e}, KL {numbers['mean_kl_nats']:.2e} nats, same argmax {numbers['argmax_agreement']:.2%}"
        )
        for remark in told["remarks"]:
            print(f"remark: {remark}")
        print(f"certificate: {certificate_path(target)}")

    return command


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, run, about: str, **paths: str):
        command = commands.add_parser(name, help=about, description=about)
        command.set_defaults(run=run)
        for path, shown in paths.items():
            command.add_argument(path, metavar=shown, type=Path)
        return command

    command = add("inspect", inspect_command, "what is in a checkpoint of any format", checkpoint="CHECKPOINT")
    command.add_argument("--json", dest="as_json", action="store_true", help="as JSON")
    command.add_argument("--step", type=int, help="of a nanochat folder that has several; the newest otherwise")
    add("verify", verify_command, "are all files as they were saved, and all tensors whole", checkpoint="CHECKPOINT")
    add("diff", diff_command, "which tensors and facts differ, and by how much", left="LEFT", right="RIGHT")
    makers = {
        "to-nanochat": add(
            "to-nanochat",
            conversion(conversions.to_nanochat),
            "to nanochat's files",
            source="CHECKPOINT",
            target="FOLDER",
        ),
        "from-nanochat": add(
            "from-nanochat",
            conversion(conversions.from_nanochat),
            "from nanochat's files",
            source="FOLDER",
            target="TARGET",
        ),
        "to-hf": add(
            "to-hf",
            conversion(conversions.to_hf),
            "to transformers' NanoChat class",
            source="CHECKPOINT",
            target="FOLDER",
        ),
        "from-hf": add(
            "from-hf",
            conversion(conversions.from_hf),
            "from transformers' NanoChat class",
            source="FOLDER",
            target="TARGET",
        ),
        "to-safetensors": add(
            "to-safetensors",
            conversion(conversions.to_safetensors),
            "all of it, plain",
            source="CHECKPOINT",
            target="FOLDER",
        ),
        "from-safetensors": add(
            "from-safetensors",
            conversion(conversions.from_safetensors),
            "back from there",
            source="FOLDER",
            target="TARGET",
        ),
    }
    for name, command in makers.items():
        command.add_argument("--tokenizer", type=Path, help="its folder, where it is not found by itself")
        if name.startswith("from-"):
            command.epilog = "TARGET is a new run folder, or a new step's folder (step_000020) without a run around it."
    makers["to-nanochat"].add_argument(
        "--ranks", type=int, default=1, help="of the nanochat job that will go on (default 1)"
    )
    makers["to-nanochat"].add_argument(
        "--tables", choices=("float32", "bfloat16"), default="float32", help="dtype of embeddings (default float32)"
    )
    makers["from-nanochat"].add_argument("--step", type=int, help="the newest otherwise")
    makers["from-nanochat"].add_argument(
        "--fresh-optimizer", action="store_true", help="leave its optimizer's state away"
    )
    return parser


@user_errors_end_the_program
def main() -> int | None:
    options = vars(command_line().parse_args())
    return options.pop("run")(**options)


if __name__ == "__main__":
    main()
