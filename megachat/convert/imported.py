"""A megachat checkpoint made of another format's tensors: a step folder, and around it a run that goes on from there."""

import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from megachat.checkpoint.facts import checkpoint_name, checkpoint_step
from megachat.checkpoint.save import save_checkpoint
from megachat.checkpoint.storage import RectanglesByName
from megachat.config import Config, save_config
from megachat.convert.architecture import state_shapes
from megachat.convert.opened import Opened, open_megachat
from megachat.data.tokenizer import Tokenizer, load_tokenizer, save_tokenizer
from megachat.errors import UserError
from megachat.parallel.mesh import Axis
from megachat.planning.dimensions import Dimensions
from megachat.planning.plan import Layout, resolve_dimensions
from megachat.prepare.tokenizer_training import import_nanochat

_ALONE = Axis("world", 1, 0, None, (0,))


@dataclass(frozen=True)
class Import:
    """What becomes a checkpoint. facts: without what saving adds. tokenizer and its origin: for the run's folder.
    copies: files of `source_folder` that go into the checkpoint as they are."""

    step: int
    pieces: RectanglesByName
    facts: dict
    tokenizer: Tokenizer
    origin: dict
    source_folder: Path
    copies: tuple[str, ...] = field(default=())


def write_import(made: Import, temporary: Path, target: Path) -> Opened:
    """Write the run folder, or only the step's folder where the target is named as one; returns the checkpoint, opened again.

    Raises UserError when the target's name is another step's, or the config does not give the model's sizes.
    """
    if checkpoint_step(target) is not None:
        if target.name != checkpoint_name(made.step):
            raise UserError(
                f"{target} is not {checkpoint_name(made.step)}, the checkpoint's step: give that name, or a run folder"
            )
        folder = temporary.with_name(f"{temporary.name}.steps")  # save_checkpoint names the step's folder itself
        try:
            _save(made, folder, made.facts["config"])
            temporary.rmdir()
            (folder / target.name).rename(temporary)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return open_megachat(temporary)
    config = run_config(made.facts["config"], target)
    _save(made, temporary / "checkpoints", config.model_dump(mode="json", exclude_defaults=True))
    save_config(config, temporary / "config.json")
    save_tokenizer(temporary / "tokenizer", made.tokenizer, made.origin)
    return open_megachat(temporary / "checkpoints" / checkpoint_name(made.step))


def _save(made: Import, folder: Path, config: dict) -> None:
    def write_copies(step_folder: Path) -> None:
        for name in made.copies:
            (step_folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(made.source_folder / name, step_folder / name)

    told = {"fingerprint": made.tokenizer.fingerprint, "vocab_size": made.tokenizer.vocab_size}
    save_checkpoint(
        folder, made.step, made.pieces, made.facts | {"tokenizer": told, "config": config}, write_copies, _ALONE
    )


def run_config(config: dict, run_folder: Path) -> Config:
    """The config under which the run in `run_folder` goes on: its name, place and tokenizer are the folder's."""
    changed = dict(config)
    changed["run"] = dict(config.get("run", {})) | {"name": run_folder.name, "folder": str(run_folder.parent)}
    changed["data"] = dict(config.get("data", {})) | {"tokenizer": str(run_folder / "tokenizer")}
    return Config.model_validate_json(json.dumps(changed))


def settings_of_dims(dims: Dimensions) -> dict:
    """A config that asks for a model whose blocks all see the whole row."""
    model = {
        "depth": dims.depth,
        "aspect_ratio": max(1, dims.width // dims.depth),
        "head_size": dims.head_size,
        "sequence_len": dims.sequence_len,
    }
    model |= {
        "window_pattern": "L",
        "kv_heads": dims.kv_heads,
        "rotary_base": dims.rotary_base,
        "qk_scale": dims.qk_scale,
    }
    return {
        "model": model
        | {"norm_epsilon": dims.norm_epsilon, "value_embeddings": dims.value_embeddings, "lambdas": dims.lambdas}
    }


def check_sizes(config: dict, dims: Dimensions, source: Path) -> None:
    """Raise UserError unless a config made for the model gives exactly its sizes."""
    made = resolve_dimensions(Config.model_validate_json(json.dumps(config)), dims.vocab_size)
    if made != dims:
        raise UserError(
            f"{source} has a model of {dims}, and the nearest that a config can ask for is {made}: it cannot be continued here"
        )


def tokenizer_folder(source: Opened, asked: Path | None) -> Path | None:
    """Where the checkpoint's tokenizer is: as asked, in its run folder, in the folder itself, or where its config says; None when at none of them.

    Raises UserError when the one asked for cannot be read or is not the checkpoint's.
    """
    wanted = (source.facts.get("tokenizer") or {}).get("fingerprint")
    by_config = (source.facts.get("config") or {}).get("data", {}).get("tokenizer", Config().data.tokenizer)
    for folder in (
        [asked] if asked else [source.folder / "tokenizer", source.folder.parent.parent / "tokenizer", Path(by_config)]
    ):
        try:
            found = load_tokenizer(folder).fingerprint
        except UserError:
            if asked:
                raise
            continue
        if found == wanted or wanted is None:
            return folder
        if asked:
            raise UserError(
                f"{asked} is not the checkpoint's tokenizer: it has fingerprint {found[:12]}, not {wanted[:12]}"
            )
    return None


def fresh_state(dims: Dimensions) -> RectanglesByName:
    """Zeros for every tensor of optimizer state, as at the start of a run."""
    shapes = {name: shape for name, shape in state_shapes(dims).items() if not name.startswith("model/")}
    return {name: _whole(torch.zeros(shape)) for name, shape in shapes.items()}


def whole_pieces(source: Opened) -> RectanglesByName:
    """All tensors in float32; those that a file has so stay in it until they are written."""
    return {name: _whole(tensor.float()) for name, tensor in source.tensors()}


def _whole(tensor: torch.Tensor):
    shape = tuple(tensor.shape)
    return shape, [((0,) * tensor.ndim, shape, tensor)]


def imported_facts(facts: dict, dims: Dimensions, config: dict) -> dict:
    """A checkpoint's facts of another program's; the counters are those of a start where it tells of none."""
    loop = {"step": facts["step"], "training_s": 0.0, "skipped_steps": 0, "val_bpb": None, "min_val_bpb": None}
    told = {
        "model": asdict(dims),
        "loop": loop,
        "adamw_steps": facts.get("adamw_steps", 0),
        "loss_scaler": {},
        "config": config,
    }
    return told | {"layout": asdict(Layout(1, 1, 1)), "ledger": None, "imported": facts["imported"]}


def foreign_tokenizer(place: Path, least: int, most: int) -> tuple[Tokenizer, dict]:
    """(tokenizer, its origin) of a folder of nanochat's or ours. Raises UserError when it has fewer or more tokens than the model can."""
    if not place.is_dir():
        raise UserError(
            f"there is no tokenizer at {place}: give the folder of the model's own, megachat's or nanochat's, with --tokenizer"
        )
    found = import_nanochat(place) if (place / "tokenizer.pkl").is_file() else load_tokenizer(place)
    if not least <= found.vocab_size <= most:
        raise UserError(
            f"the tokenizer in {place} has {found.vocab_size} tokens and the model {most}: give the model's own with --tokenizer"
        )
    return found, {"imported": str(place)}
