"""Our own format: opening a checkpoint folder, and writing one from another format's tensors."""

import shutil
from dataclasses import asdict
from pathlib import Path

import torch

from megachat.checkpoint.facts import checkpoint_name, checkpoint_step, read_facts
from megachat.checkpoint.index import read_index
from megachat.checkpoint.resume import newest_complete
from megachat.checkpoint.save import save_checkpoint
from megachat.checkpoint.storage import load_checkpoint
from megachat.config import Config, config_from_values, save_config
from megachat.convert.architecture import state_shapes
from megachat.convert.declaration import Import
from megachat.convert.reader import CheckpointReader, TensorInfo
from megachat.data.tokenizer import save_tokenizer
from megachat.device import DTYPES
from megachat.errors import UserError
from megachat.evals.results import recorded_validation
from megachat.files import CHECKPOINTS, CONFIG_NAME, TOKENIZER, path_kind
from megachat.parallel.mesh import Axis
from megachat.planning.plan import Layout
from megachat.planning.sizes import resolve_dimensions
from megachat.text import number_ranges

_ONE_RANK = Axis("world", 1, 0, None, (0,))


def open_megachat(step_folder: Path) -> CheckpointReader:
    """Opens a complete checkpoint folder. Raises UserError if it is none."""
    facts = read_facts(step_folder)
    if "loop" in facts:
        facts["loop"] = _with_validation(facts["loop"], step_folder)
    entries = {
        name: TensorInfo(tuple(entry["shape"]), entry["dtype"]) for name, entry in read_index(step_folder).items()
    }

    def read(names: list[str]) -> dict[str, torch.Tensor]:
        whole = {name: torch.empty(entries[name].shape, dtype=DTYPES[entries[name].dtype]) for name in names}
        load_checkpoint(step_folder, {name: whole_piece(tensor) for name, tensor in whole.items()})
        return whole

    files = tuple(sorted(facts["files"]))
    return CheckpointReader("megachat", step_folder, facts, entries, read, files, tokenizer_folders(step_folder, facts))


def _with_validation(loop: dict, step_folder: Path) -> dict:
    """Returns the loop's counters with the validation of the checkpoint's step, which follows the save."""
    value = None
    if "validation" in loop.get("pending", ()):
        value = recorded_validation(step_folder.parent.parent, loop["step"])
    if value is None:
        return loop
    best = value if loop["min_val_bpb"] is None else min(value, loop["min_val_bpb"])
    return loop | {"val_bpb": value, "min_val_bpb": best}


def tokenizer_folders(folder: Path, facts: dict) -> tuple[Path, ...]:
    """Returns where the tokenizer may be: in the checkpoint, in its run folder, or where its config says.

    A relative path of the config is searched in the current folder, then in the folder in which the run was started.
    """
    config, defaults = facts.get("config") or {}, Config()
    configured = Path(config.get("data", {}).get("tokenizer", defaults.data.tokenizer))
    parts = Path(config.get("run", {}).get("folder", defaults.run.folder)).parts  # of the runs' folder
    runs = folder.absolute().parent.parent.parent
    started_in = [Path(*runs.parts[: -len(parts)])] if parts and runs.parts[-len(parts) :] == parts else []
    return folder / TOKENIZER, folder.parent.parent / TOKENIZER, configured, *(at / configured for at in started_in)


def find_step_folder(path: Path, step: int | None = None) -> Path:
    """Returns a run folder's checkpoint of a step, None for the newest, and any other path as it is.

    Raises UserError if it has none, or if the newest one is damaged: an older one has to be named.
    """
    folder = path / CHECKPOINTS
    if path_kind(folder) != "folder":
        return path
    if step is not None:
        if path_kind(folder / checkpoint_name(step)) != "folder":
            saved = sorted(each for name in folder.iterdir() if (each := checkpoint_step(name)) is not None)
            raise UserError(f"{path} has no step {step}: it has {number_ranges(saved) or 'none'}")
        return folder / checkpoint_name(step)
    newest, passed_over = newest_complete(folder)
    if newest is None:
        raise UserError(f"{path} holds no complete checkpoint" + (f": {passed_over[0]}" if passed_over else " yet"))
    if passed_over:
        raise UserError(
            f"the newest checkpoint of {path} is damaged: {passed_over[0]}; the newest good one is {newest}"
        )
    return newest


