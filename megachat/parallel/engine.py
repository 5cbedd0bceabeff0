"""DeepSpeed as megachat uses it: one PipelineEngine for every layout, float32 mode, ZeRO-1 for AdamW's parameters only.

The other parameters (Muon's matrices) ride on four overridden methods of the ZeRO optimizer, so that the gradient norm, clipping and the
decision to skip a step are joint over both sets and all ranks. These methods are private to DeepSpeed: the version is pinned and their
presence is checked at import.
"""

import contextlib
import io
import itertools
import logging
import warnings
from collections.abc import Callable
from typing import Protocol

import deepspeed
import deepspeed.comm
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
from deepspeed.runtime.pipe import schedule
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.pipe.module import PipelineModule
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import nn

from megachat.kernels.gradient_norm import SumOfSquares, torch_sum_of_squares
from megachat.parallel.collectives import all_reduce
from megachat.parallel.mesh import Mesh
from megachat.parallel.progress import profile_range
from megachat.place import is_partial_over_tensor, is_tensor_shard

_PRIVATE = "reduce_gradients get_gradient_for_reduction setup_buckets scaled_global_norm has_overflow _update_scale step update_lp_params".split()
_missing = [name for name in _PRIVATE if not hasattr(DeepSpeedZeroOptimizer, name)]
if _missing or not hasattr(PipelineEngine, "_exec_backward_pass"):
    raise ImportError(
        f"DeepSpeed {deepspeed.__version__} lacks {', '.join(_missing) or '_exec_backward_pass'}: install the version that setup.py pins"
    )

LOSS_SCALE_MINIMUM = 1.0
_PIPELINE = {"pipeline": {"pipe_partitioned": False, "grad_partitioned": False, "use_reentrant": False}}


class MatrixOptimizer(Protocol):
    """What the engine asks of the optimizer of the matrices."""

    def start_async_reduce(self) -> None: ...

    def start_reduce(self) -> None: ...

    def wait_for_reduce(self) -> None: ...

    def sum_of_squares(self) -> torch.Tensor: ...

    def discard_gradients(self) -> None: ...

    def step(self, gradient_scale: float | torch.Tensor) -> None: ...

    def wait_for_gather(self) -> None: ...


class JointZero1(DeepSpeedZeroOptimizer):
    """ZeRO-1 that shares norm, clipping and skip with a MatrixOptimizer. Made by swapping the class of DeepSpeed's own instance."""

    matrices: MatrixOptimizer
    mesh: Mesh
    joint_norm: torch.Tensor
    wishes: (
        torch.Tensor
    )  # float32 [n]: before a step this rank's, after it the sum of all ranks'; they travel with the norm
    partial_over_tensor: list[nn.Parameter]
    before_update: Callable[[], None] = staticmethod(
        lambda: None
    )  # called once a step, before weights or states change
    squares: SumOfSquares = staticmethod(torch_sum_of_squares)
    observe: Callable[[], None] | None = (
        None  # called once a step, when all gradients are reduced and none is clipped or dropped yet
    )

    def reduce_gradients(self, pipeline_parallel=False):
        self.matrices.start_reduce()
        partial = [self.get_gradient_for_reduction(parameter) for parameter in self.partial_over_tensor]
        if partial:  # sequence parallelism: each rank of the tensor axis saw its own tokens
            total = torch.cat([gradient.flatten() for gradient in partial])
            all_reduce(total, self.mesh.tensor, name="gradients of parameters that see own tokens")
            for gradient, part in zip(partial, total.split([gradient.numel() for gradient in partial]), strict=True):
                gradient.copy_(part.view_as(gradient))
        # pipeline_parallel=True would only allocate a second reduction buffer that nothing uses
        self.setup_buckets()
        super().reduce_gradients(pipeline_parallel=False)

    def has_overflow(self, partition_gradients=True):
        return False  # decided by the joint norm, with no collective of its own

    def scaled_global_norm(self, norm_type=2):
        self.matrices.wait_for_reduce()
        if self.observe is not None:
            self.observe()
        with profile_range("norm"):
            total = self.squares(self._counted_here(), self.matrices.sum_of_squares())
            joint = torch.cat((total.view(1), self.wishes))
            all_reduce(joint, self.mesh.world, name="gradient norm")
        total, self.wishes = joint[0], joint[1:]
        norm = total.sqrt()
        norm = torch.where(torch.isfinite(norm), norm, torch.full_like(norm, torch.inf))
        self.joint_norm = norm / self.loss_scale
        return norm

    def _counted_here(self) -> list[torch.Tensor]:
        """This rank's reduced gradients of AdamW's parameters, such as all ranks of the tensor axis hold on the first of them alone."""
        found = []
        for index, parameters in enumerate(self.params_in_partition):
            own = [
                gradient for gradient in self.averaged_gradients[index] if not getattr(gradient, "_zero_padding", False)
            ]
            for gradient, parameter in zip(own, parameters, strict=False):  # a trailing pad falls off
                if is_tensor_shard(parameter) or self.mesh.tensor.rank == 0:
                    found.append(gradient)
        return found

    def _update_scale(self, has_overflow=False):
        # DeepSpeed calls this once a step, after the decision and before AdamW
        if has_overflow:
            self.matrices.discard_gradients()
            super()._update_scale(True)
            return
        scale = 1.0 / self.loss_scale
        if self.clip_grad > 0:
            scale = scale / ((self.joint_norm + 1e-6) / self.clip_grad).clamp_min(1.0)
        self.matrices.step(scale)
        # on a good step the scale may grow; AdamW's gradients still carry the old one, so step() updates it last

    def step(self, closure=None):
        self.before_update()
        super().step(closure)
        if not self.overflow:
            super()._update_scale(False)


