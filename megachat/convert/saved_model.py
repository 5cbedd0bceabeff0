"""A checkpoint that was opened to use its model: its config, tokenizer and plan."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from megachat.config import Config, config_from_values
from megachat.convert.formats import open_checkpoint
from megachat.convert.huggingface import import_huggingface
from megachat.convert.nanochat_settings import config_of
from megachat.convert.reader import CheckpointReader
from megachat.convert.tokenizers import load_tokenizer_of
from megachat.data.tokenizer import Tokenizer
from megachat.errors import UserError
from megachat.files import CAPSULES, CHECKPOINTS
from megachat.planning.plan import Layout, Plan, resolve_plan
from megachat.planning.sizes import resolve_dimensions


@dataclass(frozen=True)
class SavedModel:
    """An opened checkpoint. run_folder: for its evaluations. training: the plan of the run that wrote it."""

    reader: CheckpointReader
    config: Config
    tokenizer: Tokenizer
    run_folder: Path
    training: Plan

    @property
    def step(self) -> int:
        return self.reader.facts["step"]

    @property
    def sha256(self) -> str:
        """Identifies the checkpoint by its facts, which include file hashes if the format has them, and file sizes."""
        sizes = [(name, (self.reader.folder / name).stat().st_size) for name in self.reader.files]
        return hashlib.sha256(json.dumps([self.reader.facts, sizes], sort_keys=True).encode()).hexdigest()


def open_saved_model(
    path: Path, overrides: list[str], tokenizer: Path | None = None, step: int | None = None
) -> SavedModel:
    """Opens a checkpoint of any format, with its config under the overrides and its tokenizer.

    step: which one, if the folder has several.

    Raises UserError if it is none, if it has no tokenizer, or if the overrides change the model.
    """
    reader = open_checkpoint(path, step)
    if reader.format == "huggingface":  # as a conversion would make it; nothing is written
        new = import_huggingface(reader, tokenizer)
        reader, loaded_tokenizer = new.source.select(reader.entries, facts=new.source.facts | new.facts), new.tokenizer
    else:
        loaded_tokenizer, _ = load_tokenizer_of(reader, tokenizer)
    folder, dims = reader.folder, reader.dims
    settings = config_of(reader)[0] if reader.format == "nanochat" else reader.facts["config"]
    config = config_from_values(settings, str(folder), overrides)
    requested = resolve_dimensions(config, dims.vocab_size, allocated=dims.lookup)
    if requested != dims:
        changed = [name for name, value in vars(dims).items() if getattr(requested, name) != value]
        raise UserError(
            f"--set would change the model of {folder} in {', '.join(changed)}: leave the model's settings as they are"
        )
    of_others = reader.format in ("nanochat", "huggingface")
    run_folder = folder if of_others else folder.parent
    if run_folder.name in (CHECKPOINTS, CAPSULES) and not of_others:
        run_folder = run_folder.parent
    layout = Layout(**reader.facts.get("layout", {"data": 1, "tensor": 1, "pipeline": 1}))
    training = resolve_plan(config_from_values(settings, str(folder)), layout.world, dims.vocab_size, dims.lookup)
    return SavedModel(reader, config, loaded_tokenizer, run_folder, training)
