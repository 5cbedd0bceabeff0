"""Finding complete checkpoints and reading them, whatever layout wrote them."""

import json
from pathlib import Path

import torch
from torch.distributed.checkpoint.api import CheckpointException

from megachat.checkpoint.save import FACTS_NAME, FORMAT_VERSION
from megachat.checkpoint.storage import INDEX_NAME, Pieces, load_pieces, read_index
from megachat.errors import UserError


def read_facts(checkpoint: Path) -> dict:
    """The JSON facts of a complete checkpoint. Raises UserError when it is none, is cut short, or is of a newer format."""
    try:
        facts = json.loads((checkpoint / FACTS_NAME).read_text(encoding="utf-8"))
        if facts["format_version"] > FORMAT_VERSION:
            raise UserError(f"{checkpoint} has format {facts['format_version']}, newer than this version's {FORMAT_VERSION}: update megachat")
        files = dict(facts["files"])
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{checkpoint} is not a complete checkpoint: it has no {FACTS_NAME}; give another step's folder") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{checkpoint / FACTS_NAME} cannot be read ({type(error).__name__}: {error}); give another step's folder") from None
    for name, size in files.items():
        path = checkpoint / name
        if not path.is_file():
            raise UserError(f"{checkpoint} is cut short: {name} is missing; give another step's folder, or --resume auto for the newest complete one")
        if path.stat().st_size != size:
            raise UserError(
                f"{checkpoint} is cut short: {name} has {path.stat().st_size} bytes, not {size}; give another step's folder, or --resume auto"
            )
    return facts


def newest_complete(folder: Path) -> tuple[Path | None, list[str]]:
    """(the newest complete checkpoint in the folder or None, why each newer one was passed over)."""
    passed_over = []
    steps = {int(path.name[5:]): path for path in folder.glob("step_*") if path.name[5:].isdecimal() and path.is_dir()}
    for _, checkpoint in sorted(steps.items(), reverse=True):
        try:
            read_facts(checkpoint)
        except UserError as error:
            passed_over.append(str(error))
            continue
        return checkpoint, passed_over
    return None, passed_over


def _shapes(checkpoint: Path) -> dict[str, tuple[int, ...]]:
    try:
        return {name: tuple(entry["shape"]) for name, entry in read_index(checkpoint).items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{checkpoint / INDEX_NAME} cannot be read ({type(error).__name__}: {error}); give another step's folder") from None


def load_checkpoint(checkpoint: Path, pieces: Pieces) -> None:
    """Fill the rectangles from the checkpoint, in place; all ranks call it. Raises UserError when names or shapes are another model's."""
    saved = _shapes(checkpoint)
    for name, (shape, _) in pieces.items():
        if name not in saved:
            raise UserError(f"{checkpoint} has no {name}: it is a checkpoint of another model; use the config it was made with")
        if saved[name] != tuple(shape):
            raise UserError(f"{checkpoint} has {name} as {list(saved[name])}, the model as {list(shape)}: use the config it was made with")
    try:
        load_pieces(checkpoint, pieces)
    except CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        raise UserError(f"{checkpoint} could not be read on rank {rank}: {type(cause).__name__}: {cause}; give another step's folder") from error


def load_model(checkpoint: Path, names: list[str] | None = None) -> dict[str, torch.Tensor]:
    """Whole float32 weights by name on this one process, all of them or those named."""
    saved = _shapes(checkpoint)
    wanted = names or [name.removeprefix("model/") for name in saved if name.startswith("model/")]
    whole = {name: torch.empty(saved[f"model/{name}"]) for name in wanted}
    pieces = {f"model/{name}": (tuple(t.shape), [((0,) * t.ndim, tuple(t.shape), t)]) for name, t in whole.items()}
    load_checkpoint(checkpoint, pieces)
    return whole
