"""The tensor axis: cuts weights by their places and communicates between the cuts (Megatron-LM, arXiv 1909.08053 and
2205.05198).

The model does not know about it. A module with a child cut by row, or between tokens, is a region. Its first input is
the same on every rank of the axis, inside it each rank has its local heads, hidden channels or table rows, and its
output is summed. With sequence parallelism, the stream outside of regions is cut by tokens.

Every function that communicates declares the types of what it takes and returns; CUT_TYPES has those of cut weights.
tests/tensor_types.py checks real steps against them.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from megachat.kernels.channel_norm import ChannelNorm
from megachat.kernels.cross_entropy import WHOLE, VocabularyPart
from megachat.kernels.linear import Table
from megachat.kernels.uncompiled import uncompiled
from megachat.parallel.collectives import all_gather, all_reduce, reduce_scatter
from megachat.parallel.cuts import cut_range, cut_shape
from megachat.parallel.mesh import Axis
from megachat.place import mark_partial_over_tensor, mark_tensor_shard, place_of, set_place


class Type(NamedTuple):
    """How a value and its gradient are spread over the tensor axis.

    Each is "replicated" (equal on every rank), "partial" (the sum over the ranks is the value) or the dim along which
    every rank has its part. The four combinations below are those of github.com/meta-pytorch/spmd_types.
    """

    value: str | int
    gradient: str | int


INVARIANT = Type("replicated", "replicated")
REPLICATED = Type("replicated", "partial")  # every rank continues with its part of the weights
PARTIAL = Type("partial", "replicated")
CHANNELS, TOKEN_SLICES = Type(-1, -1), Type(1, 1)
# cut of a weight -> types of what its layer takes (None: ids) and returns
CUT_TYPES: dict[str, tuple[Type | None, Type]] = {
    "column": (REPLICATED, CHANNELS),
    "row": (CHANNELS, PARTIAL),
    "feature": (None, CHANNELS),
}


def vocabulary_part(table_rows: int, axis: Axis) -> VocabularyPart:
    """Returns this rank's part of a table of `table_rows` rows, padding included."""
    if axis.size == 1:
        return WHOLE
    ranges = [cut_range(table_rows, axis.size, rank) for rank in range(axis.size)]
    return VocabularyPart(
        start=ranges[axis.rank][0],
        add=lambda tensor: all_reduce(tensor, axis, name="sum over the vocabulary"),
        most_rows=max(last - first for first, last in ranges),
    )


def apply_tensor(layers: list[nn.Module], axis: Axis, *, sequence: bool = False) -> None:
    """Cuts the layers' parameters in place and adds communication between the cuts; the layers' values are lost.

    Every cut parameter is replaced by one of its shard's shape and place, marked as a tensor shard. sequence: between
    regions each rank holds tokens / size tokens of the stream. Parameters that see only these are marked as partial
    over the axis.
    """
    if axis.size == 1:
        return
    for layer in layers:
        makes_stream = _cut_parameters(layer, axis)
        for module in layer.modules():
            _add_region_hooks(module, axis, sequence)
        if sequence and makes_stream:
            layer.register_forward_hook(lambda _, inputs, stream: _slice_stream(stream, axis))
        elif sequence:
            for parameter in layer.parameters():
                if place_of(parameter).cut == "whole":
                    mark_partial_over_tensor(parameter)


def _cut_parameters(layer: nn.Module, axis: Axis) -> bool:
    """Replaces parameters by their shards.

    Returns whether the layer has a table cut by vocabulary, which makes the stream.
    """
    for module in list(layer.modules()):
        for name, parameter in list(module.named_parameters(recurse=False)):
            place = place_of(parameter)
            if place.cut != "whole":
                shape, offset = cut_shape(place, axis.size, axis.rank)
                shard = nn.Parameter(torch.empty(shape, dtype=parameter.dtype, device=parameter.device))
                set_place(shard, dataclasses.replace(place, offset=offset))
                mark_tensor_shard(shard)
                setattr(module, name, shard)
    makes_stream = False
    for module in list(layer.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Table) and place_of(child.weight).cut == "vocabulary":
                setattr(module, name, _VocabularyTable(child.weight, axis))
                makes_stream = True
    return makes_stream


def _add_region_hooks(module: nn.Module, axis: Axis, sequence: bool) -> None:
    """Adds hooks where a region begins and ends, and where the head's hidden states meet the cut vocabulary."""
    enter, leave = (_GATHER_TOKENS, _SCATTER_TOKENS) if sequence else (_ENTER, _LEAVE)
    if isinstance(module, ChannelNorm):
        module.add = lambda tensor: all_reduce(tensor, axis, name="sum of squares of a norm")
    cuts = set()
    for child in module.children():
        weight = getattr(child, "weight", None)
        cut = place_of(weight).cut if isinstance(weight, nn.Parameter) else "whole"
        cuts.add(cut)
        if cut == "vocabulary" and not isinstance(child, Table | _VocabularyTable):
            module.register_forward_hook(lambda _, inputs, output: (_apply(enter, output[0], axis), *output[1:]))
    if cuts & {"row", "tokens"}:
        module.register_forward_pre_hook(lambda _, inputs: (_apply(enter, inputs[0], axis), *inputs[1:]))
        module.register_forward_hook(lambda _, inputs, output: _apply(leave, output, axis))


