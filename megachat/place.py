"""The identity of a parameter, and the only access to what is attached to parameters: layers below and beside the model
read it here.
"""

from dataclasses import dataclass, field
from typing import Literal

from torch import nn

_PLACE = "place"
_IS_SHARD = "model_parallel"  # DeepSpeed reads an attribute of this name
_IS_PARTIAL = "partial_over_tensor"
Cut = Literal["column", "row", "vocabulary", "feature", "tokens", "heads", "rows", "whole"]


@dataclass(frozen=True)
class Place:
    """Identifies a parameter, the same on every layout.

    name: nanochat's checkpoint name. whole: shape of the tensor with that name. offset: where this parameter starts in
    it (per-layer scalars are one element each). block: index of the block that the parameter belongs to, -1 before the
    blocks, depth after them. start: the initial value, ("normal", std), ("uniform", low, high) or ("constant", value).
    first_rows: of a table cut by "tokens", where the rows of each token start; empty until they are allocated.

    cut: how the tensor axis divides it:
    - "column" (dim 0, output features) and "row" (dim 1, input features): matrices
    - "vocabulary" (dim 0), "feature" (dim 1, by key/value head), "tokens" (dim 0, between rows of two tokens): tables
    - "heads" (dim 0): scales of queries and keys
    - "rows" (dim 0): a table that all ranks of its pipeline stage divide, not the tensor axis alone
    - "whole": not at all
    """

    name: str
    whole: tuple[int, ...]
    block: int
    start: tuple
    cut: Cut = "whole"
    offset: tuple[int, ...] = ()
    first_rows: tuple[int, ...] = field(default=(), repr=False)


def set_place(parameter: nn.Parameter, place: Place) -> None:
    """Attaches the identity to the parameter."""
    setattr(parameter, _PLACE, place)


def has_place(parameter: nn.Parameter) -> bool:
    """Returns whether the parameter has an identity."""
    return hasattr(parameter, _PLACE)


def place_of(parameter: nn.Parameter) -> Place:
    """Returns the parameter's identity. Raises AttributeError if it has none."""
    return getattr(parameter, _PLACE)


def mark_tensor_shard(parameter: nn.Parameter) -> None:
    """Marks a parameter of which each rank of the tensor axis holds another shard: every rank's gradient counts in the
    norm.
    """
    setattr(parameter, _IS_SHARD, True)


def is_tensor_shard(parameter: nn.Parameter) -> bool:
    """Returns whether each rank of the tensor axis holds another shard of the parameter."""
    return getattr(parameter, _IS_SHARD, False)


def is_counted_copy(parameter: nn.Parameter, tensor_rank: int) -> bool:
    """Returns whether the parameter counts on this rank of the tensor axis where each element counts once: of what the
    axis does not cut, only the copy of rank 0 does.
    """
    return tensor_rank == 0 or is_tensor_shard(parameter)


def mark_partial_over_tensor(parameter: nn.Parameter) -> None:
    """Marks a replicated parameter that sees this tensor rank's tokens only: its gradients must be summed over the
    tensor axis.
    """
    setattr(parameter, _IS_PARTIAL, True)


def is_partial_over_tensor(parameter: nn.Parameter) -> bool:
    """Returns whether the parameter's gradients must be summed over the tensor axis."""
    return getattr(parameter, _IS_PARTIAL, False)
