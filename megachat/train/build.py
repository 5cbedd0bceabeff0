"""Builds what trains: the model on this rank, its optimizers and its engine, and a run around them."""

import dataclasses
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from megachat.config import Config
from megachat.data.loader import Loader
from megachat.data.tokenizer import Tokenizer
from megachat.device import choose_compute_dtype, gradient_wire, memory_bytes
from megachat.errors import UserError
from megachat.evals.core_bundle import Bundle
from megachat.kernels.choice import Kernels, choose_kernels
from megachat.kernels.cross_entropy import PlainProducts
from megachat.kernels.fp8 import apply_fp8, head_products
from megachat.kernels.onednn import OneDnnProducts, apply_onednn
from megachat.model.gpt import Loss
from megachat.model.parameters import placed_parameters
from megachat.optim.graph import UpdateGraph
from megachat.optim.groups import Group, adamw_groups, assign_groups, muon_matrices, require_used_patterns
from megachat.optim.muon import compiled_functions
from megachat.optim.partition import MuonPartition
from megachat.optim.row_tables import RowTables
from megachat.parallel.build import build_engine, build_loss_scaler, build_module
from megachat.parallel.collectives import all_gather_objects
from megachat.parallel.engine import Engine, ZeroAdamW
from megachat.parallel.mesh import Mesh
from megachat.parallel.tensor import vocabulary_part
from megachat.place import place_of
from megachat.planning.memory import head_chunk_bytes
from megachat.planning.plan import Plan
from megachat.planning.stage_state import stage_parameters
from megachat.train.compiled import apply_compile, compiled_products, torch_mode
from megachat.train.documents import build_loader
from megachat.train.stage import attach_row_tables, build_stage


@dataclass(frozen=True)
class TrainingModel:
    """All that a training step needs: the model, its engine and the optimizers.

    layers: this rank's pipeline stage, cut by the tensor axis. rows: the tables that they read.
    """

    config: Config
    plan: Plan
    mesh: Mesh
    layers: nn.ModuleList
    engine: Engine
    muon: MuonPartition
    rows: RowTables
    compute_dtype: torch.dtype
    dtype_reason: str
    kernels: Kernels
    graph: UpdateGraph | None  # of the optimizers, with precision.optimizer_graph

    @property
    def optimizers(self) -> dict[str, MuonPartition | RowTables | ZeroAdamW]:
        """Returns the optimizers by Group.optimizer, which names their state in checkpoints."""
        return {"muon": self.muon, "rows": self.rows, "adamw": self.engine.adamw}


@dataclass(frozen=True)
class Run(TrainingModel):
    """A TrainingModel with its run folder and its data."""

    folder: Path
    tokenizer: Tokenizer
    loader: Loader
    bundle: Bundle | None  # of CORE, if it is evaluated during training

    @property
    def is_writer(self) -> bool:
        """Whether this rank writes the log and the run folder: rank 0."""
        return self.mesh.world.rank == 0


def build_run(
    config: Config,
    plan: Plan,
    mesh: Mesh,
    tokenizer: Tokenizer,
    folder: Path,
    loader_state: dict | None = None,
    bundle: Bundle | None = None,
    kernels: Kernels | None = None,
) -> Run:
    """Builds the run on every rank; a checkpoint may be loaded into it afterwards.

    loader_state: of this rank, as resume_documents returned it. kernels: see build_training_model. Raises UserError.
    """
    training = build_training_model(config, plan, mesh, torch.from_numpy(tokenizer.token_bytes()), kernels)
    loader = build_loader(config, plan, mesh, tokenizer, loader_state)
    return Run(**vars(training), folder=folder, tokenizer=tokenizer, loader=loader, bundle=bundle)


def build_training_model(
    config: Config, plan: Plan, mesh: Mesh, token_bytes: torch.Tensor, kernels: Kernels | None = None
) -> TrainingModel:
    """Builds model, optimizers and engine with their initial values; all ranks call it.

    token_bytes: int [vocab_size], for bits per byte. kernels: as choose_kernels returned them, chosen here by default.
    Raises UserError when a setting does not work on this machine or the ranks chose different kernels.
    """
    precision, optimizer = config.precision, config.optimizer
    dtype, reason = choose_compute_dtype(precision.compute, mesh.device)
    kernels = _agree_on_kernels(kernels or choose_kernels(config, plan, mesh.device), mesh)
    layers = build_stage(config, plan, mesh, dtype, attend=kernels.attention.attend)
    if kernels.onednn:
        apply_onednn(list(layers))
    if kernels.fp8:
        apply_fp8(list(layers), kernels.fp8)
    rows = attach_row_tables(layers, config, mesh, dtype)
    parameters = placed_parameters(layers)
    groups = assign_groups(map(place_of, parameters))
    muon = _build_muon(config, plan, mesh, parameters, groups, dtype, kernels)
    loss = _build_loss(config, plan, mesh, token_bytes, dtype, kernels)
    scaled = dtype == torch.float16
    engine = build_engine(
        build_module(_with_gather_waits(layers, muon), loss, mesh),
        adamw_groups(parameters, groups, plan.rates, optimizer),
        muon,
        mesh,
        micro_rows=plan.micro_rows,
        accumulation=plan.accumulation,
        clip_norm=optimizer.clip_norm,
        loss_scaler=build_loss_scaler(precision.loss_scale, precision.loss_scale_window) if scaled else None,
    )
    if precision.compile:
        apply_compile(layers, torch_mode(precision.compile_mode))
    graph = UpdateGraph(engine.adamw, muon) if precision.optimizer_graph else None
    return TrainingModel(config, plan, mesh, layers, engine, muon, rows, dtype, reason, kernels, graph)


