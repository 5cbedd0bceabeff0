"""The Muon partition: float32 masters and momentum in equal shards over the data axis, each matrix orthogonalized on one rank.

A step: gradients are summed over ranks into shards, momentum moves on shards, leads orthogonalize whole matrices, shards are updated,
weights are gathered. The result depends on the ranks' gradients alone: neither the buckets nor the choice of leads changes a bit.
No state moves before step(), so a step can be given up until then.
"""

import torch

from megachat.optim.exchange import Directed, Exchange
from megachat.optim.muon import apply_update, momentum_update, orthogonalization_dtype, second_moment_shape, update_direction, update_scales
from megachat.optim.partition_plan import Bucket, Matrix, make_plan
from megachat.parallel.collectives import Pending, all_gather, all_gather_objects, all_to_all, reduce_scatter
from megachat.parallel.mesh import Axis
from megachat.parallel.rectangles import flat_rectangles

_REDUCTIONS_IN_FLIGHT = 2  # buckets that hold wire buffers at a time: one on the wire while the next is packed


class _Buffers:
    """One bucket's memory on one rank; see partition_plan.Bucket for how matrices lie in it."""

    def __init__(self, layout: Bucket, axis: Axis, weight_dtype: torch.dtype, device: torch.device):
        self.layout = layout
        self.own = slice(axis.rank * layout.shard, (axis.rank + 1) * layout.shard)
        self.size = axis.size * layout.shard
        self.weights = torch.zeros(self.size, dtype=weight_dtype, device=device)
        # float32 weights are their own masters
        self.master = self.weights[self.own] if weight_dtype == torch.float32 else torch.zeros(layout.shard, device=device)
        self.momentum = torch.zeros(layout.shard, device=device)
        self.wire: tuple[torch.Tensor, torch.Tensor] | None = None  # (received, sent) while a reduction in another dtype is under way
        self.reducing: Pending | None = None
        self.gathering = Pending()
        self._gradients: torch.Tensor | None = None

    @property
    def gradients(self) -> torch.Tensor:
        """float32 [ranks * shard], accumulated over micro-batches; this rank's part becomes the reduced gradient. Made at first use."""
        if self._gradients is None:
            self._gradients = torch.zeros(self.size, device=self.weights.device)
        return self._gradients

    def part(self, flat: torch.Tensor, place: int, matrix: Matrix) -> torch.Tensor:
        """The matrix at `place` of the bucket, a view [m, n] of a whole flat buffer."""
        offset = self.layout.offsets[place]
        return flat[offset : offset + matrix.elements].view(matrix.shape)