def write_megachat(new: Import, temporary: Path, target: Path) -> CheckpointReader:
    """Fills `temporary`, which will be renamed to `target`, and returns the checkpoint, opened again.

    It becomes a run folder, or a step's folder if the target has a step's name: then it must be the checkpoint's step.
    """
    name, steps = checkpoint_name(new.source.facts["step"]), temporary / CHECKPOINTS
    if checkpoint_step(target) is None:
        config = _run_config(new.facts["config"], target)
        _save(new, steps, config.model_dump(mode="json", exclude_defaults=True))
        save_config(config, temporary / CONFIG_NAME)
        save_tokenizer(temporary / TOKENIZER, new.tokenizer, new.origin)
        return open_megachat(steps / name)
    if target.name != name:
        raise UserError(f"{target} is not {name}, the checkpoint's step: give that name, or a run folder")
    _save(new, steps, new.facts["config"])
    for path in (steps / name).iterdir():
        path.rename(temporary / path.name)
    shutil.rmtree(steps)
    return open_megachat(temporary)


def _save(new: Import, folder: Path, config: dict) -> None:
    source = new.source
    tensors = {name: tensor.float() for name, tensor in source.tensors()}
    if not source.has_optimizer:
        row_optimizer = config.get("ngram", {}).get("optimizer", "adamw")
        shapes = state_shapes(source.dims, row_optimizer)
        tensors = {name: torch.zeros(shape) for name, shape in shapes.items()} | tensors
    pieces = {name: whole_piece(tensor) for name, tensor in tensors.items()}

    def copy_files(step_folder: Path) -> None:
        for name in new.copies:
            (step_folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source.folder / name, step_folder / name)

    tokenizer = {"fingerprint": new.tokenizer.fingerprint, "vocab_size": new.tokenizer.vocab_size}
    facts = new.facts | {"tokenizer": tokenizer, "config": config}
    save_checkpoint(folder, source.facts["step"], pieces, facts, copy_files, _ONE_RANK)


def whole_piece(tensor: torch.Tensor):
    """Returns a tensor as one rectangle, see `megachat.parallel.rectangles.RectanglesByName`."""
    shape = tuple(tensor.shape)
    return shape, [((0,) * tensor.ndim, shape, tensor)]


def _run_config(config: dict, run_folder: Path) -> Config:
    """Returns the config with the name, folder and tokenizer of the run folder."""
    run = config.get("run", {}) | {"name": run_folder.name, "folder": str(run_folder.parent)}
    data = config.get("data", {}) | {"tokenizer": str(run_folder / TOKENIZER)}
    return config_from_values(config | {"run": run, "data": data}, "the converted config")


def first_facts(source: CheckpointReader, config: dict, loop: dict) -> dict:
    """Returns the facts of a checkpoint that another program wrote. Counters that it lacks are those of a run's start.

    Raises UserError unless the config gives exactly the model's sizes.
    """
    dims = source.dims
    configured = resolve_dimensions(
        config_from_values(config, "the converted config"), dims.vocab_size, allocated=dims.lookup
    )
    if configured != dims:
        nearest = f"the nearest that a config can describe is {configured}"
        raise UserError(f"{source.folder} has a model of {dims}, and {nearest}: it cannot be continued here")
    counters = {"step": source.facts["step"], "training_s": 0.0, "skipped_steps": 0, "val_bpb": None}
    return {
        "model": asdict(dims),
        "loop": counters | {"min_val_bpb": None} | loop,
        "adamw_steps": source.facts.get("adamw_steps", 0),
        "loss_scaler": {},
        "config": config,
        "layout": asdict(Layout(1, 1, 1)),
        "ledger": None,
        "imported": source.facts["imported"],
    }
