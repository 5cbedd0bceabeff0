"""Where model meets parallel: from config and plan to a run that can train."""

import socket
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from megachat.config import Config
from megachat.data.loader import Loader
from megachat.data.tokenizer import Tokenizer
from megachat.device import choose_compute_dtype
from megachat.errors import UserError
from megachat.evals.core_bundle import Bundle
from megachat.kernels.attention import attention
from megachat.kernels.attention_backends import Attend
from megachat.kernels.choice import Kernels, choose_kernels
from megachat.kernels.fp8_backends import apply_fp8, head_products
from megachat.model.gpt import Loss, ModelOptions, build_layers, layer_builders
from megachat.model.parameters import initialize, placed_parameters
from megachat.optim.groups import (
    MUON_BETA2,
    adamw_groups,
    assign,
    muon_matrices,
)
from megachat.optim.muon import compiled_functions
from megachat.optim.partition import MuonPartition
from megachat.parallel.collectives import all_gather_objects
from megachat.parallel.engine import (
    Engine,
    build_engine,
    build_loss_scaler,
    build_module,
)
from megachat.parallel.mesh import Mesh
from megachat.parallel.tensor import apply_tensor, vocabulary_part
from megachat.place import place_of
from megachat.planning.plan import Plan
from megachat.train.compiled import apply_compile


@dataclass(frozen=True)
class Training:
    """What takes a step: the model under its engine and optimizers. layers: of this rank's pipeline stage, cut by the tensor axis."""

    config: Config
    plan: Plan
    mesh: Mesh
    layers: nn.ModuleList
    engine: Engine
    muon: MuonPartition
    compute_dtype: torch.dtype
    dtype_reason: str
    kernels: Kernels


@dataclass(frozen=True)
class Run(Training):
    """Everything that a running job holds."""

    folder: Path
    tokenizer: Tokenizer
    loader: Loader
    bundle: Bundle | None  # of CORE, where it is evaluated on the way

    @property
    def is_writer(self) -> bool:
        """True on the one rank that prints and writes the run folder."""
        return self.mesh.world.rank == 0


def model_options(config: Config, compute_dtype: torch.dtype, attend: Attend = attention) -> ModelOptions:
    """How the model computes, from the config; with the plain attention unless another is given."""
    return ModelOptions(
        compute_dtype=compute_dtype, rotary=config.model.rotary, attend=attend, recompute=config.batch.recompute
    )


def gradient_wire(config: Config, compute_dtype: torch.dtype) -> torch.dtype:
    """dtype of Muon's gradients between ranks."""
    asked = config.optimizer.gradient_wire
    if asked != "auto":
        return getattr(torch, asked)
    return torch.bfloat16 if compute_dtype == torch.bfloat16 else torch.float32


def build_training(
    config: Config, plan: Plan, mesh: Mesh, token_bytes: torch.Tensor, kernels: Kernels | None = None
) -> Training:
    """Model, optimizers and engine on every rank, with starting values. token_bytes: int [vocab_size], for bits per byte. kernels: where they were
    chosen before.

    Raises UserError when a setting does not fit this machine.
    """
    dtype, reason = choose_compute_dtype(config.precision.compute, mesh.device)
    kernels = kernels or choose_kernels(config, plan, mesh.device)
    check_alike(kernels, mesh)
    layers = build_stage(config, plan, mesh, dtype, attend=kernels.attention.attend)
    if kernels.fp8:
        apply_fp8(list(layers), kernels.fp8)
    parameters = placed_parameters(layers)
    groups = assign([place_of(parameter) for parameter in parameters])
    matrices = muon_matrices(
        dict.fromkeys(place_of(parameter) for parameter in parameters), groups, config.optimizer.muon_multiplier
    )
    names = {matrix.name for matrix in matrices}
    muon = MuonPartition(
        {place_of(parameter).name: parameter for parameter in parameters if place_of(parameter).name in names},
        matrices,
        mesh,
        compute_dtype=dtype,
        gradient_wire=gradient_wire(config, dtype),
        beta2=MUON_BETA2,
        squares=kernels.norm.sum_of_squares,
        functions=compiled_functions() if config.precision.compile else None,
    )
    products = head_products(kernels.fp8 if config.precision.fp8_head else None, plan.dims, mesh.tensor.size)
    loss = Loss(plan.dims, token_bytes, vocabulary_part(plan.dims.padded_vocab, mesh.tensor), products)
    module = build_module(awaited(layers, muon), loss, mesh)
    adamw = adamw_groups(parameters, groups, plan.rates)
    scaler = (
        build_loss_scaler(config.precision.loss_scale, config.precision.loss_scale_window)
        if dtype == torch.float16
        else None
    )
    engine = build_engine(
        module,
        adamw,
        muon,
        mesh,
        micro_rows=plan.micro_rows,
        accumulation=plan.accumulation,
        clip_norm=config.optimizer.clip_norm,
        loss_scaler=scaler,
    )
    if config.precision.compile:
        apply_compile(layers)
    return Training(config, plan, mesh, layers, engine, muon, dtype, reason, kernels)