class MuonPartition:
    """Muon over the data axis.

    parameters: float32 by name, equal on every rank; their storage is taken over: afterwards they are views of bfloat16 buckets when
    computing in bfloat16, else of float32 buckets. matrices: the same names. gradient_wire: bfloat16 or float32, the dtype in which
    gradients travel (they are summed in float32, in the order of ranks, in the first case); with one rank nothing is rounded.
    Gradients are collected by hooks while backward runs; `grad` is None afterwards. A parameter without gradient in a step counts as zeros.
    Order of calls in a step: backwards, reduce, wait_reduce, then sum_of_squares and either step and wait, or drop.
    Raises ValueError when names, shapes or dtypes do not fit, RuntimeError when ranks disagree on the plan or calls come out of order.
    """

    def __init__(
        self,
        parameters: dict[str, torch.nn.Parameter],
        matrices: list[Matrix],
        axis: Axis,
        *,
        compute_dtype: torch.dtype,
        gradient_wire: torch.dtype,
        beta2: float,
        layers_per_bucket: int | None = None,
    ):
        _check(parameters, matrices, gradient_wire)
        self.axis, self.gradient_wire = axis, gradient_wire
        self.plan = make_plan(matrices, axis.size, layers_per_bucket=layers_per_bucket)
        if len(set(all_gather_objects(self.plan.digest, axis))) > 1:
            raise RuntimeError(f"the ranks of the {axis.name} axis planned different Muon partitions: their parameters or settings differ")
        self.direction_dtype = orthogonalization_dtype(compute_dtype)
        weight_dtype = torch.bfloat16 if compute_dtype == torch.bfloat16 else torch.float32
        device = next(iter(parameters.values())).device if parameters else torch.device("cpu")
        self.matrices_updated = 0  # by this rank, in its last step
        self._buckets = [_Buffers(layout, axis, weight_dtype, device) for layout in self.plan.buckets]
        self._exchanges = [Exchange(self.plan, position, axis, self.direction_dtype) for position in range(len(self._buckets))]
        self._second_moment = {
            index: torch.zeros(second_moment_shape(matrix.shape), device=device)
            for index, matrix in enumerate(self.plan.matrices)
            if self.plan.leads[index] == axis.rank
        }
        self._lr = {matrix.multiplier: torch.zeros((), device=device) for matrix in self.plan.matrices}
        self._weight_decay, self._momentum = torch.zeros((), device=device), torch.zeros((), device=device)
        self._beta2 = torch.tensor(beta2, dtype=torch.float32, device=device)
        self._arrived: set[int] = set()  # matrices with a gradient in this step
        self._reduced = False
        for bucket, exchange in zip(self._buckets, self._exchanges, strict=True):
            self._take_over(parameters, bucket, exchange)

    # ---- construction

    @torch.no_grad()
    def _take_over(self, parameters: dict[str, torch.nn.Parameter], bucket: _Buffers, exchange: Exchange) -> None:
        for place, index in enumerate(bucket.layout.matrices):
            matrix = self.plan.matrices[index]
            parameter = parameters[matrix.name]
            if piece := exchange.held.get(index):
                bucket.master[piece.in_shard] = parameter.reshape(-1)[piece.start : piece.stop]
            view = bucket.part(bucket.weights, place, matrix)
            view.copy_(parameter)
            parameter.data = view
            parameter.grad = None
            parameter.register_post_accumulate_grad_hook(self._collector(bucket, place, index))

    def _collector(self, bucket: _Buffers, place: int, index: int):
        matrix = self.plan.matrices[index]

        @torch.no_grad()
        def collect(parameter: torch.nn.Parameter) -> None:
            if self._reduced:
                raise RuntimeError(f"a gradient of {matrix.name} arrived after reduce() and before step() or drop()")
            view = bucket.part(bucket.gradients, place, matrix)
            if index in self._arrived:
                view.add_(parameter.grad)
            else:
                view.copy_(parameter.grad)
                self._arrived.add(index)
            parameter.grad = None

        return collect

    # ---- one step

    def set_hyper(self, lr: float, weight_decay: float, momentum: float) -> None:
        """For the steps to come; lr is before each matrix's multiplier."""
        for multiplier, tensor in self._lr.items():
            tensor.fill_(lr * multiplier)
        self._weight_decay.fill_(weight_decay)
        self._momentum.fill_(momentum)

    @torch.no_grad()
    def reduce(self) -> None:
        """Launch the mean over the axis of what the hooks collected, bucket after bucket in the order of backward."""
        if self._reduced:
            raise RuntimeError("reduce() was called twice without step() or drop() in between")
        self._reduced = True
        for position, bucket in enumerate(self._buckets):
            for place, index in enumerate(bucket.layout.matrices):
                if index not in self._arrived:
                    bucket.part(bucket.gradients, place, self.plan.matrices[index]).zero_()
            self._launch_reduction(bucket)
            if position >= _REDUCTIONS_IN_FLIGHT - 1:
                self._finish_reduction(self._buckets[position - _REDUCTIONS_IN_FLIGHT + 1])

    def _launch_reduction(self, bucket: _Buffers) -> None:
        whole = bucket.gradients
        if self.gradient_wire == torch.float32 or self.axis.size == 1:  # one rank: no wire, so no rounding for it
            bucket.reducing = reduce_scatter(whole[bucket.own], whole, self.axis, asynchronous=True)
        else:
            bucket.wire = torch.empty_like(whole, dtype=self.gradient_wire), whole.to(self.gradient_wire)
            bucket.reducing = all_to_all(*bucket.wire, self.axis, asynchronous=True)

    def _finish_reduction(self, bucket: _Buffers) -> None:
        if bucket.reducing is None:
            return
        bucket.reducing.wait()
        mine = bucket.gradients[bucket.own]
        if bucket.wire is not None:
            first, *others = bucket.wire[0].view(self.axis.size, -1)
            mine.copy_(first)
            for other in others:  # in the order of ranks and in float32: the sum does not depend on how it was routed
                mine.add_(other)
        mine.div_(self.axis.size)
        bucket.wire = bucket.reducing = None

    @torch.no_grad()
    def wait_reduce(self) -> None:
        """Returns when the reduced gradients may be read."""
        for bucket in self._buckets:
            self._finish_reduction(bucket)

    @torch.no_grad()
    def sum_of_squares(self) -> torch.Tensor:
        """0-d float32: of this rank's shard of the reduced gradients. Added over the axis it counts every element once; inf and nan show."""
        self._require_reduced("sum_of_squares")
        # float64 sums, so that the order of buckets does not show in the norm
        squares = [bucket.gradients[bucket.own].square().sum(dtype=torch.float64) for bucket in self._buckets]
        return torch.stack(squares).sum().float() if squares else torch.zeros_like(self._momentum)

    def drop(self) -> None:
        """Forget the gradients of this step; no state is touched."""
        self.wait_reduce()
        self._arrived.clear()
        self._reduced = False
        self.matrices_updated = 0

    @torch.no_grad()
    def step(self, gradient_scale: float | torch.Tensor) -> None:
        """One step with the reduced gradients times `gradient_scale`; the gathers of the weights are launched, and awaited by wait()."""
        self._require_reduced("step")
        self.wait_reduce()
        self.matrices_updated = 0
        for bucket, exchange in zip(reversed(self._buckets), reversed(self._exchanges), strict=True):  # the order of forward
            gradients = bucket.gradients[bucket.own].mul_(gradient_scale)
            updates = momentum_update(bucket.momentum, gradients, self._momentum).to(self.direction_dtype)
            results = {}
            for index, update in exchange.to_leads(updates).items():
                direction = update_direction(update)
                results[index] = (direction, *update_scales(direction, self._second_moment[index], self._beta2))
                self.matrices_updated += 1
            for directed in exchange.to_holders(results, updates):
                self._apply(bucket, directed)
            self._gather(bucket)
        self._arrived.clear()
        self._reduced = False

    def _apply(self, bucket: _Buffers, directed: Directed) -> None:
        """The elementwise half of the step on one fragment, rectangle by rectangle, so that scales broadcast."""
        matrix, piece = self.plan.matrices[directed.matrix], directed.fragment
        master = bucket.master[piece.in_shard]
        targets = flat_rectangles(matrix.shape, master, piece.start)
        directions = flat_rectangles(matrix.shape, directed.direction, piece.start)
        first_row = targets[0][0][0]
        for ((row, column), (rows, width), weight), (_, _, direction) in zip(targets, directions, strict=True):
            if directed.scale.size(1) == 1:
                scale = directed.scale[row - first_row : row - first_row + rows]
            else:
                scale = directed.scale[:, column : column + width]
            apply_update(weight, direction, directed.norm, scale, self._lr[matrix.multiplier], self._weight_decay)

    def _gather(self, bucket: _Buffers) -> None:
        mine = bucket.weights[bucket.own]
        if mine.dtype != torch.float32:
            mine.copy_(bucket.master)
        bucket.gathering = all_gather(bucket.weights, mine, self.axis, asynchronous=True)

    def wait(self) -> None:
        """Returns when the parameters hold the new weights on this rank."""
        for bucket in self._buckets:
            bucket.gathering.wait()

    def _require_reduced(self, call: str) -> None:
        if not self._reduced:
            raise RuntimeError(f"{call}() needs reduce() first")

    # ---- state

    def state_shards(self) -> list[tuple[str, str, tuple[int, int], list[tuple[tuple[int, ...], tuple[int, ...], torch.Tensor]]]]:
        """(kind, name, whole shape, [(offsets, sizes, view), ...]) of every matrix, the same list on every rank but for the rectangles.

        kind: "master", "momentum" or "second_moment", all float32. Views alias the live state: load into them in place, then call
        refresh_weights(). Together the ranks' rectangles cover each tensor once.
        """
        shards = []
        for bucket, exchange in zip(self._buckets, self._exchanges, strict=True):
            for index in bucket.layout.matrices:
                matrix, piece = self.plan.matrices[index], exchange.held.get(index)
                for kind, flat in (("master", bucket.master), ("momentum", bucket.momentum)):
                    own = flat[piece.in_shard] if piece else flat[:0]
                    shards.append((kind, matrix.name, matrix.shape, flat_rectangles(matrix.shape, own, piece.start if piece else 0)))
                shape, moment = second_moment_shape(matrix.shape), self._second_moment.get(index)
                shards.append(("second_moment", matrix.name, shape, [] if moment is None else [((0, 0), shape, moment)]))
        return shards

    @torch.no_grad()
    def refresh_weights(self) -> None:
        """Make the parameters on every rank from the masters, after these were loaded."""
        for bucket in self._buckets:
            self._gather(bucket)
        self.wait()

    def state_bytes(self) -> dict[str, int]:
        """What this rank holds: {"master", "momentum", "second_moment"}. With float32 weights the masters are the weights themselves."""
        kinds = {
            "master": [bucket.master for bucket in self._buckets],
            "momentum": [bucket.momentum for bucket in self._buckets],
            "second_moment": list(self._second_moment.values()),
        }
        return {kind: sum(tensor.numel() * tensor.element_size() for tensor in tensors) for kind, tensors in kinds.items()}


def _check(parameters: dict[str, torch.nn.Parameter], matrices: list[Matrix], gradient_wire: torch.dtype) -> None:
    if set(parameters) != {matrix.name for matrix in matrices}:
        different = sorted(set(parameters) ^ {matrix.name for matrix in matrices})
        raise ValueError(f"parameters and matrices differ in {', '.join(different[:5])}")
    for matrix in matrices:
        parameter = parameters[matrix.name]
        if tuple(parameter.shape) != matrix.shape or parameter.dtype != torch.float32:
            raise ValueError(f"{matrix.name} is {tuple(parameter.shape)} {parameter.dtype}, expected {matrix.shape} float32")
    if gradient_wire not in (torch.bfloat16, torch.float32):
        raise ValueError(f"gradient_wire is {gradient_wire}, expected bfloat16 or float32")
