"""Finding complete checkpoints and reading them, whatever layout wrote them."""

from pathlib import Path

import torch
from torch.distributed.checkpoint.api import CheckpointException

from megachat.checkpoint.storage import INDEX_NAME, RectanglesByName, load_rectangles, read_index
from megachat.errors import UserError


def _shapes(checkpoint: Path) -> dict[str, tuple[int, ...]]:
    try:
        return {name: tuple(entry["shape"]) for name, entry in read_index(checkpoint).items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{checkpoint / INDEX_NAME} cannot be read ({type(error).__name__}: {error}); give another step's folder"
        ) from None


def load_checkpoint(checkpoint: Path, pieces: RectanglesByName) -> None:
    """Fill the rectangles from the checkpoint, in place; all ranks call it. Raises UserError when names or shapes are another model's."""
    saved = _shapes(checkpoint)
    for name, (shape, _) in pieces.items():
        if name not in saved:
            raise UserError(
                f"{checkpoint} has no {name}: it is a checkpoint of another model; use the config it was made with"
            )
        if saved[name] != tuple(shape):
            raise UserError(
                f"{checkpoint} has {name} as {list(saved[name])}, the model as {list(shape)}: use the config it was made with"
            )
    try:
        load_rectangles(checkpoint, pieces)
    except CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        raise UserError(
            f"{checkpoint} could not be read on rank {rank}: {type(cause).__name__}: {cause}; give another step's folder"
        ) from error


def load_model_weights(checkpoint: Path, names: list[str] | None = None) -> dict[str, torch.Tensor]:
    """Whole float32 weights by name on this one process, all of them or those named."""
    saved = _shapes(checkpoint)
    wanted = names or [name.removeprefix("model/") for name in saved if name.startswith("model/")]
    whole = {name: torch.empty(saved[f"model/{name}"]) for name in wanted}
    pieces = {f"model/{name}": (tuple(t.shape), [((0,) * t.ndim, tuple(t.shape), t)]) for name, t in whole.items()}
    load_checkpoint(checkpoint, pieces)
    return whole
