"""Reading a checkpoint's tensors, whatever layout wrote them."""

from pathlib import Path

import torch
from torch.distributed.checkpoint.api import CheckpointException

from megachat.checkpoint.storage import INDEX_NAME, RectanglesByName, load_rectangles, read_index
from megachat.errors import UserError


def load_checkpoint(checkpoint: Path, tensors: RectanglesByName) -> None:
    """Fill this rank's rectangles from the checkpoint, in place; all ranks call it.

    Raises UserError when the checkpoint does not have a tensor of that name and shape, or cannot be read.
    """
    saved = _saved_shapes(checkpoint)
    for name, (shape, _) in tensors.items():
        if name not in saved:
            raise UserError(
                f"{checkpoint} has no tensor {name}: it was made by another model; use the config it was made with"
            )
        if saved[name] != tuple(shape):
            raise UserError(
                f"{checkpoint} has {name} with shape {list(saved[name])}, but the model has {list(shape)}: "
                "use the config it was made with"
            )
    try:
        load_rectangles(checkpoint, tensors)
    except CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        raise UserError(
            f"{checkpoint} could not be read on rank {rank}: {type(cause).__name__}: {cause}; "
            "use another step's checkpoint"
        ) from error


def load_model_weights(checkpoint: Path, names: list[str] | None = None) -> dict[str, torch.Tensor]:
    """Load whole float32 weights by name on this process alone. names: None for all."""
    saved = _saved_shapes(checkpoint)
    names = names or [name.removeprefix("model/") for name in saved if name.startswith("model/")]
    weights = {name: torch.empty(saved[f"model/{name}"]) for name in names}
    load_checkpoint(
        checkpoint,
        {f"model/{name}": (tuple(t.shape), [((0,) * t.ndim, tuple(t.shape), t)]) for name, t in weights.items()},
    )
    return weights


def _saved_shapes(checkpoint: Path) -> dict[str, tuple[int, ...]]:
    try:
        return {name: tuple(entry["shape"]) for name, entry in read_index(checkpoint).items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{checkpoint / INDEX_NAME} cannot be read ({type(error).__name__}: {error}); use another step's checkpoint"
        ) from None