# What an instruction of DeepSpeed's schedule is called when a job stands still, whether it needs another rank to go on, and its part of a profile.
_INSTRUCTIONS = {
    schedule.LoadMicroBatch: ("loading a micro-batch", False, "data"),
    schedule.ForwardPass: ("forward", False, "forward"),
    schedule.BackwardPass: ("backward", False, "backward"),
    schedule.SendActivation: ("sending activations to the next stage", True, "stages"),
    schedule.RecvActivation: ("receiving activations from the stage before", True, "stages"),
    schedule.SendGrad: ("sending gradients to the stage before", True, "stages"),
    schedule.RecvGrad: ("receiving gradients from the next stage", True, "stages"),
    schedule.ReduceTiedGrads: ("reducing tied gradients", False, "reduce"),
    schedule.ReduceGrads: ("reducing AdamW's gradients", True, "reduce"),
    schedule.OptimizerStep: ("optimizer step", True, "optimizer"),
}


def _noted(instruction, function):
    """The function of an instruction, written down in the rank's progress when it begins."""
    text, waits, name = _INSTRUCTIONS[instruction]

    def execute(self, **arguments):
        self.mesh.world.progress.note(text, waits=waits)
        with profile_range(name):
            return function(self, **arguments)

    return execute


class Engine(PipelineEngine):
    """PipelineEngine with one backward over all tensors of a stage's output, so that every gradient hook fires once a micro-batch."""

    mesh: Mesh
    _backwards = 0  # of this step

    def train_batch(self, data_iter=None):
        self._backwards = 0
        return super().train_batch(data_iter)

    def _exec_backward_pass(self, buffer_id):
        self._backwards += 1
        if self._backwards == self.micro_batches:
            self.optimizer.matrices.start_async_reduce()
        if self.is_last_stage():
            return PipelineEngine._exec_backward_pass(self, buffer_id)
        outputs = self.pipe_buffers["outputs"][buffer_id]
        gradients = self.grad_layer if isinstance(self.grad_layer, (list, tuple)) else (self.grad_layer,)
        self._running_engine_backward = True
        try:
            torch.autograd.backward([tensor for tensor in outputs if tensor.is_floating_point()], list(gradients))
        finally:
            self._running_engine_backward = False
        self.optimizer.backward_epilogue()
        self.pipe_buffers["output_tensors"][buffer_id] = None
        self.pipe_buffers["outputs"][buffer_id] = None

    # DeepSpeed calls the functions of this map, not the methods, so an override alone would do nothing
    _INSTRUCTION_MAP = {
        instruction: _noted(instruction, function)
        for instruction, function in {
            **PipelineEngine._INSTRUCTION_MAP,
            schedule.BackwardPass: _exec_backward_pass,
        }.items()
    }

    def evaluate(
        self, micro_batches, measure: nn.Module | None = None, begins: Callable[[int], object] = lambda number: None
    ) -> list[torch.Tensor]:
        """`measure` of each (ids, targets) of a list, the loss module's evaluation by default; on the last stage, elsewhere an empty list.

        Every rank calls it with micro-batches of one shape, which need not be the shape of training. measure: called with the head's
        output and targets; what it returns has one shape for all. begins: called on every rank with the number of each micro-batch before it
        passes this rank's stage.
        """
        numbers = itertools.count()

        def tell(module, inputs) -> None:
            begins(next(numbers))

        told = self.module.register_forward_pre_hook(tell)
        self.total_loss = None
        self.reset_activation_shape()  # the buffers between stages have the shape of training
        loss, self.module.loss_fn = self.module.loss_fn, measure or self.module.loss_fn
        try:
            outputs = self.eval_batch(
                iter(micro_batches), reduce_output=None, bcast_loss=False, num_micro_batches=len(micro_batches)
            )
        finally:
            self.module.loss_fn = loss
            told.remove()
        self.total_loss = None
        self.reset_activation_shape()
        self.module.train()
        return outputs or []

    @property
    def own_loss(self) -> torch.Tensor | None:
        """This rank's mean loss of the last step before averaging over ranks; None where no loss is computed."""
        return None if self.total_loss is None else self.total_loss / self.gradient_accumulation_steps()

    @property
    def joint_norm(self) -> torch.Tensor:
        """Norm of the last step's whole gradient, unscaled, before clipping; inf when it was not finite."""
        return self.optimizer.joint_norm


