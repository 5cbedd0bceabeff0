"""Starts DeepSpeed and builds its engine: one PipelineEngine for every layout, with ZeRO-1 for AdamW only."""

import contextlib
import io
import logging
import warnings
from collections.abc import Callable

import deepspeed
import deepspeed.comm
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
from deepspeed.runtime.pipe.module import PipelineModule
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import nn

from megachat.parallel.engine import Engine, MatrixOptimizer, ZeroAdamW
from megachat.parallel.mesh import Mesh
from megachat.parallel.without_compiler import AdamW
from megachat.place import is_partial_over_tensor

LOSS_SCALE_MINIMUM = 1.0
PIPELINE_SETTINGS = {"pipeline": {"pipe_partitioned": False, "grad_partitioned": False, "use_reentrant": False}}


def start_collectives(device: torch.device, backend: str, timeout) -> None:
    """Initializes torch.distributed and DeepSpeed's view of it. timeout: a datetime.timedelta."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # torch 2.13 renames collectives; DeepSpeed and megachat call them by their old names
    warnings.filterwarnings("ignore", message=r".*torch\.distributed\.\w+. is deprecated", category=FutureWarning)
    # DeepSpeed would compile an op for CPU collectives, which gloo does not need; a machine may have no compiler
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    with quiet_output():
        deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, timeout=timeout, verbose=False)


def quiet_output() -> contextlib.AbstractContextManager:
    """Returns a context that discards what DeepSpeed prints while it starts; exceptions are not affected."""
    return contextlib.redirect_stdout(io.StringIO())


class _Stage(PipelineModule):
    """A PipelineModule with only this stage's layers: the plan has already divided the model into stages."""

    def _partition_layers(self, method="uniform"):
        self._set_bounds(start=0, stop=len(self._layer_specs))


def build_module(layers: list[Callable], loss: nn.Module, mesh: Mesh) -> PipelineModule:
    """Returns this rank's stage for DeepSpeed's engine. layers: modules and functions on the stream, in order."""
    with quiet_output():
        return _Stage(layers=layers, topology=mesh.topology, loss_fn=loss)


def build_engine(
    module: PipelineModule,
    adamw_groups: list[dict],
    matrices: MatrixOptimizer,
    mesh: Mesh,
    *,
    micro_rows: int,
    accumulation: int,
    clip_norm: float,
    loss_scaler: DynamicLossScaler | None,
) -> Engine:
    """Returns DeepSpeed's engine over the module, with AdamW's groups under ZeRO-1.

    adamw_groups: arguments of torch.optim.AdamW, each with a "name"; the first must hold float32 parameters, because
    ZeRO takes its dtype from it. clip_norm: 0 turns clipping off.
    """
    if adamw_groups[0]["params"][0].dtype != torch.float32:
        raise ValueError("the first AdamW group must be float32")
    parameters = [parameter for group in adamw_groups for parameter in group["params"]]
    settings = {
        "train_micro_batch_size_per_gpu": micro_rows,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": clip_norm,  # DeepSpeed's default is 1.0
        "zero_optimization": {
            "stage": 1,
            "reduce_bucket_size": max(parameter.numel() for parameter in parameters),  # the default reserves 2 GB
            "overlap_comm": False,
        },
        "communication_data_type": "fp32",
    }
    engine = _initialize(module, mesh, settings, AdamW(adamw_groups, fused=True), parameters)
    zero = engine.optimizer
    if type(zero) is not DeepSpeedZeroOptimizer or engine.zero_optimization_stage() != 1:
        raise RuntimeError(f"DeepSpeed made a {type(zero).__name__}, but ZeRO stage 1 was configured")
    zero.__class__ = ZeroAdamW
    zero.mesh = mesh
    zero.partial_over_tensor = [p for p in module.parameters() if is_partial_over_tensor(p)]
    # tables may be bfloat16: their gradients are accumulated over micro-batches and reduced in float32
    zero.use_grad_accum_attribute = True
    if loss_scaler is not None:
        zero.loss_scaler = loss_scaler
    engine.matrices = matrices
    return engine


def build_evaluation_engine(module: PipelineModule, mesh: Mesh) -> Engine:
    """Returns an engine that only evaluates. It has no optimizer and no gradients."""
    module.requires_grad_(False)
    return _initialize(module, mesh, {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1})


def _initialize(module: PipelineModule, mesh: Mesh, settings: dict, optimizer=None, parameters=None) -> Engine:
    with quiet_output():
        engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=optimizer,
            model_parameters=parameters,
            config=settings | PIPELINE_SETTINGS,
            dist_init_required=False,
        )
    engine.__class__, engine.mesh = Engine, mesh
    return engine


def build_loss_scaler(initial: float, window: int) -> DynamicLossScaler:
    """Returns float16's loss scaler: it halves at a skipped step, doubles after `window` others (arXiv 1710.03740)."""
    hysteresis = {"delayed_shift": 1, "consecutive_hysteresis": False}
    limits = {"min_scale": LOSS_SCALE_MINIMUM, "raise_error_at_min_scale": False}
    return DynamicLossScaler(init_scale=initial, scale_window=window, dtype=torch.half, **hysteresis, **limits)
