"""Loads only a checkpoint's weights, from any layout or nanochat's format into any layout, without an optimizer."""

import json
from dataclasses import dataclass

import torch

from megachat.checkpoint.storage import load_checkpoint
from megachat.config import Config
from megachat.convert.architecture import DIVERGED, require_architecture, value_problem
from megachat.convert.reader import CheckpointReader
from megachat.convert.saved_model import SavedModel
from megachat.data.tokenizer import Tokenizer
from megachat.device import choose_compute_dtype
from megachat.errors import UserError
from megachat.kernels.choice import AttentionChoice, choose_attention
from megachat.model.gpt import Loss
from megachat.model.parameters import placed_parameters
from megachat.optim.groups import assign_groups
from megachat.parallel.build import build_evaluation_engine, build_module
from megachat.parallel.collectives import on_all_ranks_or_raise
from megachat.parallel.engine import Engine
from megachat.parallel.mesh import Mesh
from megachat.parallel.tensor import vocabulary_part
from megachat.place import place_of
from megachat.planning.plan import Plan, resolve_plan
from megachat.train.stage import attach_row_tables, build_stage, row_parameters


@dataclass(frozen=True)
class EvaluationModel:
    """The model with a checkpoint's weights, under an engine without optimizer."""

    config: Config
    plan: Plan
    mesh: Mesh
    layers: torch.nn.ModuleList
    engine: Engine
    tokenizer: Tokenizer
    compute_dtype: torch.dtype
    dtype_reason: str
    attention: AttentionChoice


def evaluation_plan(saved: SavedModel, world: int) -> Plan:
    """Plans an evaluation on `world` ranks, with the run's number of validation rows unless evaluate.tokens is set.

    Raises UserError if the layout does not fit.
    """
    config, training = saved.config, saved.training
    sections = config.model_dump(mode="json")
    sections["batch"] = {"micro_rows": config.batch.micro_rows or training.micro_rows, "accumulation": 1}
    sections["horizon"] = {"steps": 1}
    sections["precision"]["fp8"] = "off"  # only for training; its requirements need not hold here
    sections["evaluate"]["tokens"] = config.evaluate.tokens or training.evaluation_rows * training.dims.sequence_len
    config, dims = Config.model_validate_json(json.dumps(sections)), training.dims
    return resolve_plan(config, world, dims.vocab_size, dims.lookup)


def build_evaluation_model(saved: SavedModel, plan: Plan, mesh: Mesh) -> EvaluationModel:
    """Builds the model with the checkpoint's weights; all ranks call it. Computes the same numbers as in training."""
    dtype, reason = choose_compute_dtype(saved.config.precision.compute, mesh.device)
    # another machine may not have the kernel that the run trained with
    attention = choose_attention(saved.config.precision.attention, mesh.device, dtype, plan.dims, must=False)
    layers = build_stage(saved.config, plan, mesh, dtype, start=False, attend=attention.attend)
    parameters = placed_parameters(layers)
    parameters += row_parameters(attach_row_tables(layers, saved.config, mesh, dtype, train=False))
    if dtype == torch.bfloat16:  # as in training, where Muon's matrices are bfloat16 copies of the optimizer's masters
        groups = assign_groups([place_of(parameter) for parameter in parameters])
        for parameter in parameters:
            if groups[place_of(parameter).name].optimizer == "muon":
                parameter.data = parameter.data.to(dtype)
    on_all_ranks_or_raise(lambda: _load_weights(saved.reader, parameters), mesh.world)
    token_bytes = torch.from_numpy(saved.tokenizer.token_bytes())
    loss = Loss(plan.dims, token_bytes, vocabulary_part(plan.dims.padded_vocab, mesh.tensor))
    engine = build_evaluation_engine(build_module(list(layers), loss, mesh), mesh)
    return EvaluationModel(saved.config, plan, mesh, layers, engine, saved.tokenizer, dtype, reason, attention)


@torch.no_grad()
def _load_weights(reader: CheckpointReader, parameters: list[torch.nn.Parameter]) -> None:
    """Loads this rank's part of every weight; formats other than megachat's are read one whole tensor at a time.

    Raises UserError if the checkpoint has other tensors than the model, or a weight is NaN or infinite.
    """
    require_architecture(reader)
    rectangles: dict[str, tuple] = {}
    for parameter in parameters:
        place = place_of(parameter)
        rectangle = (place.offset or (0,) * len(place.whole), tuple(parameter.shape), parameter.data)
        rectangles.setdefault(f"model/{place.name}", (place.whole, []))[1].append(rectangle)
    if reader.format == "megachat":
        load_checkpoint(reader.folder, rectangles)
    else:
        for name, tensor in reader.tensors(rectangles):
            for offsets, sizes, part in rectangles[name][1]:
                part.copy_(tensor[tuple(slice(at, at + size) for at, size in zip(offsets, sizes, strict=True))])
    for parameter in parameters:
        if problem := value_problem(place_of(parameter).name, parameter.data):
            raise UserError(f"{reader.folder}: {problem}: {DIVERGED}")
