"""What `megachat convert` and `megachat inspect` do."""

import json
from functools import partial
from pathlib import Path

from megachat.convert.conversion import certificate_path, export_checkpoint, import_checkpoint
from megachat.convert.differences import compare_checkpoints, summarize
from megachat.convert.formats import open_checkpoint
from megachat.convert.inspection import format_details, format_summary, inspect_checkpoint, verify_checkpoint
from megachat.errors import UserError

_DETAILS = "--verbose shows all of it"


def inspect_command(checkpoint: Path, step: int | None, as_json: bool, verbose: bool) -> None:
    """Prints a summary of what a checkpoint contains; verbose: all of it below the summary."""
    values = inspect_checkpoint(open_checkpoint(checkpoint, step))
    if as_json:
        print(json.dumps(values, indent=1))
    else:
        print(format_summary(values), format_details(values) if verbose else _DETAILS, sep="\n")


def verify_command(checkpoint: Path) -> None:
    """Prints that a checkpoint is good. Raises UserError with a line for each problem."""
    checked, problems = verify_checkpoint(checkpoint)
    if problems:
        raise UserError("\n".join(f"{checkpoint}: {problem}" for problem in problems))
    print(f"good: {checked}")


def diff_command(left: Path, right: Path, as_json: bool, verbose: bool) -> int:
    """Prints a summary of the differences of two checkpoints, verbose: each of them; returns the exit status, 1 if they
    differ.
    """
    differences = compare_checkpoints(open_checkpoint(left), open_checkpoint(right))
    counted = sum(difference.counts for difference in differences)
    if as_json:
        listed = [{"kind": each.kind, "counts": each.counts, "text": str(each)} for each in differences]
        print(json.dumps({"differences": counted, "list": listed}, indent=1))
        return 1 if counted else 0
    print(summarize(differences))
    if verbose:
        print(*(f"{difference.kind:6} {difference}" for difference in differences), sep="\n")
    elif differences:
        print(_DETAILS)
    return 1 if counted else 0


def convert_command(source: Path, target: Path, to_format: str = "", from_format: str = "", **options) -> None:
    """Converts to or from a format and prints what the proof measured."""
    convert = partial(export_checkpoint, to_format) if to_format else partial(import_checkpoint, from_format)
    certificate = convert(source, target, **options)
    numbers = certificate["numbers"]
    print(
        f"wrote {target}: {certificate['tensors']['compared']} tensors equal; over {numbers['positions']} positions "
        f"largest logit difference {numbers['largest_logit_difference']:.2e}, KL {numbers['mean_kl_nats']:.2e} nats, "
        f"same argmax {numbers['argmax_agreement']:.2%}"
    )
    for remark in certificate["remarks"]:
        print(f"remark: {remark}")
    print(f"certificate: {certificate_path(target)}")