def build_stage(
    config: Config, plan: Plan, mesh: Mesh, dtype: torch.dtype, *, start: bool = True, attend: Attend = attention
) -> nn.ModuleList:
    """This rank's layers, with their starting values unless `start` is off, cut by the tensor axis. All ranks call it: they check that the stages
    make up the model."""
    first, last = plan.stages[mesh.pipeline.rank]
    layers = nn.ModuleList(
        build() for build in layer_builders(plan.dims, model_options(config, dtype, attend))[first:last]
    )
    apply_tensor(list(layers), mesh.tensor, sequence=config.parallel.sequence)
    if start:
        initialize(layers, config.run.seed)
    with torch.device("meta"):
        whole = placed_parameters(build_layers(plan.dims, model_options(config, dtype)))
    held = [(where.name, where.block) for where in (place_of(parameter) for parameter in placed_parameters(layers))]
    held = [entry for stage in all_gather_objects(held, mesh.pipeline) for entry in stage]
    if sorted(held) != sorted((place_of(parameter).name, place_of(parameter).block) for parameter in whole):
        raise RuntimeError(
            f"the pipeline stages {plan.stages} together are not the model: they hold {len(held)} of its {len(whole)} parameters"
        )
    return layers.to(mesh.device)


def awaited(layers: nn.ModuleList, muon: MuonPartition) -> list:
    """The layers, each after a function that waits for the gather of its matrices: gathers overlap the forward pass of earlier layers."""

    def waiting(block: int):
        def wait(stream):
            muon.wait_for_layer(block)
            return stream

        return wait

    return [step for layer in layers for step in (waiting(place_of(next(layer.parameters())).block), layer)]


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
    """The whole run on every rank; a checkpoint may be read into it afterwards. kernels: as `build_training`. Raises UserError."""
    training = build_training(config, plan, mesh, torch.from_numpy(tokenizer.token_bytes()), kernels)
    loader = build_loader(config, plan, mesh, tokenizer, loader_state)
    return Run(**vars(training), folder=folder, tokenizer=tokenizer, loader=loader, bundle=bundle)


def order_of_rows(config: Config, plan: Plan) -> dict:
    """The Loader's settings on which the training's rows depend."""
    data = config.data
    sizes = {
        "row_tokens": plan.dims.sequence_len + 1,
        "rows": plan.rows_per_step,
        "streams": data.streams,
        "buffer_documents": data.buffer_documents,
    }
    return {"split": "train", "seed": config.run.seed if data.shuffle else None} | sizes


def build_loader(
    config: Config, plan: Plan, mesh: Mesh, tokenizer: Tokenizer, state: dict | None = None, *, validation: bool = False
) -> Loader:
    """This rank's rows; those of validation come in steps of one micro-batch a rank."""
    data, order = config.data, order_of_rows(config, plan)
    if validation:
        order |= {"split": "validation", "rows": plan.micro_rows * mesh.data.size, "seed": None}
    return Loader(
        data.folder,
        tokenizer,
        **order,
        ranks=mesh.data.size,
        rank=mesh.data.rank,
        tokenizer_threads=data.tokenizer_threads,
        prefetch_steps=data.prefetch_steps,
        state=state,
    )


def check_alike(kernels: Kernels, mesh: Mesh) -> None:
    """Raises UserError, on all ranks, when one would train with other kernels than the first; all ranks call it."""
    told = all_gather_objects((kernels.names, socket.gethostname()), mesh.world)
    for rank, (names, host) in enumerate(told):
        if names != told[0][0]:
            attention, fp8 = told[0][0]
            raise UserError(
                f"rank {rank} on {host} would train with attention {names[0]} and fp8 {names[1]}, but rank 0 on {told[0][1]} with {attention} and "
                f"{fp8}: install the same packages on every host, or name them in precision.attention and precision.fp8_backend"
            )
