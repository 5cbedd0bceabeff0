"""A checkpoint's weights alone, of any layout or of nanochat's files, in the layout asked for: no optimizer is built, no state of one is read."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch

from megachat.checkpoint.load import load_checkpoint
from megachat.config import Config, overridden
from megachat.convert.formats import open_checkpoint
from megachat.convert.nanochat_settings import config_of
from megachat.convert.reader import CheckpointReader
from megachat.convert.tokenizers import load_tokenizer_of
from megachat.data.tokenizer import Tokenizer
from megachat.device import choose_compute_dtype
from megachat.errors import UserError
from megachat.kernels.choice import AttentionChoice, choose_attention
from megachat.model.gpt import Loss
from megachat.model.parameters import placed_parameters
from megachat.optim.groups import assign
from megachat.parallel.engine import Engine, build_evaluation_engine, build_module
from megachat.parallel.mesh import Mesh
from megachat.parallel.tensor import vocabulary_part
from megachat.place import place_of
from megachat.planning.plan import Layout, Plan, resolve, resolve_dimensions
from megachat.train.build import build_stage


@dataclass(frozen=True)
class SavedModel:
    """A checkpoint, opened. run_folder: where its evaluations go. training: as its run was planned."""

    opened: CheckpointReader
    config: Config
    tokenizer: Tokenizer
    run_folder: Path
    training: Plan

    @property
    def step(self) -> int:
        return self.opened.facts["step"]

    @property
    def sha256(self) -> str:
        """Tells checkpoints apart: of the facts, which hold the files' hashes where the format has them, and the files' names and sizes."""
        sizes = [(name, (self.opened.folder / name).stat().st_size) for name in self.opened.files]
        return hashlib.sha256(json.dumps([self.opened.facts, sizes], sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class EvaluationModel:
    """What evaluates: the model with a checkpoint's weights under an engine without optimizer."""

    config: Config
    plan: Plan
    mesh: Mesh
    layers: torch.nn.ModuleList
    engine: Engine
    tokenizer: Tokenizer
    compute_dtype: torch.dtype
    dtype_reason: str
    attention: AttentionChoice


def open_saved_model(path: Path, overrides: list[str], tokenizer: Path | None = None) -> SavedModel:
    """A step's folder, a run's folder, or a folder of nanochat's, with its config under the overrides and its tokenizer.

    Raises UserError when it is none of these, when its tokenizer is not found, and for overrides that would make it another model.
    """
    opened = open_checkpoint(path)
    if opened.format == "huggingface":
        raise UserError(
            f"{path} is a model of transformers: make a run folder of it with tools/convert_checkpoint.py from-hf"
        )
    loaded_tokenizer, _ = load_tokenizer_of(opened, tokenizer)
    dims, values = opened.dims, config_of(opened)[0] if opened.format == "nanochat" else opened.facts["config"]
    config = overridden(values, str(opened.folder), overrides)
    asked = resolve_dimensions(config, dims.vocab_size)
    if asked != dims:
        other = [name for name, value in vars(dims).items() if getattr(asked, name) != value]
        raise UserError(
            f"--set asks for another model than {opened.folder} is, in {', '.join(other)}: leave the model's settings as they are"
        )
    return SavedModel(opened, config, loaded_tokenizer, _run_folder(opened), _training_plan(opened, values))


def _run_folder(opened: CheckpointReader) -> Path:
    """The run's folder of a step in it, the checkpoint's own of another format; of a step alone, the folder it lies in."""
    if opened.format == "nanochat":
        return opened.folder
    return opened.folder.parent.parent if opened.folder.parent.name == "checkpoints" else opened.folder.parent


def _training_plan(opened: CheckpointReader, values: dict) -> Plan:
    """As the run that wrote the checkpoint derived it, on its own layout."""
    layout = Layout(**opened.facts.get("layout", {"data": 1, "tensor": 1, "pipeline": 1}))
    return resolve(overridden(values, str(opened.folder), ()), layout.world, opened.dims.vocab_size)


def evaluation_plan(saved: SavedModel, world: int) -> Plan:
    """The layout and the micro-batches of an evaluation on `world` ranks; as many validation rows as the run's own evaluations have, unless
    evaluate.tokens says otherwise. Raises UserError for a layout that does not fit."""
    config, training = saved.config, saved.training
    sections = config.model_dump(mode="json")
    sections["batch"] = {"micro_rows": config.batch.micro_rows or training.micro_rows, "accumulation": 1}
    sections["horizon"] = {"steps": 1}
    sections["precision"]["fp8"] = "off"  # of training alone, whose needs no evaluation has
    sections["evaluate"]["tokens"] = config.evaluate.tokens or training.evaluation_rows * training.dims.sequence_len
    return resolve(Config.model_validate_json(json.dumps(sections)), world, training.dims.vocab_size)


def build_evaluation_model(saved: SavedModel, plan: Plan, mesh: Mesh) -> EvaluationModel:
    """The model on every rank of the mesh, with the checkpoint's weights; all ranks call it. The same numbers as in training come out of it."""
    dtype, reason = choose_compute_dtype(saved.config.precision.compute, mesh.device)
    # another machine may not have the kernel that the run trained with
    attention = choose_attention(saved.config.precision.attention, mesh.device, dtype, plan.dims, must=False)
    layers = build_stage(saved.config, plan, mesh, dtype, start=False, attend=attention.attend)
    parameters = placed_parameters(layers)
    if dtype == torch.bfloat16:  # as in training, where the matrices' masters are the optimizer's
        groups = assign([place_of(parameter) for parameter in parameters])
        for parameter in parameters:
            if groups[place_of(parameter).name].optimizer == "muon":
                parameter.data = parameter.data.to(dtype)
    _load(saved.opened, parameters)
    loss = Loss(
        plan.dims, torch.from_numpy(saved.tokenizer.token_bytes()), vocabulary_part(plan.dims.padded_vocab, mesh.tensor)
    )
    engine = build_evaluation_engine(build_module(list(layers), loss, mesh), mesh)
    return EvaluationModel(saved.config, plan, mesh, layers, engine, saved.tokenizer, dtype, reason, attention)


@torch.no_grad()
def _load(opened: CheckpointReader, parameters: list[torch.nn.Parameter]) -> None:
    """This rank's part of every weight: by rectangles of our files, from the whole tensors of others, one after the other."""
    pieces: dict[str, tuple] = {}
    for parameter in parameters:
        where = place_of(parameter)
        rectangle = (where.offset or (0,) * len(where.whole), tuple(parameter.shape), parameter.data)
        pieces.setdefault(f"model/{where.name}", (where.whole, []))[1].append(rectangle)
    if opened.format == "megachat":
        return load_checkpoint(opened.folder, pieces)
    for name, tensor in opened.tensors(pieces):
        for offsets, sizes, part in pieces[name][1]:
            part.copy_(tensor[tuple(slice(first, first + size) for first, size in zip(offsets, sizes, strict=True))])
