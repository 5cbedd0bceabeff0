"""nanochat's optimizer state (its optim.py): parameter groups, and one file per rank of the job that wrote it.

AdamW's moments are whole on every rank for parameters below SMALL_ELEMENTS; otherwise each rank has an equal share of
dim 0. Muon's are stacked over all matrices of one shape; each rank has a chunk of the stack, the last ones padded.
"""

import math
from fnmatch import fnmatchcase
from pathlib import Path

import torch

from megachat.convert.architecture import Shape, moment_shapes, weight_shapes
from megachat.convert.reader import CheckpointReader
from megachat.device import DTYPES
from megachat.errors import UserError
from megachat.optim.groups import GROUPS, Group, group_of
from megachat.parallel.rectangles import MOMENTS
from megachat.planning.dimensions import Dimensions

SMALL_ELEMENTS = 1024
# Our groups in the order in which nanochat numbers their parameters. Its Muon groups follow, one per shape.
GROUP_ORDER = ("unembedding", "embedding", "value_embedding", "resid", "x0", "smear")
STACKS = {"momentum": "momentum_buffer", "second_moment": "second_momentum_buffer"}  # our names -> nanochat's


def optimizer_groups(dims: Dimensions) -> list[tuple[Group, list[str]]]:
    """Returns nanochat's parameter groups in its order: (our group, parameter names). Muon's are sorted by shape."""
    shapes, by_name = weight_shapes(dims), {group.name: group for group in GROUPS}
    groups = []
    for group in map(by_name.__getitem__, GROUP_ORDER):
        groups.append((group, [name for pattern in group.patterns for name in shapes if fnmatchcase(name, pattern)]))
    by_shape: dict[Shape, list[str]] = {}
    for name, shape in shapes.items():
        if group_of(name).optimizer == "muon":
            by_shape.setdefault(shape, []).append(name)
    return groups + [(group_of(names[0]), names) for _, names in sorted(by_shape.items())]


def nanochat_shares(whole: Shape, ranks: int) -> list[tuple[int, int]]:
    """Returns rows [first, end) of dim 0 of each rank's moments. Raises UserError if nanochat cannot divide them."""
    if ranks == 1 or torch.Size(whole).numel() < SMALL_ELEMENTS:
        return [(0, whole[0])] * ranks
    if whole[0] % ranks:
        problem = f"nanochat divides the {whole[0]} rows of its tables evenly, and {ranks} ranks cannot"
        raise UserError(f"{problem}: give another number of --ranks")
    share = whole[0] // ranks
    return [(rank * share, (rank + 1) * share) for rank in range(ranks)]


def read_optimizer(
    states: list[dict], dims: Dimensions, files: list[Path]
) -> tuple[dict[str, list[torch.Tensor]], int, list[dict]]:
    """Returns (parts of each tensor along dim 0 by our names, AdamW's steps, param_groups of rank 0) of all ranks'
    files.

    Raises UserError if they do not fit the model or each other.
    """
    tensors: dict[str, list[torch.Tensor]] = {}
    steps: set[int] = set()
    try:
        groups = states[0]["param_groups"]
        expected, shapes, first = optimizer_groups(dims), weight_shapes(dims), 0
        if [len(group["params"]) for group in groups] != [len(names) for _, names in expected]:
            problem = "has other parameter groups than nanochat makes for this model"
            raise UserError(f"{files[0]} {problem}: it cannot be converted")
        for (ours, names), group in zip(expected, groups, strict=True):
            if not all(math.isfinite(group[key]) and group[key] >= 0 for key in ("initial_lr", "weight_decay")):
                raise UserError(
                    f"{files[0]} has a rate or a decay that is negative or not finite: it cannot be converted"
                )
            if group["params"] != list(range(first, first + len(names))):
                problem = "numbers its parameters in another order than nanochat does"
                raise UserError(f"{files[0]} {problem}: it cannot be converted")
            first += len(names)
            if ours.optimizer == "muon":
                ranks = [state["state"][group["params"][0]] for state in states]
                tensors |= _read_muon(names, ranks, shapes[names[0]], files)
                continue
            for name, number in zip(names, group["params"], strict=True):
                ranks = [state["state"][number] for state in states]
                steps |= {int(rank["step"]) for rank in ranks}
                tensors |= _read_adamw(name, ranks, shapes[name], files)
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        problem = f"is no optimizer state of nanochat's ({type(error).__name__}: {error})"
        raise UserError(f"{files[0]} {problem}: copy it again") from None
    if len(steps) != 1:
        problem = f"AdamW's steps differ between parameters or ranks ({sorted(steps)})"
        raise UserError(f"{files[0].parent}: {problem}: copy all files of one step")
    return tensors, steps.pop(), groups


