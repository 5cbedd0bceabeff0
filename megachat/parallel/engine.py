"""DeepSpeed as megachat uses it: one PipelineEngine for every layout, in float32 mode, with ZeRO-1 for AdamW only.

Only this file, instructions.py, optim/joint.py and optim/graph.py use DeepSpeed's private names. Each one is listed in
PRIVATE_NAMES and checked at import.
"""

import contextlib
import io
import itertools
import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Protocol, TypeVar, cast

import deepspeed
import deepspeed.comm
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
from deepspeed.runtime.pipe import schedule
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.pipe.module import PipelineModule
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import nn
from torch.utils._pytree import tree_iter

from megachat.installation import DEEPSPEED_VERSION
from megachat.parallel.collectives import all_reduce
from megachat.parallel.deepspeed_version import check_deepspeed
from megachat.parallel.instructions import ForwardAndBackward, recorded
from megachat.parallel.mesh import Mesh
from megachat.parallel.without_compiler import AdamW
from megachat.place import is_counted_copy, is_partial_over_tensor

# What we rely on beyond DeepSpeed's documented interface: methods that we call or override, and attributes that its
# methods use.
PRIVATE_NAMES = {
    PipelineEngine: """
        _INSTRUCTION_MAP _exec_backward_pass _exec_schedule _compute_loss num_stages stage_id is_last_stage
        reset_activation_shape eval_batch micro_batches grad_layer pipe_buffers _running_engine_backward total_loss
        global_steps global_samples pipe_recv_buf _grad_layer_buf""".split(),
    PipelineModule: "_partition_layers _set_bounds _layer_specs parts loss_fn".split(),
    DeepSpeedZeroOptimizer: """
        setup_buckets reduce_gradients get_gradient_for_reduction backward_epilogue step zero_grad scaled_global_norm
        _update_scale update_lp_params set_gradient_accumulation_boundary check_grad_overflow overflow loss_scale
        loss_scaler dynamic_loss_scale clip_grad averaged_gradients params_in_partition partition_size bit16_groups
        round_robin_bit16_offsets partition_gradients single_partition_of_fp32_groups use_separate_grad_accum
        use_grad_accum_attribute _zero_padding""".split(),
    DynamicLossScaler: "cur_scale cur_iter last_overflow_iter cur_hysteresis".split(),
}
_LOSS_SCALER_STATE = PRIVATE_NAMES[DynamicLossScaler]
LOSS_SCALE_MINIMUM = 1.0
PIPELINE_SETTINGS = {"pipeline": {"pipe_partitioned": False, "grad_partitioned": False, "use_reentrant": False}}
Outcome = TypeVar("Outcome")

check_deepspeed(deepspeed.__version__, DEEPSPEED_VERSION, PRIVATE_NAMES)


class MatrixOptimizer(Protocol):
    """The methods of optim.partition.MuonPartition that the engine calls."""

    def start_async_reduce(self) -> None: ...

    def start_reduce(self) -> None: ...