@uncompiled
def _apply(border: "_Border", tensor: torch.Tensor, axis: Axis) -> torch.Tensor:
    return border.apply(tensor, axis)


def _slice_stream(stream: tuple[torch.Tensor, ...], axis: Axis) -> tuple[torch.Tensor, ...]:
    """Cuts the floating tensors to this rank's tokens; x and x0, one tensor here, stay one tensor.

    The ids stay whole.
    """
    slices: dict[int, torch.Tensor] = {}
    return tuple(
        slices.setdefault(id(tensor), _apply(_SLICE, tensor, axis)) if tensor.is_floating_point() else tensor
        for tensor in stream
    )


class _VocabularyTable(nn.Module):
    """A table cut by rows: ids of other ranks' rows give zeros, and the sum over the axis has every row."""

    def __init__(self, weight: nn.Parameter, axis: Axis):
        super().__init__()
        self.weight, self.axis = weight, axis
        self.start = place_of(weight).offset[0]

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        local = ids - self.start
        held = (local >= 0) & (local < len(self.weight))
        rows = nn.functional.embedding(torch.where(held, local, 0), self.weight)
        return _apply(_LEAVE, rows * held.unsqueeze(-1), self.axis)


def _sum_over_ranks(tensor: torch.Tensor, axis: Axis, name: str) -> torch.Tensor:
    total = tensor.contiguous().clone()
    all_reduce(total, axis, name=name)
    return total


def _gather_tokens(tensor: torch.Tensor, axis: Axis) -> torch.Tensor:
    """Returns all tokens from each rank's tokens."""
    local = tensor.transpose(0, 1).contiguous()
    whole = local.new_empty(axis.size * local.size(0), *local.shape[1:])
    all_gather(whole.view(-1), local.view(-1), axis, name="tokens into a tensor-parallel region")
    return whole.transpose(0, 1).contiguous()  # once here, else each matrix that multiplies it makes and keeps a copy


def _scatter_tokens(tensor: torch.Tensor, axis: Axis) -> torch.Tensor:
    """Returns this rank's tokens of the sum over the ranks."""
    whole = tensor.transpose(0, 1).contiguous()
    local = whole.new_empty(whole.size(0) // axis.size, *whole.shape[1:])
    reduce_scatter(local.view(-1), whole.view(-1), axis, name="tokens out of a tensor-parallel region")
    return local.transpose(0, 1).contiguous()


def _local_tokens(tensor: torch.Tensor, axis: Axis) -> torch.Tensor:
    """Returns this rank's tokens of a tensor that all ranks have."""
    # a copy: with one row the part would be a view, and keep the whole stream
    return tensor.chunk(axis.size, dim=1)[axis.rank].clone(memory_format=torch.contiguous_format)


@dataclasses.dataclass
class _Border:
    """What happens to a tensor [batch, tokens, ...] at the border of a region, and to its gradient.

    types: of what it takes and returns. forward(tensor, axis), backward(gradient, axis): return the result.
    """

    name: str
    types: tuple[Type, Type]
    forward: Callable[[torch.Tensor, Axis], torch.Tensor]
    backward: Callable[[torch.Tensor, Axis], torch.Tensor]

    def apply(self, tensor: torch.Tensor, axis: Axis) -> torch.Tensor:
        return _Cross.apply(tensor, self, axis)


class _Cross(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, border: _Border, axis: Axis):
        ctx.border, ctx.axis = border, axis
        return border.forward(tensor, axis)

    @staticmethod
    def backward(ctx, gradient):
        return ctx.border.backward(gradient, ctx.axis), None, None


_ENTER = _Border(
    "enter",
    (INVARIANT, REPLICATED),
    lambda tensor, axis: tensor.view_as(tensor),
    lambda gradient, axis: _sum_over_ranks(gradient, axis, "gradient into a tensor-parallel region"),
)
_LEAVE = _Border(
    "leave",
    (PARTIAL, INVARIANT),
    lambda tensor, axis: _sum_over_ranks(tensor, axis, "sum out of a tensor-parallel region"),
    lambda gradient, axis: gradient,
)
# with sequence parallelism
_SLICE = _Border("slice", (INVARIANT, TOKEN_SLICES), _local_tokens, _gather_tokens)
_GATHER_TOKENS = _Border("gather_tokens", (TOKEN_SLICES, REPLICATED), _gather_tokens, _scatter_tokens)
_SCATTER_TOKENS = _Border("scatter_tokens", (PARTIAL, TOKEN_SLICES), _scatter_tokens, _gather_tokens)
