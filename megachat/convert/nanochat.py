"""nanochat's checkpoint folder (its checkpoint_manager.py): weights, meta file, optimizer state and tokenizer."""

import copy
import json
import re
from collections import OrderedDict
from dataclasses import asdict, replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path

import torch

from megachat.convert.architecture import Shape, neutral_tensors, shape_problems, table_names, weight_shapes
from megachat.convert.declaration import Export, Import, Tolerance
from megachat.convert.megachat import first_facts
from megachat.convert.nanochat_optimizer import read_optimizer, state_of_rank
from megachat.convert.nanochat_settings import (
    EMBEDDED,
    config_of,
    dims_of_meta,
    layout_of,
    loop_of,
    meta_of,
    param_groups_of,
    remarks_of_export,
)
from megachat.convert.nanochat_versions import CURRENT, Version, version_of_model, version_of_tensors
from megachat.convert.plain import writing
from megachat.convert.reader import CheckpointReader, TensorInfo
from megachat.convert.tokenizers import load_tokenizer_of
from megachat.data.tokenizer import Tokenizer
from megachat.device import DTYPES, dtype_name
from megachat.errors import UserError, raise_if_unreadable
from megachat.files import lfs_problem, refuse_damaged
from megachat.planning.dimensions import Dimensions
from megachat.prepare.tokenizer_training import export_nanochat_tokenizer as write_tokenizer

# Rounding the tables was requested, so the logits may differ from the source's; the certificate states by how much.
ROUNDED_TABLES = Tolerance(logit=0.25, kl=1e-3, argmax=0.95)
_COMPILED = "_orig_mod."  # torch.compile's prefix, which some checkpoints have
# nanochat's order of parameters in its state_dict, as patterns of our names; within a pattern the model's order.
STATE_ORDER = "resid_lambdas x0_lambdas *_lambda transformer.* lm_head.* smear_gate.* value_embeds.*".split()


def saved_steps(folder: Path) -> list[int]:
    """Returns the steps whose weights are in the folder, in order."""
    return sorted(
        int(match[1]) for path in folder.glob("model_*.pt") if (match := re.fullmatch(r"model_(\d+)\.pt", path.name))
    )


def export_nanochat(
    source: CheckpointReader, requested_tokenizer: Path | None, *, ranks: int = 1, tables: str = "float32"
) -> Export:
    """All files of a nanochat job of `ranks` ranks. tables: dtype of the embedding tables and their moments.

    Raises UserError for a model that nanochat does not have.
    """
    if ranks < 1:
        raise UserError(f"--ranks is {ranks}: give 1 or more")
    source = _without_norm_scales(source)
    dims = source.dims
    version = version_of_model(dims)
    tokenizer, _ = load_tokenizer_of(source, requested_tokenizer)
    rounded, dtype = table_names(dims), DTYPES[tables]
    names, remarks = list(source.entries), remarks_of_export(source)
    if not version.is_current:
        names = [name for name in names if name.startswith("model/")]
        remarks.append(f"written as a nanochat {version.dates} has it, without the optimizer's state")
    stored = source.select(names, lambda name, tensor: tensor.to(dtype) if name.split("/")[1] in rounded else tensor)
    write = partial(write_nanochat, stored, tokenizer=tokenizer, ranks=ranks, version=version)
    if tables == "float32":
        return Export(write, _open_with_settings, expected=stored, remarks=tuple(remarks))
    remarks.append(f"embeddings and their moments are rounded to {tables}; the logits are compared with the unrounded")
    expected = stored.select(stored.entries, lambda name, tensor: tensor.to(DTYPES[source.entries[name].dtype]))
    return Export(write, _open_with_settings, ROUNDED_TABLES, expected, remarks=tuple(remarks))


def _without_norm_scales(source: CheckpointReader) -> CheckpointReader:
    """Returns the checkpoint without learned scales of norms. Raises UserError if one of them is not 1."""
    dims = source.dims
    if not dims.norm_scales:
        return source
    scales = weight_shapes(dims).keys() - weight_shapes(replace(dims, norm_scales=())).keys()
    for name, scale in source.tensors([f"model/{name}" for name in scales]):
        if not bool((scale == 1).all()):
            what = f"the model has learned scales of norms ({name.removeprefix('model/')} is not 1)"
            raise UserError(f"{what}, which nanochat does not have: convert it to safetensors or to-hf instead")
    names = [name for name in source.entries if name.split("/")[1] not in scales]
    config = copy.deepcopy(source.facts.get("config", {}))
    config.get("model", {}).pop("norm_scales", None)
    config.get("optimizer", {}).pop("qk_clip", None)  # which only changes them
    facts = source.facts | {"model": source.facts["model"] | {"norm_scales": ()}, "config": config}
    return source.select(names, facts=facts)


