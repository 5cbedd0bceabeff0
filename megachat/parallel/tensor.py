"""The tensor axis: weights cut as their places say, and the communication where the cuts meet (Megatron-LM, arXiv 1909.08053 and 2205.05198).

The model knows nothing of it. A module with a row-cut child is a region: what enters it is the same on every rank of the axis, inside each rank
has its own heads or hidden channels, and what leaves it is summed. With sequence parallelism the stream outside of regions is cut by tokens.
"""

import dataclasses

import torch
from torch import nn

from megachat.kernels.cross_entropy import WHOLE, VocabularyPart
from megachat.kernels.linear import Table
from megachat.parallel.collectives import all_gather, all_reduce, reduce_scatter
from megachat.parallel.mesh import Axis
from megachat.place import mark_partial_over_tensor, mark_tensor_shard, place_of, set_place

_CUT_DIM = {"column": 0, "row": 1, "vocabulary": 0, "feature": 1}


def cut_range(size: int, ranks: int, rank: int) -> tuple[int, int]:
    """[first, last) of a rank's part of a dim; parts differ by at most one where the axis does not divide it."""
    share, longer = divmod(size, ranks)
    first = rank * share + min(rank, longer)
    return first, first + share + (rank < longer)


def cut_shape(whole: tuple[int, ...], cut: str, ranks: int, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(shape, offset in the whole) of a rank's shard of a tensor that is cut so (see Place.cut)."""
    shape, offset = list(whole), [0] * len(whole)
    if cut in _CUT_DIM:
        first, last = cut_range(whole[_CUT_DIM[cut]], ranks, rank)
        shape[_CUT_DIM[cut]], offset[_CUT_DIM[cut]] = last - first, first
    return tuple(shape), tuple(offset)


def vocabulary_part(table_rows: int, axis: Axis) -> VocabularyPart:
    """This rank's rows of a table of `table_rows` rows, padding included."""
    if axis.size == 1:
        return WHOLE
    parts = [cut_range(table_rows, axis.size, rank) for rank in range(axis.size)]
    most = max(last - first for first, last in parts)
    return VocabularyPart(
        parts[axis.rank][0], lambda tensor: all_reduce(tensor, axis, name="sum over the vocabulary"), most
    )


def apply_tensor(layers: list[nn.Module], axis: Axis, *, sequence: bool = False) -> None:
    """Cut the layers' parameters in place and put communication between the cuts; the layers' values are lost.

    Every cut parameter becomes a new one of its shard's shape whose place has the shard's offset, marked `model_parallel` (each rank's
    gradient counts in the norm). sequence: between regions each rank holds tokens / size tokens of the stream; parameters that see only
    these are marked `partial_over_tensor`, because their gradients must be summed over the axis.
    """
    if axis.size == 1:
        return
    for layer in layers:
        embeds = _cut(layer, axis)
        for module in layer.modules():
            _join(module, axis, sequence)
        if sequence and embeds:
            layer.register_forward_hook(lambda _, inputs, stream: _slice_stream(stream, axis))
        elif sequence:
            for parameter in layer.parameters():
                if place_of(parameter).cut == "whole":
                    mark_partial_over_tensor(parameter)


def _cut(layer: nn.Module, axis: Axis) -> bool:
    """Replace parameters by their shards; returns whether the layer has a table cut by vocabulary, so that it makes the stream."""
    embeds = False
    for module in list(layer.modules()):
        for name, parameter in list(module.named_parameters(recurse=False)):
            where = place_of(parameter)
            if where.cut == "whole":
                continue
            shape, offset = cut_shape(where.whole, where.cut, axis.size, axis.rank)
            shard = nn.Parameter(torch.empty(shape, dtype=parameter.dtype, device=parameter.device))
            set_place(shard, dataclasses.replace(where, offset=offset))
            mark_tensor_shard(shard)
            setattr(module, name, shard)
    for module in list(layer.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Table) and place_of(child.weight).cut == "vocabulary":
                setattr(module, name, _VocabularyTable(child.weight, axis))
                embeds = True
    return embeds


def _join(module: nn.Module, axis: Axis, sequence: bool) -> None:
    """Adds hooks where a region begins and ends, and where the head's hidden states meet the cut vocabulary."""
    enter, leave = (_GatherTokens, _ScatterTokens) if sequence else (_Enter, _Leave)
    for child in module.children():
        weight = getattr(child, "weight", None)
        cut = place_of(weight).cut if isinstance(weight, nn.Parameter) else "whole"
        if cut == "row":
            module.register_forward_pre_hook(lambda _, inputs: (_apply(enter, inputs[0], axis), *inputs[1:]))
            child.register_forward_hook(lambda _, inputs, output: _apply(leave, output, axis))
        elif cut == "vocabulary" and not isinstance(child, Table | _VocabularyTable):
            module.register_forward_hook(lambda _, inputs, output: (_apply(enter, output[0], axis), *output[1:]))


@torch.compiler.disable
def _apply(function, tensor: torch.Tensor, axis: Axis) -> torch.Tensor:
    return function.apply(tensor, axis)


def _slice_stream(stream: tuple[torch.Tensor, ...], axis: Axis) -> tuple[torch.Tensor, ...]:
    """Own tokens of the floating tensors; x and x0, which are one tensor here, stay one. The ids stay whole."""
    own: dict[int, torch.Tensor] = {}
    return tuple(
        own.setdefault(id(part), _apply(_Slice, part, axis)) if part.is_floating_point() else part for part in stream
    )


class _VocabularyTable(nn.Module):
    """Table whose rows are cut: foreign ids give zeros here, and the sum over the axis has every row."""

    def __init__(self, weight: nn.Parameter, axis: Axis):
        super().__init__()
        self.weight, self.axis = weight, axis
        self.start = place_of(weight).offset[0]

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        local = ids - self.start
        held = (local >= 0) & (local < len(self.weight))
        rows = nn.functional.embedding(torch.where(held, local, 0), self.weight)
        return _apply(_Leave, rows * held.unsqueeze(-1), self.axis)


class _Enter(torch.autograd.Function):
    """Forward nothing; backward the sum of the ranks' gradients."""

    @staticmethod
    def forward(ctx, tensor, axis):
        ctx.axis = axis
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, gradient):
        return _summed(gradient, ctx.axis, "gradient into a tensor-parallel region"), None


