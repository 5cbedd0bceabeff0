"""DeepSpeed as megachat uses it: one PipelineEngine for every layout, in float32 mode, with ZeRO-1 for AdamW only.

Only zero_state.py and build.py in this folder also use DeepSpeed's private names; deepspeed_version.py lists them.
"""

import itertools
from collections.abc import Callable
from typing import Protocol, TypeVar, cast

import torch
from deepspeed.runtime.pipe import schedule
from deepspeed.runtime.pipe.engine import PipelineEngine
from torch import nn
from torch.utils._pytree import tree_iter

from megachat.parallel.collectives import all_reduce
from megachat.parallel.instructions import ForwardAndBackward, recorded
from megachat.parallel.mesh import Mesh
from megachat.parallel.zero_state import ZeroState
from megachat.place import is_counted_copy

Outcome = TypeVar("Outcome")


class MatrixOptimizer(Protocol):
    """The methods of optim.partition.MuonPartition that the engine calls."""

    def start_async_reduce(self) -> None: ...

    def start_reduce(self) -> None: ...


class ZeroAdamW(ZeroState):
    """AdamW under ZeRO-1. The caller (optim/joint.py) passes the gradient norm, which decides whether to skip the step.

    build_engine() makes it by replacing the class of DeepSpeed's instance. DeepSpeed's step() calls the two overridden
    methods.
    """

    partial_over_tensor: list[nn.Parameter]  # each tensor rank's gradient covers only its tokens
    _scaled_norm: torch.Tensor

    def scaled_global_norm(self, norm_type=2):
        return self._scaled_norm  # inf makes step() clear the gradients and change nothing else

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
            # not strict: a rank's share may end with padding
            for gradient, parameter in zip(self.averaged_gradients[index], parameters, strict=False):
                if is_counted_copy(parameter, self.mesh.tensor.rank):
                    local.append(gradient)
        return local

    def apply(self, scaled_norm: torch.Tensor | None) -> None:
        """Clips and updates this rank's shares, then gathers the weights; without a norm, changes no weight or state.

        scaled_norm: 0-d, of the whole gradient, including the loss scale; on the CPU, because DeepSpeed reads its value
        while the device works on Muon's update. None if it was not finite.
        """
        self._scaled_norm = torch.tensor(torch.inf) if scaled_norm is None else scaled_norm
        self.step()
        self.update_loss_scale(skipped=scaled_norm is None)

    def update_loss_scale(self, *, skipped: bool) -> None:
        """Ends a step: a float16 run's loss scale falls if the step was skipped, else it may rise."""
        if self.loss_scaler.dynamic:  # at a skipped step a constant scale would only log a line, before ours
            self.loss_scaler.update_scale(skipped)


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
        pipeline = self.mesh.pipeline
        self._exec_schedule(ForwardAndBackward(micro_batches=1, stages=pipeline.size, stage_id=pipeline.rank))
        loss, self.total_loss = self.total_loss, None
        return loss

    def _run_backward(self, buffer_id):
        """One backward over all tensors of a stage's output, so that every gradient hook fires once per micro-batch."""
        self._backwards += 1
        if self._backwards == self.gradient_accumulation_steps():
            self.matrices.start_async_reduce()
        if self.is_last_stage():
            return PipelineEngine._INSTRUCTION_MAP[schedule.BackwardPass](self, buffer_id)
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

    # DeepSpeed calls the functions of this map, not the methods, so an override alone would do nothing
    _INSTRUCTION_MAP = {
        instruction: recorded(instruction, function)
        for instruction, function in {
            **PipelineEngine._INSTRUCTION_MAP,
            schedule.BackwardPass: _run_backward,
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

    def prepare_walk(self, received: tuple[torch.Tensor, ...]) -> None:
        """Prepares a step without values and other ranks. received: buffers for what the stage before sends."""
        # else the first step exchanges shapes, and gradients are copied from a view for each data rank: that takes long
        self.pipe_recv_buf, self.first_output_send = received, False
        self.adamw.unflatten = lambda flat, tensors: tensors

    def sent(self, instruction, buffer_id: int = 0) -> list[torch.Tensor]:
        """Returns the tensors that an instruction of the schedule sends to another stage."""
        if instruction is schedule.SendActivation:
            return list(self.pipe_buffers["outputs"][buffer_id])
        if instruction is schedule.SendGrad:
            return [tensor.grad for tensor in self.pipe_buffers["inputs"][buffer_id] if tensor.is_floating_point()]
        return []

    @property
    def local_loss(self) -> torch.Tensor | None:
        """This rank's mean loss of the last step before averaging over ranks; None where no loss is computed."""
        return None if self.total_loss is None else self.total_loss / self.gradient_accumulation_steps()
