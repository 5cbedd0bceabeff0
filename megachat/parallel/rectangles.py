"""Cuts a contiguous range of a row-major tensor into rectangles, so that flat shards are saved and loaded by name and
whole shape.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch

MASTER = "master"  # kind of the float32 weights, which every optimizer has
MOMENTS = ("exp_avg", "exp_avg_sq")  # kinds of the rest of AdamW's state, as torch and nanochat name them
Rectangle = tuple[tuple[int, ...], tuple[int, ...], torch.Tensor]  # (offsets in the whole, sizes, view)
# name -> (whole shape, this rank's rectangles of the tensor)
RectanglesByName = Mapping[str, tuple[tuple[int, ...], list[Rectangle]]]


class TensorShard(NamedTuple):
    """This rank's part of a state or gradient. kind: which. name: of the parameter. shape: of the whole tensor."""

    kind: str
    name: str
    shape: tuple[int, ...]
    rectangles: list[Rectangle]  # live views, unless the function that returns them says otherwise


def flat_rectangles(
    shape: tuple[int, ...], flat: torch.Tensor, start: int, base: tuple[int, ...] | None = None
) -> list[Rectangle]:
    """Returns elements [start, start + len(flat)) of a row-major tensor of `shape` (1-D or 2-D) as at most three
    rectangles.

    flat: these elements, one-dimensional and contiguous; the views alias it. In order: the end of a row, whole rows,
    the beginning of a row. base: the offset of this tensor in a larger one (a tensor-parallel shard in the whole);
    zeros by default.
    """
    base = base or (0,) * len(shape)
    count = flat.numel()
    if len(shape) == 1:
        return [((base[0] + start,), (count,), flat)] if count else []
    columns = shape[1]
    row, column = divmod(start, columns)
    rectangles: list[Rectangle] = []
    done = 0
    while done < count:
        # to the end of a row that is begun, then all whole rows, then the rest
        rows = 1 if column else max(1, (count - done) // columns)
        width = min(count - done, columns - column)
        view = flat.narrow(0, done, rows * width).view(rows, width)
        rectangles.append(((base[0] + row, base[1] + column), (rows, width), view))
        done, row, column = done + rows * width, row + rows, 0
    return rectangles