class _Leave(torch.autograd.Function):
    """Forward the sum over ranks; backward nothing."""

    @staticmethod
    def forward(ctx, tensor, axis):
        return _summed(tensor, axis, "sum out of a tensor-parallel region")

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


class _Slice(torch.autograd.Function):
    """[batch, tokens, ...] the same everywhere -> own tokens; backward every rank's gradient, gathered."""

    @staticmethod
    def forward(ctx, tensor, axis):
        ctx.axis = axis
        return tensor.chunk(axis.size, dim=1)[axis.rank].contiguous()

    @staticmethod
    def backward(ctx, gradient):
        return _gathered(gradient, ctx.axis), None


class _GatherTokens(torch.autograd.Function):
    """Own tokens -> all tokens; backward the sum over ranks of the gradients of own tokens."""

    @staticmethod
    def forward(ctx, tensor, axis):
        ctx.axis = axis
        return _gathered(tensor, axis)

    @staticmethod
    def backward(ctx, gradient):
        return _scattered(gradient, ctx.axis), None


class _ScatterTokens(torch.autograd.Function):
    """All tokens -> the sum over ranks of own tokens; backward gathers."""

    @staticmethod
    def forward(ctx, tensor, axis):
        ctx.axis = axis
        return _scattered(tensor, axis)

    @staticmethod
    def backward(ctx, gradient):
        return _gathered(gradient, ctx.axis), None


def _summed(tensor: torch.Tensor, axis: Axis, name: str) -> torch.Tensor:
    total = tensor.contiguous().clone()
    all_reduce(total, axis, name=name)
    return total


def _gathered(tensor: torch.Tensor, axis: Axis) -> torch.Tensor:
    own = tensor.transpose(0, 1).contiguous()
    whole = own.new_empty(axis.size * own.size(0), *own.shape[1:])
    all_gather(whole.view(-1), own.view(-1), axis, name="tokens into a tensor-parallel region")
    return whole.transpose(
        0, 1
    ).contiguous()  # once: each matrix that takes it would else make and keep a copy of its own


def _scattered(tensor: torch.Tensor, axis: Axis) -> torch.Tensor:
    whole = tensor.transpose(0, 1).contiguous()
    own = whole.new_empty(whole.size(0) // axis.size, *whole.shape[1:])
    reduce_scatter(own.view(-1), whole.view(-1), axis, name="tokens out of a tensor-parallel region")
    return own.transpose(0, 1).contiguous()
