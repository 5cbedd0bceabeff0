"""The Muon partition: distributes Muon over the data x tensor grid of a pipeline stage.

float32 masters and momentum are stored in equal shards, one per data rank. The owner rank of a matrix orthogonalizes
it. A step collects the gradients of all micro-batches, reduce-scatters them to shards and updates the momentum of the
shards. It sends the updates to the owners, orthogonalizes whole matrices and sends the directions back. Then it applies
them to the masters and all-gathers the weights.

The result depends only on the gradients. Buckets, owners and the tensor axis do not change a single bit. No state
changes before step(), so a step can be abandoned until then.
"""

from enum import Enum, auto

import torch

from megachat.kernels.gradient_norm import SumOfSquares, torch_sum_of_squares
from megachat.optim.bucket_memory import BucketMemory
from megachat.optim.exchange import Result
from megachat.optim.matrix import Matrix
from megachat.optim.muon import Functions
from megachat.optim.partition_state import PartitionState
from megachat.parallel.mesh import Mesh
from megachat.parallel.progress import profile_range
from megachat.parallel.rectangles import TensorShard, flat_rectangles

_REDUCES_IN_FLIGHT = 2  # buckets with wire buffers at a time: one is in flight while the next is packed


class Phase(Enum):
    """The phases of a step, in order. Each is begun by the call that its comment names."""

    BACKWARD = auto()  # step() or discard_gradients(): hooks add gradients to the buckets
    LAST_BACKWARD = auto()  # start_async_reduce(): hooks also start the reduce of each bucket that is complete
    REDUCING = auto()  # start_reduce(): all reduces are started, no gradient may arrive
    REDUCED = auto()  # wait_for_reduce(): the reduced gradients may be read


