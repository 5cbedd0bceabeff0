"""A contiguous range of a row-major tensor as rectangles, so that flat shards can be saved and loaded by name and whole shape."""

import torch

Rectangle = tuple[tuple[int, ...], tuple[int, ...], torch.Tensor]  # (offsets in the whole, sizes, view)


def flat_rectangles(
    shape: tuple[int, ...], flat: torch.Tensor, start: int, base: tuple[int, ...] | None = None
) -> list[Rectangle]:
    """Elements [start, start + len(flat)) of a row-major tensor of `shape` (1-D or 2-D) as at most three (offsets, sizes, view).

    flat: those elements, one-dimensional and contiguous; the views alias it. In order: the end of a row, whole rows, the beginning of a row;
    an empty range gives no rectangle. base: where this tensor begins in a larger one (a tensor-parallel shard in the whole); zeros by default.
    """
    base = base or (0,) * len(shape)
    count = flat.numel()
    if len(shape) == 1:
        return [((base[0] + start,), (count,), flat)] if count else []
    columns = shape[1]
    rectangles, taken = [], 0

    def take(row: int, column: int, rows: int, width: int) -> None:
        nonlocal taken
        view = flat.narrow(0, taken, rows * width).view(rows, width)
        rectangles.append(((base[0] + row, base[1] + column), (rows, width), view))
        taken += rows * width

    row, column = divmod(start, columns)
    if count and column:
        take(row, column, 1, min(count, columns - column))
        row += 1
    if rows := (count - taken) // columns:
        take(row, 0, rows, columns)
        row += rows
    if taken < count:
        take(row, 0, 1, count - taken)
    return rectangles
