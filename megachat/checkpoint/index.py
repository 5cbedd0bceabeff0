"""The index of a checkpoint's tensors (tensors.json): their shapes, dtypes and rectangles in files, checked when read.

A loader fills memory from the rectangles. An element that no rectangle holds would stay uninitialized, so an index is
used only if every element is stored exactly once.
"""

import functools
import itertools
import json
import math
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

from megachat.device import DTYPES
from megachat.errors import UserError
from megachat.files import refuse_damaged
from megachat.parallel.rectangles import MASTER, Rectangle, TensorShard

INDEX_NAME = "tensors.json"
_PIECE_KEYS = {"offset", "size", "file", "at", "bytes"}


def state_name(optimizer: str, parameter: str, kind: str) -> str:
    """Returns the name of a state of a parameter, "OPTIMIZER/PARAMETER/KIND"; the masters are "model/PARAMETER"."""
    return f"model/{parameter}" if kind == MASTER else f"{optimizer}/{parameter}/{kind}"


def by_tensor(shards: Iterable[tuple[str, TensorShard]]) -> dict[str, tuple[tuple[int, ...], list[Rectangle]]]:
    """Returns the rectangles of all shards with a name, see RectanglesByName: a tensor may have several shards."""
    tensors: dict[str, tuple[tuple[int, ...], list[Rectangle]]] = {}
    for name, shard in shards:
        tensors.setdefault(name, (shard.shape, []))[1].extend(shard.rectangles)
    return tensors


def read_index(folder: Path) -> dict[str, dict]:
    """Reads the index of a checkpoint folder: name -> shape, dtype and pieces (rectangles in files) of every tensor.

    Raises UserError if it cannot be read or `index_problems` has any.
    """
    index = _load(folder)
    if problems := index_problems(folder, index):
        raise UserError(f"{folder / INDEX_NAME} is refused: {problems[0]}; use another step's checkpoint")
    return index


def index_problems(folder: Path, index: dict | None = None, files: Collection[str] | None = None) -> list[str]:
    """Returns one phrase per tensor whose elements are not each stored once, in whole numbers, inside the files.

    index: read from the folder by default. files: names of those that may be used, by default all in the folder. Raises
    UserError if the index cannot be read.
    """
    index = _load(folder) if index is None else index

    @functools.cache
    def file_bytes(name: str) -> int:
        if Path(name).name != name or (files is not None and name not in files):
            return -1
        return (folder / name).stat().st_size if (folder / name).is_file() else -1

    problems: list[str] = []
    ranges: dict[str, list[tuple[int, int, str]]] = {}  # file -> bytes [begin, end) of each piece
    for name, entry in index.items():
        if problem := _entry_problem(entry, file_bytes):
            problems.append(f"{name} {problem}")
            continue
        for piece in entry["pieces"]:
            ranges.setdefault(piece["file"], []).append((piece["at"], piece["at"] + piece["bytes"], name))
    for pieces in ranges.values():
        pieces.sort()
        for (_, end, first), (begin, _, second) in itertools.pairwise(pieces):
            if begin < end:
                problems.append(f"{second} has a rectangle in the same bytes of a file as {first}")
    return problems


def _load(folder: Path) -> dict[str, dict]:
    path = folder / INDEX_NAME
    with refuse_damaged(path, "cannot be read ({}); use another step's checkpoint"):
        index = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(index, dict):
            raise ValueError(f"it holds a {type(index).__name__}, not an object")
        return index


def _entry_problem(entry: object, file_bytes: Callable[[str], int]) -> str | None:
    if not isinstance(entry, dict) or not {"shape", "dtype", "pieces"} <= entry.keys():
        return "has no shape, dtype and pieces"
    shape, dtype, pieces = entry["shape"], entry["dtype"], entry["pieces"]
    if not _are_integers(shape, 1):
        return f"has the shape {json.dumps(shape)[:80]}, which is no list of positive integers"
    if not isinstance(dtype, str) or dtype not in DTYPES:
        return f"has the dtype {json.dumps(dtype)[:80]}, which is none of {', '.join(DTYPES)}"
    if not isinstance(pieces, list) or not all(_is_piece(piece, len(shape)) for piece in pieces):
        return "has a rectangle whose offset, size, position or length is no list of integers of the right sign"
    stored, count = sum(math.prod(piece["size"]) for piece in pieces), math.prod(shape)
    if stored != count:
        return f"has {stored:,} of its {count:,} elements in its rectangles"
    boxes = [(piece["offset"], piece["size"]) for piece in pieces]
    if any(o + s > whole for box in boxes for o, s, whole in zip(*box, shape, strict=True)) or _overlap(boxes):
        return "has rectangles that overlap or lie outside it"
    for piece in pieces:
        if piece["at"] + piece["bytes"] > file_bytes(piece["file"]):
            return f"has a rectangle outside the file {piece['file']}"
        if piece["bytes"] < math.prod(piece["size"]) * DTYPES[dtype].itemsize:
            return f"has a rectangle of {piece['size']} in only {piece['bytes']} bytes of the file {piece['file']}"
    return None


def _are_integers(values: object, least: int) -> bool:
    """True for a list of integers (no booleans, no floats) that are not below `least`."""
    return isinstance(values, list) and all(type(value) is int and value >= least for value in values)


def _is_piece(piece: object, dims: int) -> bool:
    return (
        isinstance(piece, dict)
        and piece.keys() >= _PIECE_KEYS
        and isinstance(piece["file"], str)
        and _are_integers(piece["offset"], 0)
        and _are_integers(piece["size"], 1)
        and len(piece["offset"]) == len(piece["size"]) == dims
        and _are_integers([piece["at"], piece["bytes"]], 0)
    )


def _overlap(boxes: list[tuple[list[int], list[int]]]) -> bool:
    """True if two boxes (offset, size) overlap. Each is compared with those that begin before it ends on dim 0."""
    ordered = sorted(boxes)
    for index, (offset, size) in enumerate(ordered):
        for other, other_size in ordered[index + 1 :]:
            if offset and other[0] >= offset[0] + size[0]:
                break
            if all(a < b + t and b < a + s for a, s, b, t in zip(offset, size, other, other_size, strict=True)):
                return True
    return False
