"""nanochat's checkpoint folder, opened: model_NNNNNN.pt, optim_NNNNNN_rankR.pt and meta_NNNNNN.json (its checkpoint_manager.py and optim.py).

The optimizer's state is one file a rank of the job that wrote it. AdamW's moments are whole on every rank for parameters below SMALL_ELEMENTS,
else each rank has its equal share of dim 0. Muon's are stacked over all matrices of one shape; each rank has a chunk of the stack, the last
ones padded with zeros.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import asdict, fields
from pathlib import Path

import torch

from megachat.checkpoint.storage import RectanglesByName
from megachat.convert.architecture import shape_problems, weight_shapes
from megachat.convert.opened import Entry, Opened
from megachat.errors import UserError
from megachat.optim.groups import GROUPS, group_of
from megachat.optim.muon import second_moment_shape
from megachat.planning.dimensions import Dimensions, window_sizes

SMALL_ELEMENTS = 1024
GROUP_ORDER = (
    "unembedding",
    "embedding",
    "value_embedding",
    "resid",
    "x0",
    "smear",
)  # nanochat's, as it numbers parameters
_SMEAR_ORDER = ("smear_gate.weight", "smear_lambda", "backout_lambda")
_CONFIG_KEYS = {"sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd", "window_pattern"}
_COMPILED = "_orig_mod."  # torch.compile's prefix, which some checkpoints have


def refuse_others(dims: Dimensions) -> None:
    """Raise UserError for a model that nanochat does not compute."""
    for setting in ("rotary_base", "qk_scale", "norm_epsilon", "value_embeddings"):
        theirs = next(field.default for field in fields(Dimensions) if field.name == setting)
        if getattr(dims, setting) != theirs:
            raise UserError(
                f"the model has {setting} {getattr(dims, setting)}, and nanochat computes {theirs}: it cannot be converted"
            )


def optimizer_groups(dims: Dimensions) -> list[tuple[str, list[str]]]:
    """nanochat's parameter groups in its order: (our group's name, parameter names); Muon's are one a shape, smaller shapes first."""
    shapes = weight_shapes(dims)
    members = {group.name: [name for name in shapes if group_of(name) is group] for group in GROUPS}
    members["smear"] = list(_SMEAR_ORDER)
    by_shape: dict[tuple[int, ...], list[str]] = {}
    for name in members["matrix"]:
        by_shape.setdefault(shapes[name], []).append(name)
    return [(name, members[name]) for name in GROUP_ORDER] + [("matrix", by_shape[shape]) for shape in sorted(by_shape)]


def steps_in(folder: Path) -> list[int]:
    """The steps of which there are weights, in order."""
    return sorted(
        int(match[1]) for path in folder.glob("model_*.pt") if (match := re.fullmatch(r"model_(\d+)\.pt", path.name))
    )


def dims_of_meta(meta: dict, path: Path) -> Dimensions:
    """The model's sizes. Raises UserError for keys that are missing or that this version does not know."""
    try:
        told = dict(meta["model_config"])
        if unknown := sorted(told.keys() - _CONFIG_KEYS):
            raise UserError(
                f"{path}: model_config has {unknown[0]}, which no nanochat model that megachat knows has: it cannot be converted"
            )
        pattern = told.setdefault("window_pattern", "L").upper()  # nanochat's own reading of older ones
        depth, heads, length = told["n_layer"], told["n_head"], told["sequence_len"]
        if told["n_embd"] % heads or not re.fullmatch("[SL]+", pattern):
            raise UserError(
                f"{path}: model_config has n_embd {told['n_embd']}, n_head {heads} and windows {pattern}, which is no nanochat model"
            )
        windows = window_sizes(pattern, depth, length)
        return Dimensions(
            depth,
            told["n_embd"],
            heads,
            told["n_kv_head"],
            told["n_embd"] // heads,
            length,
            told["vocab_size"],
            windows,
        )
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise UserError(
            f"{path} does not tell the model's sizes ({type(error).__name__}: {error}): copy it again"
        ) from None


