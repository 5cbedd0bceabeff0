"""nanochat's checkpoint folder (its checkpoint_manager.py): weights, meta file, optimizer state and tokenizer."""

import json
import re
from collections import OrderedDict
from dataclasses import asdict, fields
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path

import torch

from megachat.config import Config
from megachat.convert.architecture import shape_problems, table_names, weight_shapes
from megachat.convert.declaration import Export, Import, Tolerance
from megachat.convert.megachat import first_facts
from megachat.convert.nanochat_optimizer import read_optimizer, state_of_rank
from megachat.convert.nanochat_settings import config_of, dims_of_meta, loop_of, meta_of, param_groups_of
from megachat.convert.plain import writing
from megachat.convert.reader import CheckpointReader, TensorInfo
from megachat.convert.tokenizers import load_tokenizer_of
from megachat.data.tokenizer import Tokenizer
from megachat.errors import UserError, raise_if_unreadable
from megachat.planning.dimensions import Dimensions
from megachat.planning.plan import resolve
from megachat.prepare.tokenizer_training import export_nanochat as write_tokenizer

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
    dims = source.dims
    for setting in ("rotary_base", "qk_scale", "norm_epsilon", "value_embeddings"):
        theirs = next(field.default for field in fields(Dimensions) if field.name == setting)
        if getattr(dims, setting) != theirs:
            ours = f"the model has {setting} {getattr(dims, setting)}"
            raise UserError(f"{ours}, and nanochat computes {theirs}: it cannot be converted")
    tokenizer, _ = load_tokenizer_of(source, requested_tokenizer)
    rounded, dtype = table_names(dims), getattr(torch, tables)
    stored = source.select(
        source.entries, lambda name, tensor: tensor.to(dtype) if name.split("/")[1] in rounded else tensor
    )
    write = partial(write_nanochat, stored, tokenizer=tokenizer, ranks=ranks)
    if tables == "float32":
        return Export(write, open_nanochat)
    remark = f"embeddings and their moments are rounded to {tables}; the logits are compared with the unrounded"
    expected = stored.select(stored.entries, lambda name, tensor: tensor.to(getattr(torch, source.entries[name].dtype)))
    return Export(write, open_nanochat, ROUNDED_TABLES, expected, remarks=(remark,))


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
        problem = f"{source.folder} has no optimizer state of step {source.facts['step']}"
        raise UserError(f"{problem}: copy its optim files too, or give --fresh-optimizer")
    config, remarks = config_of(source)
    facts = first_facts(source, config, loop_of(source.facts["imported"]["meta"]))
    return Import(source, facts, *load_tokenizer_of(source, requested_tokenizer), remarks=tuple(remarks))


def open_nanochat(folder: Path, step: int | None = None) -> CheckpointReader:
    """Opens a step of a nanochat folder, the newest if none is given. Tensors stay in their files until they are read.

    Raises UserError for what is missing, damaged, of another model, or would execute code.
    """
    steps = saved_steps(folder)
    if not steps or (step is not None and step not in steps):
        has = f"it has steps {', '.join(map(str, steps))}" if steps else "it has no model_NNNNNN.pt"
        raise UserError(f"{folder} has no nanochat checkpoint{f' of step {step}' if step is not None else ''}: {has}")
    step = steps[-1] if step is None else step
    path = folder / f"meta_{step:06d}.json"
    try:
        meta = json.loads(path.read_text(encoding="utf-8")) | {"step": step}
    except (OSError, ValueError, TypeError) as error:
        raise_if_unreadable(path, error)
        raise UserError(f"{path} cannot be read ({error}): copy it next to the weights") from None
    dims, weights = dims_of_meta(meta, path), folder / f"model_{step:06d}.pt"
    model = {name.removeprefix(_COMPILED): tensor for name, tensor in _load_file(weights).items()}
    problems = shape_problems({name: tuple(tensor.shape) for name, tensor in model.items()}, weight_shapes(dims))
    if problems:
        raise UserError(f"{weights} is not of the model that {path.name} describes: {problems[0]}")
    parts = {f"model/{name}": [tensor] for name, tensor in model.items()}  # of each tensor, along dim 0
    facts = {"step": step, "model": asdict(dims)}
    groups, shards = None, _optimizer_files(folder, step)
    if shards:
        state, facts["adamw_steps"], groups = read_optimizer([_load_file(shard) for shard in shards], dims, shards)
        parts |= state
    facts["imported"] = {"form": "nanochat", "step": step, "meta": meta, "param_groups": groups}

    def read(names: list[str]) -> dict[str, torch.Tensor]:
        return {name: torch.cat(parts[name]) if len(parts[name]) > 1 else parts[name][0] for name in names}

    entries = {
        name: TensorInfo((sum(map(len, each)), *each[0].shape[1:]), str(each[0].dtype).removeprefix("torch."))
        for name, each in parts.items()
    }
    files = tuple(file.name for file in (path, weights, *shards))
    # in an export, or in nanochat's base folder
    tokenizers = folder / "tokenizer", folder.parent.parent / "tokenizer"
    remarks = () if groups else ("no optimizer state: there is no optim file of this step",)
    return CheckpointReader("nanochat", folder, facts, entries, read, files, tokenizers, remarks)


def _load_file(path: Path) -> dict:
    """Loads a dictionary that torch.save wrote; its tensors are read when they are used. Executes nothing."""
    try:
        loaded = torch.load(path, weights_only=True, mmap=True, map_location="cpu")
    except FileNotFoundError:
        raise UserError(f"{path} is missing: copy it next to the weights") from None
    except Exception as error:  # a damaged file may raise anything; torch refuses one that would execute code
        raise_if_unreadable(path, error)
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


def write_nanochat(source: CheckpointReader, folder: Path, tokenizer: Tokenizer, ranks: int) -> None:
    """Writes all files. The weights, then one rank's optimizer state, are in memory.

    Raises UserError if nanochat cannot divide its tables over the ranks.
    """
    step, dims, layout = source.facts["step"], source.dims, source.facts["layout"]
    config = Config.model_validate_json(json.dumps(source.facts["config"]))
    plan = resolve(config, layout["data"] * layout["tensor"] * layout["pipeline"], dims.vocab_size)
    meta = meta_of(source.facts, dims, config, plan)
    (folder / f"meta_{step:06d}.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")
    order = sorted(weight_shapes(dims), key=_state_position)
    tensors = source.tensors([f"model/{name}" for name in order])
    model = OrderedDict((name.removeprefix("model/"), tensor) for name, tensor in tensors)
    _save_file(model, folder / f"model_{step:06d}.pt")
    if source.has_optimizer:
        groups = param_groups_of(source.facts, dims, config, plan)
        for rank in range(ranks):
            state = {"state": state_of_rank(source, rank, ranks), "param_groups": groups}
            _save_file(state, folder / f"optim_{step:06d}_rank{rank}.pt")
    write_tokenizer(tokenizer, folder / "tokenizer")


def _state_position(name: str) -> int:
    return next(index for index, pattern in enumerate(STATE_ORDER) if fnmatchcase(name, pattern))


def _save_file(value: dict, path: Path) -> None:
    with writing(path):
        torch.save(value, path)