class ZeroAdamW(DeepSpeedZeroOptimizer):
    """AdamW under ZeRO-1. The caller (optim/joint.py) passes the gradient norm, which decides whether to skip the step.

    build_engine() makes it by replacing the class of DeepSpeed's instance. DeepSpeed's step() calls the two overridden
    methods.
    """

    mesh: Mesh
    partial_over_tensor: list[nn.Parameter]  # each tensor rank's gradient covers only its tokens
    _scaled_norm: torch.Tensor

    def scaled_global_norm(self, norm_type=2):
        return self._scaled_norm  # inf makes step() clear the gradients and change nothing

    def _update_scale(self, has_overflow=False):
        pass  # step() calls this before it unscales the gradients with the scale; apply() does it afterwards

    def reduce(self) -> None:
        """Averages the gradients over the data axis; each rank keeps those of its ZeRO share."""
        partial = [self.get_gradient_for_reduction(parameter) for parameter in self.partial_over_tensor]
        if partial:  # sequence parallelism
            total = torch.cat([gradient.flatten() for gradient in partial])
            all_reduce(total, self.mesh.tensor, name="gradients of parameters used by each rank's tokens")
            sums = total.split([gradient.numel() for gradient in partial])
            for gradient, summed in zip(partial, sums, strict=True):
                gradient.copy_(summed.view_as(gradient))
        self.set_gradient_accumulation_boundary(True)
        self.setup_buckets()
        # pipeline_parallel=True would only allocate a second reduction buffer that nothing uses
        self.reduce_gradients(pipeline_parallel=False)

    def local_gradients(self) -> list[torch.Tensor]:
        """Returns this rank's reduced gradients. Those replicated over the tensor axis are on tensor rank 0 only, so a
        sum over all ranks counts each element once.
        """
        local = []
        for index, parameters in enumerate(self.params_in_partition):
            gradients = [g for g in self.averaged_gradients[index] if not getattr(g, "_zero_padding", False)]
            for gradient, parameter in zip(gradients, parameters, strict=False):  # drops trailing padding
                if is_counted_copy(parameter, self.mesh.tensor.rank):
                    local.append(gradient)
        return local

    def apply(self, scaled_norm: torch.Tensor) -> None:
        """Clips and updates this rank's shares, then gathers the weights; if the norm is inf, changes nothing.

        scaled_norm: 0-d, of the whole gradient, including the loss scale; on the CPU, because DeepSpeed reads its value
        while the device works on Muon's update. The loss scale is updated last: the gradients include the old one.
        """
        self._scaled_norm = scaled_norm
        self.step()
        self.zero_grad()
        if self.dynamic_loss_scale:  # at an overflow a constant scale would only log a line, before ours
            super()._update_scale(self.overflow)

    def fragments(self) -> Iterator[tuple[nn.Parameter, int, int, dict[str, torch.Tensor]]]:
        """Yields (parameter, start, length, {"master" | "exp_avg" | "exp_avg_sq": flat float32 view}) of this rank's
        share.

        start and length count the parameter's elements, row-major. The views are live: a checkpoint is read into them.
        Parameters without elements on this rank are left out.
        """
        for index, flat in enumerate(self.single_partition_of_fp32_groups):
            state = self.optimizer.state[flat]
            if "exp_avg" not in state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(flat), torch.zeros_like(flat)
            for parameter, start, here in self.share_slices(index):
                moments = {kind: state[kind][here] for kind in ("exp_avg", "exp_avg_sq")}
                yield parameter, start, here.stop - here.start, {"master": flat.detach()[here]} | moments

    def accumulated_gradients(self) -> list[tuple[nn.Parameter, torch.Tensor]]:
        """Returns each parameter with its gradient of the micro-batches so far, live float32, before reduce()."""
        pairs = [(p, self.get_gradient_for_reduction(p)) for group in self.bit16_groups for p in group]
        return [(parameter, gradient) for parameter, gradient in pairs if gradient is not None]

    def discard_gradients(self) -> None:
        """Forgets the gradients of the micro-batches so far, before reduce()."""
        self.zero_grad()

    def gradient_shares(self) -> list[torch.Tensor]:
        """Returns copies of this rank's share of each group's gradients, flat float32, between reduce() and apply()."""
        groups = range(len(self.single_partition_of_fp32_groups))
        return [torch.cat([gradient.flatten() for gradient in self.averaged_gradients[i]]).float() for i in groups]

    def set_gradient_shares(self, shares: list[torch.Tensor]) -> None:  # from gradient_shares()
        for index, share in enumerate(shares):
            sizes = [gradient.numel() for gradient in self.averaged_gradients[index]]
            for gradient, part in zip(self.averaged_gradients[index], share.split(sizes), strict=True):
                gradient.copy_(part.view_as(gradient))

    def share_slices(self, index: int) -> Iterator[tuple[nn.Parameter, int, slice]]:
        """Yields (parameter, its first element on this rank, its slice of the rank's share) of group `index`."""
        rank, size = self.mesh.data.rank, self.partition_size[index]
        begin, end = rank * size, (rank + 1) * size
        for parameter, offset in zip(self.bit16_groups[index], self.round_robin_bit16_offsets[index], strict=True):
            low, high = max(begin, offset), min(end, offset + parameter.numel())
            if low < high:
                yield parameter, low - offset, slice(low - begin, high - begin)

    def step_counters(self) -> list[torch.Tensor]:
        """Returns the live step counters of AdamW's groups."""
        list(self.fragments())  # creates missing state
        return [self.optimizer.state[flat]["step"] for flat in self.single_partition_of_fp32_groups]

    def refresh_weights(self) -> None:
        """Copies the masters into the model's weights on every rank, after the masters were loaded."""
        self.update_lp_params()

    def loss_scaler_state(self) -> dict[str, float | int]:
        """Returns the loss scaler's counters; a constant scale has fewer."""
        return {key: getattr(self.loss_scaler, key) for key in _LOSS_SCALER_STATE if hasattr(self.loss_scaler, key)}

    def load_loss_scaler_state(self, state: dict[str, float | int]) -> None:
        """Restores the counters. Those of a constant scale are ignored: with its 1, float16 gradients underflow."""
        if self.dynamic_loss_scale and "cur_iter" in state:
            for key in _LOSS_SCALER_STATE:
                setattr(self.loss_scaler, key, state[key])


