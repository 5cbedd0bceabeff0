"""Our own format: opening a checkpoint folder, and writing one, with a run folder around it, from another format's
tensors."""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from megachat.checkpoint.facts import checkpoint_name, checkpoint_step, read_facts
from megachat.checkpoint.load import load_checkpoint
from megachat.checkpoint.resume import newest_complete
from megachat.checkpoint.save import save_checkpoint
from megachat.checkpoint.storage import RectanglesByName, read_index
from megachat.config import Config, save_config
from megachat.convert.architecture import state_shapes
from megachat.convert.reader import CheckpointReader, TensorInfo
from megachat.data.tokenizer import Tokenizer, save_tokenizer
from megachat.errors import UserError
from megachat.parallel.mesh import Axis
from megachat.planning.plan import Layout, resolve_dimensions

_ONE_RANK = Axis("world", 1, 0, None, (0,))


def open_megachat(step_folder: Path) -> CheckpointReader:
    """Opens a complete checkpoint folder. Raises UserError if it is none."""
    facts = read_facts(step_folder)
    try:
        entries = {
            name: TensorInfo(tuple(entry["shape"]), entry["dtype"]) for name, entry in read_index(step_folder).items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{step_folder}: its list of tensors cannot be read ({type(error).__name__}: {error}); give another step's folder"
        ) from None

    def read(names: list[str]) -> dict[str, torch.Tensor]:
        whole = {name: torch.empty(entries[name].shape, dtype=getattr(torch, entries[name].dtype)) for name in names}
        load_checkpoint(step_folder, {name: whole_piece(tensor) for name, tensor in whole.items()})
        return whole

    files = tuple(sorted(facts["files"]))
    return CheckpointReader("megachat", step_folder, facts, entries, read, files, tokenizer_folders(step_folder, facts))


def tokenizer_folders(folder: Path, facts: dict) -> tuple[Path, ...]:
    """Returns where the tokenizer may be: in the checkpoint, in its run folder, or where its config says."""
    configured = (facts.get("config") or {}).get("data", {}).get("tokenizer", Config().data.tokenizer)
    return folder / "tokenizer", folder.parent.parent / "tokenizer", Path(configured)


def find_step_folder(path: Path) -> Path:
    """Returns a run folder's newest complete checkpoint, and any other path as it is. Raises UserError if a run folder
    has none."""
    folder = path / "checkpoints"
    if not folder.is_dir():
        return path
    newest, passed_over = newest_complete(folder)
    if newest is None:
        raise UserError(f"{path} holds no complete checkpoint" + (f": {passed_over[0]}" if passed_over else " yet"))
    return newest


@dataclass(frozen=True)
class NewCheckpoint:
    """What becomes a megachat checkpoint: the source's tensors and files named in `copies`, with these facts (the
    config among them).

    Optimizer state that the source does not have starts at zero. tokenizer, origin: for the run folder.
    """

    source: CheckpointReader
    facts: dict
    tokenizer: Tokenizer
    origin: dict
    copies: tuple[str, ...] = ()


def write_megachat(new: NewCheckpoint, temporary: Path, target: Path) -> CheckpointReader:
    """Writes a run folder, or only a step's folder if the target has a step's name, and returns the checkpoint, opened
    again.

    temporary: the folder to fill; it will be renamed to `target`. Raises UserError if the target is named after another
    step.
    """
    step = new.source.facts["step"]
    if checkpoint_step(target) is None:
        config = _run_config(new.facts["config"], target)
        _save(new, temporary / "checkpoints", config.model_dump(mode="json", exclude_defaults=True))
        save_config(config, temporary / "config.json")
        save_tokenizer(temporary / "tokenizer", new.tokenizer, new.origin)
        return open_megachat(temporary / "checkpoints" / checkpoint_name(step))
    if target.name != checkpoint_name(step):
        raise UserError(
            f"{target} is not {checkpoint_name(step)}, the checkpoint's step: give that name, or a run folder"
        )
    folder = temporary.with_name(f"{temporary.name}.steps")  # save_checkpoint names the step's folder itself
    try:
        _save(new, folder, new.facts["config"])
        temporary.rmdir()
        (folder / target.name).rename(temporary)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return open_megachat(temporary)


def _save(new: NewCheckpoint, folder: Path, config: dict) -> None:
    source = new.source
    pieces: RectanglesByName = {name: whole_piece(tensor.float()) for name, tensor in source.tensors()}
    if not source.has_optimizer:
        shapes = state_shapes(source.dims)
        pieces = {name: whole_piece(torch.zeros(shape)) for name, shape in shapes.items()} | pieces

    def copy_files(step_folder: Path) -> None:
        for name in new.copies:
            (step_folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source.folder / name, step_folder / name)

    tokenizer = {"fingerprint": new.tokenizer.fingerprint, "vocab_size": new.tokenizer.vocab_size}
    facts = new.facts | {"tokenizer": tokenizer, "config": config}
    save_checkpoint(folder, source.facts["step"], pieces, facts, copy_files, _ONE_RANK)


def whole_piece(tensor: torch.Tensor):
    """Returns a tensor as one rectangle, see `megachat.checkpoint.storage.RectanglesByName`."""
    shape = tuple(tensor.shape)
    return shape, [((0,) * tensor.ndim, shape, tensor)]


def _run_config(config: dict, run_folder: Path) -> Config:
    """Returns the config with which the run in `run_folder` continues: name, folder and tokenizer are those of the run
    folder."""
    changes = {
        "run": {"name": run_folder.name, "folder": str(run_folder.parent)},
        "data": {"tokenizer": str(run_folder / "tokenizer")},
    }
    sections = config | {section: config.get(section, {}) | values for section, values in changes.items()}
    return Config.model_validate_json(json.dumps(sections))


def first_facts(source: CheckpointReader, config: dict, loop: dict) -> dict:
    """Returns the facts of a checkpoint that another program wrote. Counters that it does not have are those of a run's
    start.

    Raises UserError unless the config gives exactly the model's sizes.
    """
    dims = source.dims
    configured = resolve_dimensions(Config.model_validate_json(json.dumps(config)), dims.vocab_size)
    if configured != dims:
        raise UserError(
            f"{source.folder} has a model of {dims}, and the nearest that a config can describe is {configured}: it cannot be continued here"
        )
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
