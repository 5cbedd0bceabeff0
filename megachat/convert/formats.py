"""The formats that megachat's checkpoints are converted to and from; opening a folder of any format."""

from pathlib import Path

from megachat.checkpoint.facts import FACTS_NAME, require_checkpoint_folder
from megachat.convert.declaration import Format
from megachat.convert.huggingface import export_huggingface, import_huggingface, is_huggingface, open_huggingface
from megachat.convert.megachat import find_step_folder, open_megachat
from megachat.convert.nanochat import export_nanochat, import_nanochat_run, open_nanochat, saved_steps
from megachat.convert.plain import FACTS_FILE, export_plain, import_plain, is_plain, open_plain
from megachat.convert.reader import CheckpointReader
from megachat.errors import UserError

FORMATS = (
    Format("safetensors", "safetensors", FACTS_FILE, is_plain, open_plain, export_plain, import_plain),
    Format(
        "huggingface",
        "hf",
        "config.json with model_type",
        is_huggingface,
        open_huggingface,
        export_huggingface,
        import_huggingface,
    ),
    Format(
        "nanochat",
        "nanochat",
        "model_NNNNNN.pt",
        lambda folder: bool(saved_steps(folder)),
        open_nanochat,
        export_nanochat,
        import_nanochat_run,
    ),
)


def format_of(command: str) -> Format:
    """Returns the entry of the table with this command."""
    return next(each for each in FORMATS if each.command == command)


def open_checkpoint(path: Path, step: int | None = None) -> CheckpointReader:
    """Opens a step or run folder of megachat, or a folder of another format. step: which one, if it holds several.

    Raises UserError if it is none of them or cannot be read.
    """
    path = Path(path)
    require_checkpoint_folder(path)
    reader = _open(path, step)
    if step is not None and reader.facts["step"] != step:
        raise UserError(f"{path} has step {reader.facts['step']}, not {step}: give that one, or none")
    return reader


def _open(path: Path, step: int | None) -> CheckpointReader:
    for each in FORMATS:
        if each.recognizes(path):
            return each.open(path, step)
    step_folder = find_step_folder(path, step)
    if not (step_folder / FACTS_NAME).is_file():
        others = ", ".join(f"{each.marker} ({each.name})" for each in FORMATS)
        looked_for = f"it has no {FACTS_NAME} (a step's folder), no checkpoints/ (a run's folder), and none of {others}"
        raise UserError(f"{path} is not a complete checkpoint: {looked_for}; give another folder")
    return open_megachat(step_folder)