def start_collectives(device: torch.device, backend: str, timeout) -> None:
    """Initialise torch.distributed and DeepSpeed's view of it, from the launch variables. timeout is a datetime.timedelta."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed and we use names of collectives that torch 2.13 renames and older ones, which we also run on, know alone
    warnings.filterwarnings("ignore", message=r".*torch\.distributed\.\w+. is deprecated", category=FutureWarning)
    # DeepSpeed would compile a shared-memory op for CPU collectives at the first start; gloo does without, and a machine may have no compiler
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    with quiet_output():
        deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, timeout=timeout, verbose=False)


@contextlib.contextmanager
def quiet_output():
    """Swallow what DeepSpeed prints while it starts; an exception still shows its own text."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def deepspeed_settings(*, micro_rows: int, accumulation: int, clip_norm: float, largest_adamw_tensor: int) -> dict:
    """DeepSpeed's dictionary, the only place that knows its keys. Its defaults clip at 1.0 and reserve 2 GB for reduction, so both are given."""
    return {
        "train_micro_batch_size_per_gpu": micro_rows,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": clip_norm,
        "zero_optimization": {"stage": 1, "reduce_bucket_size": largest_adamw_tensor, "overlap_comm": False},
        "communication_data_type": "fp32",
        "steps_per_print": 2**31 - 1,
    } | _PIPELINE


class _Stage(PipelineModule):
    """A PipelineModule that is given this stage's layers alone: who holds what was decided in the Plan."""

    def _partition_layers(self, method="uniform"):
        self.parts = [0, len(self._layer_specs)]
        self._set_bounds(start=0, stop=len(self._layer_specs))


def build_module(layers: list[Callable], loss: nn.Module, mesh: Mesh) -> PipelineModule:
    """The stage of this rank, as DeepSpeed's engine wants it. layers: this stage's modules in order; plain functions of the stream may stand
    between them."""
    with quiet_output():
        return _Stage(layers=layers, topology=mesh.topology, loss_fn=loss)