class Engine(PipelineEngine):
    """PipelineEngine whose schedule calls our backward pass, our gradient reduction and our optimizer step."""

    mesh: Mesh
    matrices: MatrixOptimizer
    _backwards = 0  # backward passes of this step so far
    _optimizer_step: Callable[[], object]
    _outcome: object = None

    @property
    def adamw(self) -> ZeroAdamW:
        """The optimizer of all parameters that are not on Muon."""
        return self.optimizer

    def train_step(self, micro_batches, optimizer_step: Callable[[], Outcome]) -> tuple[torch.Tensor, Outcome]:
        """Runs one step: forward and backward of every (ids, targets), then `optimizer_step`; all ranks call it.

        Returns the mean loss over micro-batches and ranks (0-d, nats) and what `optimizer_step` returned.
        """
        self._backwards, self._optimizer_step = 0, optimizer_step
        loss = self.train_batch(micro_batches)
        return loss, cast(Outcome, self._outcome)  # the schedule calls optimizer_step once

    def run_micro_batch(self, micro_batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor | None:
        """Runs forward and backward of one (ids, targets) as train_step does, and reduces nothing; all ranks call it.

        Returns the loss of this rank's rows (0-d, nats) on the last stage, else None.
        """
        self._backwards, self.total_loss = -1, None  # no backward pass is the last one, which would start reductions
        self._compute_loss = True
        self.module.train()
        self.set_dataiterator(iter([micro_batch]))
        self._exec_schedule(ForwardAndBackward(micro_batches=1, stages=self.num_stages, stage_id=self.stage_id))
        loss, self.total_loss = self.total_loss, None
        return loss

    def _exec_backward_pass(self, buffer_id):
        """One backward over all tensors of a stage's output, so that every gradient hook fires once per micro-batch."""
        self._backwards += 1
        if self._backwards == self.micro_batches:
            self.matrices.start_async_reduce()
        if self.is_last_stage():
            return PipelineEngine._exec_backward_pass(self, buffer_id)
        outputs = self.pipe_buffers["outputs"][buffer_id]
        gradients = self.grad_layer if isinstance(self.grad_layer, (list, tuple)) else (self.grad_layer,)
        self._running_engine_backward = True
        try:
            torch.autograd.backward([tensor for tensor in outputs if tensor.is_floating_point()], list(gradients))
        finally:
            self._running_engine_backward = False
        self.adamw.backward_epilogue()
        self.pipe_buffers["output_tensors"][buffer_id] = None
        self.pipe_buffers["outputs"][buffer_id] = None

    def _reduce_gradients(self):
        self.matrices.start_reduce()
        self.adamw.reduce()

    def _step_optimizers(self):
        self._outcome = self._optimizer_step()
        self.global_steps += 1
        self.global_samples += self.train_batch_size()

    # DeepSpeed calls the functions of this map, not the methods, so an override alone would do nothing
    _INSTRUCTION_MAP = {
        instruction: recorded(instruction, function)
        for instruction, function in {
            **PipelineEngine._INSTRUCTION_MAP,
            schedule.BackwardPass: _exec_backward_pass,
            schedule.ReduceGrads: _reduce_gradients,
            schedule.OptimizerStep: _step_optimizers,
        }.items()
    }

    def evaluate(
        self,
        micro_batches: list,
        measure: nn.Module | None = None,
        before_forward: Callable[[int], object] = lambda number: None,
    ) -> list[torch.Tensor]:
        """Returns `measure(output, targets)` of each (ids, targets) on the last stage, and [] on the others.

        Every rank calls it with micro-batches of one shape, which may differ from training. measure: by default the
        loss module in evaluation mode; all its results have one shape. before_forward: called on every rank with the
        number of each micro-batch, before it passes this rank's stage.
        """
        numbers = itertools.count()

        def count(module, inputs) -> None:
            before_forward(next(numbers))

        hook = self.module.register_forward_pre_hook(count)
        self.total_loss = None
        self.reset_activation_shape()  # buffers between stages still have the training shape
        loss, self.module.loss_fn = self.module.loss_fn, measure or self.module.loss_fn
        try:
            outputs = self.eval_batch(
                iter(micro_batches), reduce_output=None, bcast_loss=False, num_micro_batches=len(micro_batches)
            )
        finally:
            self.module.loss_fn = loss
            hook.remove()
        self.total_loss = None
        self.reset_activation_shape()
        self.module.train()
        return outputs or []

    def received(self) -> list[torch.Tensor]:
        """Returns what this stage holds of what others sent: buffers, and inputs beside the copies that passes use."""
        held = self.pipe_recv_buf, self._grad_layer_buf, self.pipe_buffers["inputs"]
        return list(filter(torch.is_tensor, tree_iter(held)))

    @property
    def local_loss(self) -> torch.Tensor | None:
        """This rank's mean loss of the last step before averaging over ranks; None where no loss is computed."""
        return None if self.total_loss is None else self.total_loss / self.gradient_accumulation_steps()


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
        self.parts = [0, len(self._layer_specs)]
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
    if type(zero) is not DeepSpeedZeroOptimizer or zero.partition_gradients:
        raise RuntimeError(f"DeepSpeed made a {type(zero).__name__}, but ZeRO stage 1 was configured")
    zero.__class__ = ZeroAdamW
    zero.mesh = mesh
    zero.partial_over_tensor = [p for p in module.parameters() if is_partial_over_tensor(p)]
    zero.check_grad_overflow = False  # optim/joint.py decides by the norm; this avoids another collective
    # tables may be bfloat16: their gradients are accumulated over micro-batches and reduced in float32
    zero.use_separate_grad_accum = zero.use_grad_accum_attribute = True
    if loss_scaler is not None:
        zero.loss_scaler, zero.dynamic_loss_scale = loss_scaler, True
    engine.matrices = matrices
    return engine


def build_evaluation_engine(module: PipelineModule, mesh: Mesh) -> Engine:
    """Returns an engine that only evaluates. It has no optimizer and no gradients."""
    module.requires_grad_(False)
    return _initialize(module, mesh, {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1})


def _initialize(module: PipelineModule, mesh: Mesh, settings: dict, optimizer=None, parameters=None) -> Engine:
    settings = settings | {"steps_per_print": 2**31 - 1} | PIPELINE_SETTINGS
    with quiet_output():
        engine, *_ = deepspeed.initialize(
            model=module, optimizer=optimizer, model_parameters=parameters, config=settings, dist_init_required=False
        )
    engine.__class__, engine.mesh = Engine, mesh
    return engine


def build_loss_scaler(initial: float, window: int) -> DynamicLossScaler:
    """Returns float16's loss scaler: it halves at a skipped step, doubles after `window` others (arXiv 1710.03740)."""
    hysteresis = {"delayed_shift": 1, "consecutive_hysteresis": False}
    limits = {"min_scale": LOSS_SCALE_MINIMUM, "raise_error_at_min_scale": False}
    return DynamicLossScaler(init_scale=initial, scale_window=window, dtype=torch.half, **hysteresis, **limits)