def _open_with_settings(folder: Path) -> CheckpointReader:
    """Opens an export with the config that an import of it has. The meta file of an import is compared itself."""
    reader = open_nanochat(folder)
    if EMBEDDED not in reader.facts["imported"]["meta"]:
        return reader
    return reader.select(reader.entries, facts=reader.facts | {"config": config_of(reader)[0]})


def import_nanochat_run(
    source: CheckpointReader, requested_tokenizer: Path | None, *, fresh_optimizer: bool = False
) -> Import:
    """A checkpoint that continues where nanochat stopped. fresh_optimizer: leave out its optimizer's state.

    Raises UserError if there is no optimizer state, unless a fresh one is requested.
    """
    if fresh_optimizer:
        weights = [name for name in source.entries if name.startswith("model/")]
        source = source.select(weights, facts=source.facts | {"adamw_steps": 0})
    elif not source.has_optimizer:
        if source.facts["imported"].get("version"):
            problem = f"{source.folder} is of a nanochat {source.facts['imported']['version']}"
            raise UserError(f"{problem}, whose optimizer cannot be continued: give --fresh-optimizer")
        problem = f"{source.folder} has no optimizer state of step {source.facts['step']}"
        raise UserError(f"{problem}: copy its optim files too, or give --fresh-optimizer")
    config, remarks = config_of(source)
    facts = first_facts(source, config, loop_of(source.facts["imported"]["meta"])) | layout_of(source)
    return Import(source, facts, *load_tokenizer_of(source, requested_tokenizer), remarks=tuple(remarks))


def open_nanochat(folder: Path, step: int | None = None) -> CheckpointReader:
    """Opens a step of a nanochat folder, the newest if none is given. Tensors stay in their files until they are read.

    Raises UserError for what is missing, damaged, of another model, or would execute code.
    """
    step = _choose_step(folder, step)
    meta_file, weights_file = folder / f"meta_{step:06d}.json", folder / f"model_{step:06d}.pt"
    with refuse_damaged(meta_file, "cannot be read ({}): copy it next to the weights"):
        meta = json.loads(meta_file.read_text(encoding="utf-8")) | {"step": step}
    model = {name.removeprefix(_COMPILED): tensor for name, tensor in _load_tensor_file(weights_file).items()}
    version = version_of_tensors({name: tuple(tensor.shape) for name, tensor in model.items()}, weights_file)
    dims = dims_of_meta(meta, meta_file, version)
    weights = _complete_parts(model, dims, version)
    if problems := shape_problems({name: _joined_shape(each) for name, each in weights.items()}, weight_shapes(dims)):
        raise UserError(f"{weights_file} is not of the model that {meta_file.name} describes: {problems[0]}")

    parts = {f"model/{name}": each for name, each in weights.items()}
    facts: dict = {"step": step, "model": asdict(dims)}
    imported = {"form": "nanochat", "step": step, "meta": meta, "param_groups": None}
    optimizer_files, remark = [], None
    if not version.is_current:
        imported["version"] = version.dates
        remark = f"of a nanochat {version.dates}: what it lacks has values without effect; its optimizer is not read"
    elif optimizer_files := _optimizer_files(folder, step):
        ranks = [_load_file(file) for file in optimizer_files]
        state, facts["adamw_steps"], imported["param_groups"] = read_optimizer(ranks, dims, optimizer_files)
        parts |= state
    else:
        remark = "no optimizer state: there is no optim file of this step"
    facts["imported"] = imported

    return CheckpointReader(
        "nanochat",
        folder,
        facts,
        {name: TensorInfo(_joined_shape(each), dtype_name(each[0].dtype)) for name, each in parts.items()},
        lambda names: {name: torch.cat(parts[name]) if len(parts[name]) > 1 else parts[name][0] for name in names},
        files=tuple(file.name for file in (meta_file, weights_file, *optimizer_files)),
        # in an export, or in nanochat's base folder
        tokenizer_folders=(folder / "tokenizer", folder.parent.parent / "tokenizer"),
        remarks=(remark,) if remark else (),
    )


def _choose_step(folder: Path, step: int | None) -> int:
    """Returns the step, the newest if none is given. Raises UserError if the folder does not have it."""
    steps = saved_steps(folder)
    if steps and (step is None or step in steps):
        return steps[-1] if step is None else step
    has = f"it has steps {', '.join(map(str, steps))}" if steps else "it has no model_NNNNNN.pt"
    raise UserError(f"{folder} has no nanochat checkpoint{f' of step {step}' if step is not None else ''}: {has}")


