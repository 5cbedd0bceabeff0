"""Which part of a dim or of a tensor each rank has. Nothing is communicated."""

from megachat.place import Place
from megachat.planning.dimensions import balanced_cuts

_CUT_DIM = {"column": 0, "row": 1, "vocabulary": 0, "feature": 1, "tokens": 0, "heads": 0}


def cut_range(size: int, ranks: int, rank: int) -> tuple[int, int]:
    """Returns [first, last) of a rank's part of a dim; parts differ by at most one if the axis does not divide it."""
    share, longer = divmod(size, ranks)
    first = rank * share + min(rank, longer)
    return first, first + share + (rank < longer)


def cut_shape(place: Place, ranks: int, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns (shape, offset in the whole) of a rank's shard of a tensor that the axis cuts as its place says."""
    shape, offset = list(place.whole), [0] * len(place.whole)
    if place.cut in _CUT_DIM:
        dim = _CUT_DIM[place.cut]
        offset[dim], last = cut_range(place.whole[dim], ranks, rank)
        if place.first_rows:
            offset[dim], last = balanced_cuts(place.first_rows, ranks)[rank : rank + 2]
        shape[dim] = last - offset[dim]
    return tuple(shape), tuple(offset)