def _agree_on_kernels(kernels: Kernels, mesh: Mesh) -> Kernels:
    """Returns the kernels of all ranks, with oneDNN if all can train with it; all ranks call it.

    Raises UserError on all ranks when one chose other kernels than rank 0.
    """
    ranks = all_gather_objects((kernels.names, socket.gethostname(), kernels.onednn), mesh.world)
    (attention_0, fp8_0), host_0, _ = ranks[0]
    for rank, ((kernel, fp8), host, _) in enumerate(ranks):
        if (kernel, fp8) != (attention_0, fp8_0):
            raise UserError(
                f"rank {rank} on {host} would train with attention {kernel} and fp8 {fp8}, but rank 0 on {host_0} "
                f"with {attention_0} and {fp8_0}: install the same packages on every host, or name the kernels in "
                "precision.attention and precision.fp8_backend"
            )
    return dataclasses.replace(kernels, onednn=all(onednn for _, _, onednn in ranks))


def _build_muon(
    config: Config,
    plan: Plan,
    mesh: Mesh,
    parameters: list[nn.Parameter],
    groups: Mapping[str, Group],
    dtype: torch.dtype,
    kernels: Kernels,
) -> MuonPartition:
    """Returns the partition of this stage's matrices; their parameters become views of its buckets. Raises UserError
    for a pattern of optimizer.muon_multiplier that fits no matrix."""
    optimizer, precision = config.optimizer, config.precision
    if not isinstance(optimizer.muon_multiplier, str):
        whole_model = stage_parameters(plan.dims, (0, plan.stages[-1][1]), dtype)  # a pattern may be for another stage
        require_used_patterns(optimizer.muon_multiplier, map(place_of, whole_model))
    matrices = muon_matrices(map(place_of, parameters), groups, optimizer.muon_multiplier)
    by_name = {place_of(parameter).name: parameter for parameter in parameters}
    return MuonPartition(
        {matrix.name: by_name[matrix.name] for matrix in matrices},
        matrices,
        mesh,
        compute_dtype=dtype,
        gradient_wire=gradient_wire(optimizer.gradient_wire, dtype),
        beta2=optimizer.muon_beta2,
        squares=kernels.norm.sum_of_squares,
        functions=compiled_functions(torch_mode(precision.compile_mode)) if precision.compile else None,
    )


def _build_loss(
    config: Config, plan: Plan, mesh: Mesh, token_bytes: torch.Tensor, dtype: torch.dtype, kernels: Kernels
) -> Loss:
    """Returns the loss of this tensor rank's part of the vocabulary; all ranks call it."""
    fp8_head = kernels.fp8 if config.precision.fp8_head else None
    products = head_products(fp8_head, plan.dims, mesh.tensor.size, OneDnnProducts if kernels.onednn else PlainProducts)
    if config.precision.compile:
        products = compiled_products(products)
    part = vocabulary_part(plan.dims.padded_vocab, mesh.tensor)
    part = dataclasses.replace(part, chunk_bytes=agreed_head_chunk(config, plan, mesh, dtype))
    return Loss(plan.dims, token_bytes, part, products, config.optimizer.z_loss)


def agreed_head_chunk(config: Config, plan: Plan, mesh: Mesh, dtype: torch.dtype) -> int:
    """Returns planning.memory.head_chunk_bytes, on GPUs of different memory the smallest; all ranks call it."""
    on_gpu = mesh.device.type == "cuda"
    device_bytes = memory_bytes(mesh.device, 1) if on_gpu else None
    chunk = head_chunk_bytes(config, plan, dtype, on_gpu=on_gpu, device_bytes=device_bytes)
    return min(all_gather_objects(chunk, mesh.world)) if on_gpu else chunk


def _with_gather_waits(layers: nn.ModuleList, muon: MuonPartition) -> list:
    """Returns the layers, each after a function that waits for its matrices: gathers overlap the forward pass."""

    def wait(block: int, stream):
        muon.wait_for_block(block)
        return stream

    blocks = [place_of(next(layer.parameters())).block for layer in layers]
    return [part for block, layer in zip(blocks, layers, strict=True) for part in (partial(wait, block), layer)]