def _read_adamw(name: str, ranks: list[dict], whole: Shape, files: list[Path]) -> dict[str, list[torch.Tensor]]:
    tensors, shares = {}, nanochat_shares(whole, len(ranks))
    for kind in MOMENTS:
        parts = [rank[kind] for rank in ranks]
        for part, (begin, end), file in zip(parts, shares, files, strict=True):
            _check_shape(part, (end - begin, *whole[1:]), f"{kind} of {name}", file)
        if shares[0] == (0, whole[0]):
            if not all(torch.equal(part, parts[0]) for part in parts):
                problem = f"the ranks have different values in {kind} of {name}"
                raise UserError(f"{files[0].parent}: {problem}: the files are not of one job")
            parts = parts[:1]
        tensors[f"adamw/{name}/{kind}"] = parts
    return tensors


def _read_muon(names: list[str], ranks: list[dict], shape: Shape, files: list[Path]) -> dict[str, list[torch.Tensor]]:
    tensors, chunk = {}, -(-len(names) // len(ranks))
    for kind, each in moment_shapes("muon", shape).items():
        for rank, file in zip(ranks, files, strict=True):
            _check_shape(rank[STACKS[kind]], (chunk, *each), f"{STACKS[kind]} of {names[0]} and its like", file)
        for index, name in enumerate(names):
            tensors[f"muon/{name}/{kind}"] = [ranks[index // chunk][STACKS[kind]][index % chunk]]
    return tensors


def _check_shape(tensor: torch.Tensor, shape: Shape, what: str, file: Path) -> None:
    if tensor.dtype not in DTYPES.values():
        raise UserError(f"{file} has {what} as {tensor.dtype}, which is none of {', '.join(DTYPES)}: copy it again")
    if tuple(tensor.shape) != shape:
        problem = f"{file} has {what} as {list(tensor.shape)}, not {list(shape)}"
        raise UserError(f"{problem}: it is of another model or another number of ranks")


def state_of_rank(source: CheckpointReader, rank: int, ranks: int) -> dict[int, dict]:
    """Returns what nanochat's optimizer keeps on one of `ranks` ranks, by its numbers of the parameters."""
    state: dict[int, dict] = {}
    number, shapes = 0, weight_shapes(source.dims)
    for group, names in optimizer_groups(source.dims):
        if group.optimizer == "muon":
            state[number] = _stacks_of_rank(source, names, shapes[names[0]], rank, ranks)
        else:
            for index, name in enumerate(names, start=number):
                begin, end = nanochat_shares(shapes[name], ranks)[rank]
                whole = source.tensors([f"adamw/{name}/{kind}" for kind in MOMENTS])
                shares = {key.split("/")[-1]: tensor[begin:end].clone() for key, tensor in whole}
                state[index] = {"step": int(source.facts["adamw_steps"])} | shares
        number += len(names)
    return state


def _stacks_of_rank(source: CheckpointReader, names: list[str], shape: Shape, rank: int, ranks: int) -> dict:
    stacks, chunk = {}, -(-len(names) // ranks)
    for kind, each in moment_shapes("muon", shape).items():
        stack = stacks[STACKS[kind]] = torch.zeros(chunk, *each)
        members = [f"muon/{name}/{kind}" for name in names[rank * chunk : (rank + 1) * chunk]]
        for index, (_, whole) in enumerate(source.tensors(members)):
            stack[index] = whole
    return stacks