def _joined_shape(parts: list[torch.Tensor]) -> Shape:
    """Returns the shape of a tensor that consists of these parts along dim 0."""
    return (sum(map(len, parts)), *parts[0].shape[1:]) if parts[0].ndim else ()


def _complete_parts(
    model: dict[str, torch.Tensor], dims: Dimensions, version: Version
) -> dict[str, list[torch.Tensor]]:
    """Returns the parts of each tensor along dim 0, with neutral values for what an older version lacks."""
    parts = {name: [tensor] for name, tensor in model.items()}
    if not version.is_current:
        neutral, padding = neutral_tensors(dims), dims.padded_vocab - dims.vocab_size
        parts |= {name: [neutral[name]] for name in version.absent if name not in parts}
        for name in ("transformer.wte.weight", "lm_head.weight"):  # the first nanochats did not pad their tables
            if name in model and model[name].shape == (dims.vocab_size, dims.width) and padding:
                parts[name].append(model[name].new_zeros(padding, dims.width))
    return parts


def _load_tensor_file(path: Path) -> dict[str, torch.Tensor]:
    """Loads a dictionary of tensors. Raises UserError if it holds anything else, or a dtype that our table lacks."""
    loaded = _load_file(path)
    for name, tensor in loaded.items():
        kind = dtype_name(tensor.dtype) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
        if kind not in DTYPES or not isinstance(name, str):
            raise UserError(f"{path} has {name} as {kind}, and not as a tensor of {', '.join(DTYPES)}: copy it again")
    return loaded


def _load_file(path: Path) -> dict:
    """Loads a dictionary that torch.save wrote; its tensors are read when they are used. Executes nothing."""
    try:
        loaded = torch.load(path, weights_only=True, mmap=True, map_location="cpu")
    except FileNotFoundError:
        raise UserError(f"{path} is missing: copy it next to the weights") from None
    except Exception as error:  # a damaged file may raise anything; torch refuses one that would execute code
        raise_if_unreadable(path, error)
        if pointer := lfs_problem(path):
            raise UserError(f"{path} {pointer}") from None
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        problem = f"it is damaged, or holds more than tensors and numbers ({first[:200]})"
        raise UserError(f"{path} is refused: {problem}; take it from its source again") from None
    if not isinstance(loaded, dict):
        problem = f"{path} holds a {type(loaded).__name__}, not a dictionary of tensors"
        raise UserError(f"{problem}: it is no file of nanochat's")
    return loaded


def _optimizer_files(folder: Path, step: int) -> list[Path]:
    pattern = re.compile(rf"optim_{step:06d}_rank(\d+)\.pt")
    by_rank = {int(match[1]): path for path in folder.iterdir() if (match := pattern.fullmatch(path.name))}
    last = max(by_rank, default=-1)
    for rank in range(last):
        if rank not in by_rank:
            missing = f"optim_{step:06d}_rank{rank}.pt"
            raise UserError(f"{folder} has optimizer files up to rank {last} but not {missing}: copy all of them")
    return [by_rank[rank] for rank in sorted(by_rank)]


def write_nanochat(
    source: CheckpointReader, folder: Path, tokenizer: Tokenizer, ranks: int, version: Version = CURRENT
) -> None:
    """Writes all files. The weights, then one rank's optimizer state, are in memory.

    Raises UserError if nanochat cannot divide its tables over the ranks.
    """
    step, dims = source.facts["step"], source.dims
    meta = meta_of(source.facts, dims)
    (folder / f"meta_{step:06d}.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")
    order = sorted((name for name in weight_shapes(dims) if name not in version.absent), key=_state_position)
    tensors = source.tensors([f"model/{name}" for name in order])
    model = OrderedDict((name.removeprefix("model/"), tensor) for name, tensor in tensors)
    _save_file(model, folder / f"model_{step:06d}.pt")
    if source.has_optimizer:
        groups = param_groups_of(source.facts, dims)
        for rank in range(ranks):
            state = {"state": state_of_rank(source, rank, ranks), "param_groups": groups}
            _save_file(state, folder / f"optim_{step:06d}_rank{rank}.pt")
    write_tokenizer(tokenizer, folder / "tokenizer")


def _state_position(name: str) -> int:
    return next(index for index, pattern in enumerate(STATE_ORDER) if fnmatchcase(name, pattern))


def _save_file(value: dict, path: Path) -> None:
    with writing(path):
        torch.save(value, path)