def open_nanochat(folder: Path, step: int | None = None) -> Opened:
    """A step of a nanochat folder, the newest when none is asked for. Tensors stay in their files until they are read.

    Raises UserError for what is missing, damaged, of another model, or would execute code.
    """
    steps = steps_in(folder)
    if not steps or (step is not None and step not in steps):
        has = f"it has steps {', '.join(map(str, steps))}" if steps else "it has no model_NNNNNN.pt"
        raise UserError(f"{folder} has no nanochat checkpoint{f' of step {step}' if step is not None else ''}: {has}")
    step = steps[-1] if step is None else step
    path = folder / f"meta_{step:06d}.json"
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): copy it next to the weights") from None
    dims, weights = dims_of_meta(meta, path), folder / f"model_{step:06d}.pt"
    model = {name.removeprefix(_COMPILED): tensor for name, tensor in load_file(weights).items()}
    problems = shape_problems({name: tuple(tensor.shape) for name, tensor in model.items()}, weight_shapes(dims))
    if problems:
        raise UserError(f"{weights} is not of the model that {path.name} describes: {problems[0]}")
    pieces = {
        f"model/{name}": (tuple(tensor.shape), [((0,) * tensor.ndim, tuple(tensor.shape), tensor)])
        for name, tensor in model.items()
    }
    files, steps_done, groups = [path.name, weights.name], None, None
    if shards := _shards(folder, step):
        more, steps_done, groups = optimizer_pieces([load_file(shard) for shard in shards], dims, shards)
        pieces |= more
        files += [shard.name for shard in shards]
    return _opened(folder, meta | {"step": step}, dims, pieces, steps_done, groups, files)


def _opened(
    folder: Path, meta: dict, dims: Dimensions, pieces: RectanglesByName, adamw_steps, groups, files: list[str]
) -> Opened:
    def read(names: list[str]) -> dict[str, torch.Tensor]:
        return {name: assembled(*pieces[name]) for name in names}

    entries = {
        name: Entry(shape, str(rectangles[0][2].dtype).removeprefix("torch."))
        for name, (shape, rectangles) in pieces.items()
    }
    imported = {"form": "nanochat", "step": meta["step"], "meta": meta, "param_groups": groups}
    facts = {"step": meta["step"], "model": asdict(dims), "imported": imported}
    if adamw_steps is not None:
        facts["adamw_steps"] = adamw_steps
    remarks = () if groups else ("no optimizer state: there is no optim file of this step",)
    return Opened("nanochat", folder, facts, entries, read, tuple(files), remarks)


def assembled(shape: tuple[int, ...], rectangles) -> torch.Tensor:
    """A whole tensor of its rectangles; the one tensor itself where it is whole."""
    if len(rectangles) == 1 and rectangles[0][1] == shape:
        return rectangles[0][2]
    whole = torch.empty(shape, dtype=rectangles[0][2].dtype)
    for offsets, sizes, part in rectangles:
        whole[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))] = part
    return whole


def load_file(path: Path) -> dict:
    """A dictionary that torch.save wrote, its tensors read from the file when they are used. Executes nothing; raises UserError."""
    try:
        loaded = torch.load(path, weights_only=True, mmap=True, map_location="cpu")
    except FileNotFoundError:
        raise UserError(f"{path} is missing: copy it next to the weights") from None
    except Exception as error:  # a damaged file may raise anything; one that would execute code is refused by torch
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{path} is refused: it is damaged, or holds more than tensors and numbers ({first[:200]}); take it from its source again"
        ) from None
    if not isinstance(loaded, dict):
        raise UserError(
            f"{path} holds a {type(loaded).__name__}, not a dictionary of tensors: it is no file of nanochat's"
        )
    return loaded


def _shards(folder: Path, step: int) -> list[Path]:
    pattern = re.compile(rf"optim_{step:06d}_rank(\d+)\.pt")
    found = {int(match[1]): path for path in folder.iterdir() if (match := pattern.fullmatch(path.name))}
    for rank in range(max(found, default=-1)):
        if rank not in found:
            raise UserError(
                f"{folder} has optimizer files up to rank {max(found)} but not optim_{step:06d}_rank{rank}.pt: copy all of them"
            )
    return [found[rank] for rank in sorted(found)]


