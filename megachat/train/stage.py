"""This rank's layers, for training and evaluation: its pipeline stage, cut by the tensor axis, with sparse tables."""

import dataclasses
import functools

import torch
from torch import nn

from megachat.config import Config
from megachat.device import gradient_wire
from megachat.kernels.attention import Attend, attention
from megachat.model.gpt import ModelOptions, build_layers, layer_builders
from megachat.model.ngram import NgramTable
from megachat.model.parameters import initialize, placed_parameters
from megachat.optim.groups import betas_of, group_of
from megachat.optim.row_tables import RowTable, RowTables
from megachat.parallel.collectives import all_gather_objects
from megachat.parallel.mesh import Mesh
from megachat.parallel.rectangles import MASTER
from megachat.parallel.tensor import apply_tensor
from megachat.place import Place, place_of, set_place
from megachat.planning.plan import Plan


def model_options(config: Config, compute_dtype: torch.dtype, attend: Attend = attention) -> ModelOptions:
    """Returns how the model computes. attend: the attention kernel, by default the reference."""
    return ModelOptions(
        compute_dtype=compute_dtype, rotary=config.model.rotary, attend=attend, recompute=config.batch.recompute
    )


def build_stage(
    config: Config, plan: Plan, mesh: Mesh, dtype: torch.dtype, *, start: bool = True, attend: Attend = attention
) -> nn.ModuleList:
    """Builds this rank's layers, cut by the tensor axis, without their sparse tables; all ranks call it. start: whether
    to set initial values.

    Raises RuntimeError when the stages of all ranks together are not the model.
    """
    first, last = plan.stages[mesh.pipeline.rank]
    options = dataclasses.replace(model_options(config, dtype, attend), holds_ngrams=False)
    layers = nn.ModuleList(build() for build in layer_builders(plan.dims, options)[first:last])
    apply_tensor(list(layers), mesh.tensor, sequence=config.parallel.sequence)
    if start:
        initialize(layers, config.run.seed)
    require_whole_model(layers, plan, model_options(config, dtype), mesh)
    return layers.to(mesh.device)


def require_whole_model(layers: nn.ModuleList, plan: Plan, options: ModelOptions, mesh: Mesh) -> None:
    """Raises RuntimeError on all ranks when the stages of all ranks together are not the model; all ranks call it."""
    with torch.device("meta"):
        whole = placed_parameters(build_layers(plan.dims, options))
    places = [place_of(parameter) for parameter in placed_parameters(layers)]
    places += [module.place for module in layers.modules() if isinstance(module, NgramTable)]
    stages = all_gather_objects([(place.name, place.block) for place in places], mesh.pipeline)
    built = [entry for stage in stages for entry in stage]
    if sorted(built) != sorted((place_of(parameter).name, place_of(parameter).block) for parameter in whole):
        raise RuntimeError(
            f"the pipeline stages {plan.stages} together are not the model: they have {len(built)} of its "
            f"{len(whole)} parameters"
        )


def attach_row_tables(
    layers: nn.ModuleList, config: Config, mesh: Mesh, dtype: torch.dtype, *, train: bool = True
) -> RowTables:
    """Returns the sparse tables of this rank's layers, which read them from now on; with initial values.

    train: False makes no optimizer state.
    """
    modules = {module.place.name: module for module in layers.modules() if isinstance(module, NgramTable)}
    (betas,) = {betas_of(group_of(name), config.optimizer) for name in modules} or {(0.0, 0.0)}
    tables = []
    for name, module in modules.items():
        count, width = module.place.whole
        start, rate = module.place.start[1], group_of(name).rate
        tables.append(RowTable(name, count, width, start=start, cut=module.divided, rate=rate))
    rows = RowTables(
        tables,
        mesh,
        optimizer=config.ngram.optimizer if train else None,
        host=config.ngram.storage == "host",
        wire=model_options(config, dtype).table_dtype,
        gradient_wire=gradient_wire(config.optimizer.gradient_wire, dtype),
        betas=betas,
        epsilon=config.optimizer.adamw_epsilon,
    )
    for name, module in modules.items():
        module.attach(functools.partial(rows.read, name), mesh.tensor.size, mesh.tensor.rank)
    return rows


def row_parameters(rows: RowTables) -> list[nn.Parameter]:
    """Returns this rank's rows of each table, live, as parameters with places: weights are loaded into them."""
    parameters = []
    for kind, name, whole, rectangles in rows.state_shards():
        for offset, _, tensor in rectangles if kind == MASTER else ():
            parameters.append(nn.Parameter(tensor, requires_grad=False))
            set_place(parameters[-1], Place(name, whole, -1, ("constant", 0.0), "rows", offset))
    return parameters