class MuonPartition(PartitionState):
    """Muon over the data and tensor axes.

    parameters: float32, by name: the local matrices of this tensor rank, equal on all data ranks. Their storage is
    replaced: they become views of buckets, bfloat16 if compute_dtype is bfloat16, else float32. matrices: the same
    names, with whole shapes. gradient_wire: dtype in which gradients are sent. bfloat16 gradients are summed in
    float32 and in rank order. One data rank sends and rounds nothing.

    Hooks collect the gradients during backward and set `grad` to None. A missing gradient counts as zero. The caller
    begins each Phase of a step; start_async_reduce() is optional: without it, all reduces start after backward. Before
    it reads parameters, it calls wait_for_gather(), or wait_for_block() for each block.
    Raises ValueError for names, shapes, cuts or dtypes that do not match, RuntimeError for calls out of order and for
    plans that differ between ranks.
    """

    def __init__(
        self,
        parameters: dict[str, torch.nn.Parameter],
        matrices: list[Matrix],
        mesh: Mesh,
        *,
        compute_dtype: torch.dtype,
        gradient_wire: torch.dtype,
        beta2: float,
        blocks_per_bucket: int | None = None,
        squares: SumOfSquares = torch_sum_of_squares,
        functions: Functions | None = None,
    ):
        super().__init__(
            parameters,
            matrices,
            mesh,
            compute_dtype=compute_dtype,
            gradient_wire=gradient_wire,
            blocks_per_bucket=blocks_per_bucket,
        )
        self._squares, self._functions = squares, functions or Functions()
        self._lr = {matrix.multiplier: torch.zeros((), device=self.device) for matrix in self.plan.matrices}
        self._weight_decay, self._momentum = torch.zeros((), device=self.device), torch.zeros((), device=self.device)
        self._beta2 = torch.tensor(beta2, dtype=torch.float32, device=self.device)
        self.matrices_updated = 0  # by this rank in its last step
        self._begin_step()
        for bucket in self._buckets:
            for index in bucket.layout.matrices:
                parameter = parameters[self.plan.matrices[index].name]
                parameter.register_post_accumulate_grad_hook(self._gradient_hook(bucket, index))

    def _begin_step(self) -> None:
        self._phase = Phase.BACKWARD
        self._collected: set[int] = set()  # matrices with a gradient in this step
        # by bucket: matrices whose gradient of the last micro-batch has not arrived
        self._missing = [set(bucket.layout.matrices) for bucket in self._buckets]
        self._reduces_started = 0  # buckets start in order, so these are the first ones

    # ---- one step, in the order of the calls

    def set_hyper(self, lr: float, weight_decay: float, momentum: float) -> None:
        """Sets the hyperparameters of the next steps. Each matrix multiplies lr by its multiplier."""
        for multiplier, tensor in self._lr.items():
            tensor.fill_(lr * multiplier)
        self._weight_decay.fill_(weight_decay)
        self._momentum.fill_(momentum)

    def start_async_reduce(self) -> None:
        """Lets the hooks start reduces from now on; call it before the last backward pass of the step.

        A hook starts the reduce of a bucket when its gradients are complete and the reduces of all buckets before it
        are started. So every rank starts the reduces in the order of the plan.
        """
        self._require("start_async_reduce", Phase.BACKWARD)
        self._phase = Phase.LAST_BACKWARD

    def _gradient_hook(self, bucket: BucketMemory, index: int):
        """Returns the hook that moves a parameter's gradient into its bucket."""

        @torch.no_grad()
        def collect(parameter: torch.nn.Parameter) -> None:
            if bucket.number < self._reduces_started:
                raise RuntimeError(
                    f"a gradient of {self.plan.matrices[index].name} arrived after the reduce of its bucket was "
                    "started and before step() or discard_gradients()"
                )
            total, gradient = bucket.local_matrix(bucket.gradients, index), parameter.grad
            assert gradient is not None
            if index in self._collected:
                total.add_(gradient)
            else:
                total.copy_(gradient)
                self._collected.add(index)
            parameter.grad = None
            if self._phase is Phase.LAST_BACKWARD:
                self._missing[bucket.number].discard(index)
                while self._reduces_started < len(self._buckets) and not self._missing[self._reduces_started]:
                    self._start_next_reduce()

        return collect

    def collected_gradients(self) -> dict[str, torch.Tensor]:
        """Returns this rank's gradients of the micro-batches so far by matrix, live float32, before start_reduce()."""
        self._require("collected_gradients", Phase.BACKWARD)
        buckets = {index: bucket for bucket in self._buckets for index in bucket.layout.matrices}
        return {
            self.plan.matrices[index].name: buckets[index].local_matrix(buckets[index].gradients, index)
            for index in sorted(self._collected)
        }

    @torch.no_grad()
    def start_reduce(self) -> None:
        """Starts the mean of the gradients over the data axis for all buckets that the hooks have not started yet."""
        self._require("start_reduce", Phase.BACKWARD, Phase.LAST_BACKWARD)
        while self._reduces_started < len(self._buckets):
            self._start_next_reduce()
        self._phase = Phase.REDUCING

    def _start_next_reduce(self) -> None:
        bucket = self._buckets[self._reduces_started]
        for index in bucket.layout.matrices:
            if index not in self._collected:
                bucket.local_matrix(bucket.gradients, index).zero_()
        with profile_range("reduce"):
            if self._reduces_started >= _REDUCES_IN_FLIGHT:
                self._buckets[self._reduces_started - _REDUCES_IN_FLIGHT].finish_reduce()
            bucket.start_reduce()
        self._reduces_started += 1

    @torch.no_grad()
    def wait_for_reduce(self) -> None:
        """Returns when the reduced gradients may be read."""
        self._require("wait_for_reduce", Phase.REDUCING)
        with profile_range("reduce"):
            for bucket in self._buckets:
                bucket.finish_reduce()
        self._phase = Phase.REDUCED

    @torch.no_grad()
    def sum_of_squares(self) -> torch.Tensor:
        """Returns the sum of squares of this rank's shards of the reduced gradients, 0-d float32, inf and nan included.
        The sum over the grid counts every element once."""
        self._require("sum_of_squares", Phase.REDUCED)
        reduced = [bucket.reduced for bucket in self._buckets]
        return self._squares(reduced) if reduced else torch.zeros_like(self._momentum)

    def gradient_shards(self) -> list[TensorShard]:
        """Returns the reduced "gradient" of every matrix as views of live memory. Valid between wait_for_reduce() and
        step() or discard_gradients()."""
        self._require("gradient_shards", Phase.REDUCED)
        return [
            self._shard("gradient", index, bucket, bucket.reduced)
            for bucket in self._buckets
            for index in bucket.layout.matrices
        ]

    def discard_gradients(self) -> None:
        """Ends the step without an update; no state changes. Like step(), all ranks must call it."""
        if self._phase is Phase.LAST_BACKWARD:
            self.start_reduce()  # the hooks of other ranks may have started more reduces than this rank's
        if self._phase is Phase.REDUCING:
            self.wait_for_reduce()
        self._begin_step()
        self.matrices_updated = 0

    @torch.no_grad()
    def step(self, gradient_scale: float | torch.Tensor) -> None:
        """Updates the masters with the reduced gradients times `gradient_scale` and starts the gathers of the weights.
        The gathers follow the order of the forward pass; buckets without exchange come first."""
        self.begin_update()
        self.update(gradient_scale)
        self.end_update()

    def begin_update(self) -> None:
        """Returns when update() may change the weights."""
        self._require("step", Phase.REDUCED)
        self.wait_for_gather()  # gathers of the previous step still read the weights

    def end_update(self) -> None:
        """Ends the step after update()."""
        self._begin_step()
        self.matrices_updated = len(self._second_moment)

    def update(self, gradient_scale: float | torch.Tensor) -> None:
        """Does the work of step() on the device. On one rank per stage it changes nothing but tensors."""
        sent, returned = [], []
        for bucket in reversed(self._buckets):
            gradient = bucket.reduced.mul_(gradient_scale)
            update = self._functions.momentum_update(bucket.momentum, gradient, self._momentum).to(self.direction_dtype)
            sent.append((bucket, bucket.exchange.send_to_owners(update)))
        # Each rank orthogonalizes all matrices that it owns before it waits for results of other ranks, so the time is
        # that of the busiest rank.
        for bucket, receive_updates in sent:
            results = {index: self._orthogonalize(index, update) for index, update in receive_updates().items()}
            receive_results = bucket.exchange.send_back(results)
            if bucket.exchange.needed:
                returned.append((bucket, receive_results))
            else:
                self._apply(bucket, receive_results())
        for bucket, receive_results in returned:
            self._apply(bucket, receive_results())

    def _orthogonalize(self, index: int, update: torch.Tensor) -> Result:
        """Does the whole-matrix part of the step on the owner rank, and updates the second moment."""
        direction = self._functions.update_direction(update)
        norm, scale = self._functions.update_scales(direction, self._second_moment[index], self._beta2)
        return Result(direction, norm, scale)

    def _apply(self, bucket: BucketMemory, results: dict[int, Result]) -> None:
        """Does the elementwise part of the step on this rank's fragments, then starts the bucket's gather. Fragments
        are split into rectangles, because scales broadcast over rows or columns."""
        for index, result in results.items():
            matrix, fragment = self.plan.matrices[index], bucket.exchange.fragments[index]
            shape = matrix.local_shape(self.plan.tensor)
            weights = flat_rectangles(shape, bucket.master[fragment.in_shard], fragment.start)
            directions = flat_rectangles(shape, result.direction, fragment.start)
            first_row, _ = fragment.rows(shape[1])
            for ((row, column), (rows, columns), weight), (_, _, direction) in zip(weights, directions, strict=True):
                if matrix.scaled_by_row:
                    scale = result.scale[row - first_row : row - first_row + rows]
                else:
                    scale = result.scale[:, column : column + columns]
                lr = self._lr[matrix.multiplier]
                self._functions.apply_update(weight, direction, result.norm, scale, lr, self._weight_decay)
        with profile_range("gather"):
            bucket.start_gather()

    def wait_for_gather(self) -> None:
        """Returns when all parameters on this rank have the new weights."""
        with profile_range("gather"):
            for bucket in reversed(self._buckets):
                bucket.gather.wait()

    def wait_for_block(self, block: int) -> None:
        """Returns when one block's parameters have the new weights on this rank. Returns at once for other numbers."""
        with profile_range("gather"):
            for bucket in self._block_buckets.get(block, []):
                bucket.gather.wait()

    def _require(self, call: str, *phases: Phase) -> None:
        if self._phase not in phases:
            expected = " or ".join(phase.name for phase in phases)
            raise RuntimeError(f"{call}() was called in phase {self._phase.name} of a step, expected {expected}")