def optimizer_pieces(
    states: list[dict], dims: Dimensions, files: list[Path]
) -> tuple[RectanglesByName, int, list[dict]]:
    """(rectangles by our names, AdamW's steps, param_groups of rank 0) of the shards of all ranks. Raises UserError when they do not fit."""
    pieces: dict[str, tuple] = {}
    steps = set()
    try:
        groups = states[0]["param_groups"]
        ours, shapes, first = optimizer_groups(dims), weight_shapes(dims), 0
        if [len(group["params"]) for group in groups] != [len(names) for _, names in ours]:
            raise UserError(
                f"{files[0]} has other parameter groups than nanochat makes for this model: it cannot be converted"
            )
        for (kind, names), group in zip(ours, groups, strict=True):
            own = [
                [state["state"][index] for state in states]
                for index in group["params"][: 1 if kind == "matrix" else None]
            ]
            if group["params"] != list(range(first, first + len(names))):
                raise UserError(
                    f"{files[0]} numbers its parameters in another order than nanochat does: it cannot be converted"
                )
            first += len(names)
            if kind == "matrix":
                pieces |= _muon_pieces(names, own[0], shapes[names[0]], files)
                continue
            for name, ranks in zip(names, own, strict=True):
                steps |= {int(rank["step"]) for rank in ranks}
                pieces |= _adamw_pieces(name, ranks, shapes[name], files)
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise UserError(
            f"{files[0]} is no optimizer state of nanochat's ({type(error).__name__}: {error}): copy it again"
        ) from None
    if len(steps) != 1:
        raise UserError(
            f"{files[0].parent}: AdamW's steps differ between parameters or ranks ({sorted(steps)}): copy all files of one step"
        )
    return pieces, steps.pop(), groups


def _adamw_pieces(name: str, ranks: list[dict], whole: tuple[int, ...], files: list[Path]) -> dict:
    pieces = {}
    for kind in ("exp_avg", "exp_avg_sq"):
        parts = [rank[kind] for rank in ranks]
        shares = adamw_shares(whole, len(ranks))
        for part, (begin, end), file in zip(parts, shares, files, strict=True):
            _expect(part, (end - begin, *whole[1:]), f"{kind} of {name}", file)
        if shares[0] == (0, whole[0]):
            if not all(torch.equal(part, parts[0]) for part in parts):
                raise UserError(
                    f"{files[0].parent}: the ranks keep different values in {kind} of {name}: the files are not of one job"
                )
            parts, shares = parts[:1], shares[:1]
        rest = (0,) * (len(whole) - 1)
        pieces[f"adamw/{name}/{kind}"] = (
            whole,
            [((begin, *rest), tuple(part.shape), part) for part, (begin, _) in zip(parts, shares, strict=True)],
        )
    return pieces


def _muon_pieces(names: list[str], ranks: list[dict], shape: tuple[int, int], files: list[Path]) -> dict:
    chunk = -(-len(names) // len(ranks))
    pieces = {}
    for ours, theirs, each in (
        ("momentum", "momentum_buffer", shape),
        ("second_moment", "second_momentum_buffer", second_moment_shape(shape)),
    ):
        for rank, file in zip(ranks, files, strict=True):
            _expect(rank[theirs], (chunk, *each), f"{theirs} of {names[0]} and its like", file)
        for index, name in enumerate(names):
            part = ranks[index // chunk][theirs][index % chunk]
            pieces[f"muon/{name}/{ours}"] = each, [((0, 0), each, part)]
    return pieces


def _expect(tensor: torch.Tensor, shape: Iterable[int], what: str, file: Path) -> None:
    if tuple(tensor.shape) != tuple(shape):
        raise UserError(
            f"{file} has {what} as {list(tensor.shape)}, not {list(shape)}: it is of another model or another number of ranks"
        )


def adamw_shares(whole: tuple[int, ...], ranks: int) -> list[tuple[int, int]]:
    """Rows [first, end) of dim 0 of each rank's moments. Raises UserError when nanochat could not divide it."""
    if ranks == 1 or torch.Size(whole).numel() < SMALL_ELEMENTS:
        return [(0, whole[0])] * ranks
    if whole[0] % ranks:
        raise UserError(
            f"nanochat divides the {whole[0]} rows of its tables evenly, and {ranks} ranks cannot: give another number of --ranks"
        )
    share = whole[0] // ranks
    return [(rank * share, (rank + 1) * share) for rank in range(ranks)]