def build_engine(
    module: PipelineModule,
    adamw_groups: list[dict],
    matrices: MatrixOptimizer,
    mesh: Mesh,
    settings: dict,
    loss_scaler: DynamicLossScaler | None,
) -> Engine:
    """DeepSpeed's engine over the module, with AdamW's groups under ZeRO-1 and the matrices beside it.

    adamw_groups: dictionaries of torch.optim.AdamW, each with a "name"; the first must hold float32 parameters, because ZeRO takes the
    dtype of its decisions from it.
    """
    if adamw_groups[0]["params"][0].dtype != torch.float32:
        raise ValueError("the first AdamW group must be float32")
    optimizer = torch.optim.AdamW(adamw_groups, fused=True)
    with quiet_output():
        engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=optimizer,
            model_parameters=[parameter for group in adamw_groups for parameter in group["params"]],
            config=settings,
            dist_init_required=False,
        )
    zero = engine.optimizer
    if type(zero) is not DeepSpeedZeroOptimizer or zero.partition_gradients:
        raise RuntimeError(f"DeepSpeed made a {type(zero).__name__} where ZeRO stage 1 was asked for")
    zero.__class__ = JointZero1
    zero.matrices, zero.mesh = matrices, mesh
    zero.partial_over_tensor = [parameter for parameter in module.parameters() if is_partial_over_tensor(parameter)]
    zero.joint_norm = torch.zeros((), device=mesh.device)
    zero.wishes = torch.zeros(0, device=mesh.device)
    # tables may be bfloat16: their gradients are accumulated over micro-batches in float32, and reduced so
    zero.use_separate_grad_accum = zero.use_grad_accum_attribute = True
    if loss_scaler is not None:
        zero.loss_scaler, zero.dynamic_loss_scale = loss_scaler, True
    engine.__class__, engine.mesh = Engine, mesh
    return engine


def build_evaluation_engine(module: PipelineModule, mesh: Mesh) -> Engine:
    """An engine that only evaluates: no optimizer, no gradients, no memory but the weights'."""
    module.requires_grad_(False)
    settings = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "steps_per_print": 2**31 - 1}
    with quiet_output():
        engine, *_ = deepspeed.initialize(model=module, config=settings | _PIPELINE, dist_init_required=False)
    engine.__class__, engine.mesh = Engine, mesh
    return engine


def build_loss_scaler(initial: float, window: int) -> DynamicLossScaler:
    """float16's loss scaler: halves at a skipped step, doubles after `window` good ones (mixed precision training, arXiv 1710.03740)."""
    return DynamicLossScaler(
        init_scale=initial,
        scale_window=window,
        min_scale=LOSS_SCALE_MINIMUM,
        delayed_shift=1,
        consecutive_hysteresis=False,
        raise_error_at_min_scale=False,
        dtype=torch.half,
    )


def adamw_fragments(zero: JointZero1):
    """Yield (parameter, start, length, {"master" | "exp_avg" | "exp_avg_sq": flat float32 view}) for this rank's part of every AdamW parameter.

    start and length are in elements of the parameter, row-major. Views are live: a checkpoint is read into them in place. A parameter of
    which this rank holds nothing is not yielded.
    """
    for index, flat in enumerate(zero.single_partition_of_fp32_groups):
        state = zero.optimizer.state[flat]
        if "exp_avg" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(flat), torch.zeros_like(flat)
        for parameter, start, here in _held(zero, index):
            views = {
                "master": flat.detach()[here],
                "exp_avg": state["exp_avg"][here],
                "exp_avg_sq": state["exp_avg_sq"][here],
            }
            yield parameter, start, here.stop - here.start, views


def adamw_gradients(zero: JointZero1):
    """Yield (parameter, start, flat float32 gradient) for this rank's part of every AdamW parameter; for `JointZero1.observe` only."""
    for index in range(len(zero.single_partition_of_fp32_groups)):
        flat = torch.cat([gradient.flatten() for gradient in zero.averaged_gradients[index]])
        for parameter, start, here in _held(zero, index):
            yield parameter, start, flat[here].float()


def _held(zero: JointZero1, index: int):
    """Yield (parameter, first element of it that this rank holds, where these elements lie in the rank's share) of a group."""
    rank, size = zero.mesh.data.rank, zero.partition_size[index]
    begin, end = rank * size, (rank + 1) * size
    for parameter, offset in zip(zero.bit16_groups[index], zero.round_robin_bit16_offsets[index], strict=True):
        low, high = max(begin, offset), min(end, offset + parameter.numel())
        if low < high:
            yield parameter, low - offset, slice(low - begin, high - begin)


def adamw_steps(zero: JointZero1) -> list[torch.Tensor]:
    """The step counters of AdamW's groups, live."""
    list(adamw_fragments(zero))  # makes state that does not exist yet
    return [zero.optimizer.state[flat]["step"] for flat in zero.single_partition_of_fp32_groups]
