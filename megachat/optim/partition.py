"""The Muon partition: float32 masters and momentum in equal shards over the data x tensor grid of a pipeline stage, each matrix orthogonalized
at one place of it.

A step: gradients are summed over the data axis into shards, momentum moves on shards, owners orthogonalize whole matrices, shards are updated,
weights are gathered. The result depends on the gradients alone: neither the buckets nor the owners nor the tensor axis changes a bit.
No state moves before step(), so a step can be given up until then.
"""

import torch

from megachat.kernels.gradient_norm import SumOfSquares, torch_sum_of_squares
from megachat.optim.bucket_memory import BucketMemory
from megachat.optim.exchange import Directed, Exchange
from megachat.optim.matrix import Matrix
from megachat.optim.muon import Functions, orthogonalization_dtype, second_moment_shape
from megachat.optim.partition_plan import make_plan
from megachat.parallel.collectives import all_gather_objects
from megachat.parallel.mesh import Mesh
from megachat.parallel.progress import profile_range
from megachat.parallel.rectangles import Rectangle, flat_rectangles

_REDUCTIONS_IN_FLIGHT = 2  # buckets that hold wire buffers at a time: one on the wire while the next is packed


class MuonPartition:
    """Muon over the data and tensor axes.

    parameters: float32 by name, this tensor rank's shards, equal on every data rank; their storage is taken over: afterwards they are views
    of bfloat16 buckets when computing in bfloat16, else of float32 buckets. matrices: the same names, whole shapes. gradient_wire: bfloat16 or
    float32, the dtype in which gradients travel (they are summed in float32, in the order of ranks, in the first case); with one data rank
    nothing is rounded.
    Gradients are collected by hooks while backward runs; `grad` is None afterwards. A parameter without gradient in a step counts as zeros.
    Order of calls in a step: backwards, start_async_reduce() before the last of them, reduce, wait_for_reduce, then sum_of_squares and either step or drop; wait,
    or wait_for_layer of each block, before the parameters are read. Without start_async_reduce() nothing is reduced before start_reduce().
    Raises ValueError when names, shapes, cuts or dtypes do not fit, RuntimeError when ranks disagree on the plan or calls come out of order.
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
        layers_per_bucket: int | None = None,
        squares: SumOfSquares = torch_sum_of_squares,
        functions: Functions | None = None,
    ):
        self.mesh, self._squares, self._functions = mesh, squares, functions or Functions()
        self.plan = make_plan(matrices, mesh.data.size, tensor=mesh.tensor.size, layers_per_bucket=layers_per_bucket)
        _check(parameters, matrices, mesh.tensor.size, gradient_wire)
        if len(set(all_gather_objects(self.plan.digest, mesh.stage, name="Muon plans compared"))) > 1:
            raise RuntimeError(
                "the ranks of a pipeline stage planned different Muon partitions: their parameters or settings differ"
            )
        self.direction_dtype = orthogonalization_dtype(compute_dtype)
        weight_dtype = torch.bfloat16 if compute_dtype == torch.bfloat16 else torch.float32
        device = next(iter(parameters.values())).device if parameters else mesh.device
        self.matrices_updated = 0  # at this place, in its last step
        numbers = range(len(self.plan.buckets))
        self._buckets = [
            BucketMemory(self.plan, number, mesh.data, weight_dtype, gradient_wire, device) for number in numbers
        ]
        self._exchanges = [Exchange(self.plan, number, mesh.stage, self.direction_dtype) for number in numbers]
        self._second_moment = {
            index: torch.zeros(second_moment_shape(matrix.shape), device=device)
            for index, matrix in enumerate(self.plan.matrices)
            if self.plan.owners[index] == mesh.stage.rank
        }
        self._layer_buckets: dict[int, list[BucketMemory]] = {}
        for bucket in self._buckets:
            for layer in {self.plan.matrices[index].layer for index in bucket.layout.matrices}:
                self._layer_buckets.setdefault(layer, []).append(bucket)
        self._lr = {matrix.multiplier: torch.zeros((), device=device) for matrix in self.plan.matrices}
        self._weight_decay, self._momentum = torch.zeros((), device=device), torch.zeros((), device=device)
        self._beta2 = torch.tensor(beta2, dtype=torch.float32, device=device)
        self._arrived: set[int] = set()  # matrices with a gradient in this step
        self._awaited: list[set[int]] | None = (
            None  # when armed, by bucket: matrices without a gradient in the last micro-batch
        )
        self._launched = 0  # buckets whose reduction was launched in this step, always the first ones
        self._reduced = False
        for number, bucket in enumerate(self._buckets):
            self._take_over(parameters, number, bucket)

    # ---- construction

    @torch.no_grad()
    def _take_over(self, parameters: dict[str, torch.nn.Parameter], number: int, bucket: BucketMemory) -> None:
        for place, index in enumerate(bucket.layout.matrices):
            parameter = parameters[self.plan.matrices[index].name]
            if piece := self._exchanges[number].held.get(index):
                bucket.master[piece.in_shard] = parameter.reshape(-1)[piece.start : piece.stop]
            view = bucket.part(bucket.weights, place)
            view.copy_(parameter)
            parameter.data = view
            parameter.grad = None
            parameter.register_post_accumulate_grad_hook(self._collector(number, bucket, place, index))

    def _collector(self, number: int, bucket: BucketMemory, place: int, index: int):
        name = self.plan.matrices[index].name

        @torch.no_grad()
        def collect(parameter: torch.nn.Parameter) -> None:
            if self._reduced or number < self._launched:
                raise RuntimeError(
                    f"a gradient of {name} arrived after its reduction was launched and before step() or discard_gradients()"
                )
            view = bucket.part(bucket.gradients, place)
            if index in self._arrived:
                view.add_(parameter.grad)
            else:
                view.copy_(parameter.grad)
                self._arrived.add(index)
            parameter.grad = None
            if self._awaited is not None:
                self._awaited[number].discard(index)
                self._launch_complete()

        return collect

    # ---- one step

    def set_hyper(self, lr: float, weight_decay: float, momentum: float) -> None:
        """For the steps to come; lr is before each matrix's multiplier."""
        for multiplier, tensor in self._lr.items():
            tensor.fill_(lr * multiplier)
        self._weight_decay.fill_(weight_decay)
        self._momentum.fill_(momentum)

    def start_async_reduce(self) -> None:
        """The next backward is the step's last: from now on a bucket is reduced as soon as all its gradients of this backward are there and the
        buckets before it are launched, so that every rank launches in the order of the plan."""
        if self._reduced or self._launched:
            raise RuntimeError(
                "start_async_reduce() came after a reduction was launched and before step() or discard_gradients()"
            )
        self._awaited = [set(bucket.layout.matrices) for bucket in self._buckets]

    @torch.no_grad()
    def start_reduce(self) -> None:
        """Launch the mean over the data axis of what the hooks collected, bucket after bucket in the order of backward; hooks may have launched
        the first ones."""
        if self._reduced:
            raise RuntimeError("start_reduce() was called twice without step() or discard_gradients() in between")
        while self._launched < len(self._buckets):
            self._launch_next()
        self._reduced = True

    def _launch_complete(self) -> None:
        while self._launched < len(self._buckets) and not self._awaited[self._launched]:
            self._launch_next()

    def _launch_next(self) -> None:
        bucket = self._buckets[self._launched]
        for place, index in enumerate(bucket.layout.matrices):
            if index not in self._arrived:
                bucket.part(bucket.gradients, place).zero_()
        with profile_range("reduce"):
            if self._launched >= _REDUCTIONS_IN_FLIGHT:
                self._buckets[self._launched - _REDUCTIONS_IN_FLIGHT].finish_reduction()
            bucket.launch_reduction()
        self._launched += 1

    @torch.no_grad()
    def wait_for_reduce(self) -> None:
        """Returns when the reduced gradients may be read."""
        with profile_range("reduce"):
            for bucket in self._buckets:
                bucket.finish_reduction()

    @torch.no_grad()
    def sum_of_squares(self) -> torch.Tensor:
        """0-d float32: of this place's shard of the reduced gradients. Added over the grid it counts every element once; inf and nan show."""
        self._require_reduced("sum_of_squares")
        self.wait_for_reduce()
        reduced = [bucket.reduced for bucket in self._buckets]
        return self._squares(reduced) if reduced else torch.zeros_like(self._momentum)

    def discard_gradients(self) -> None:
        """Forget the gradients of this step; no state is touched. All ranks call it, like step()."""
        if self._awaited is not None and not self._reduced:
            self.start_reduce()  # other ranks' hooks may have launched more buckets than this one's
        self.wait_for_reduce()
        self._forget_gradients()
        self.matrices_updated = 0

    def _forget_gradients(self) -> None:
        self._arrived.clear()
        self._awaited, self._launched, self._reduced = None, 0, False

    @torch.no_grad()
    def step(self, gradient_scale: float | torch.Tensor) -> None:
        """One step with the reduced gradients times `gradient_scale`. The gathers of the weights are launched, in the order of forward but those
        of buckets without exchange first, and awaited by wait_for_gather() or wait_for_layer()."""
        self._require_reduced("step")
        self.wait_for_reduce()
        self.wait_for_gather()  # of the step before: gathers read the weights that are now written
        self.matrices_updated = 0
        forward = list(zip(reversed(self._buckets), reversed(self._exchanges), strict=True))
        outgoing, returning = [], []
        for bucket, exchange in forward:
            updates = self._functions.momentum_update(
                bucket.momentum, bucket.reduced.mul_(gradient_scale), self._momentum
            ).to(self.direction_dtype)
            outgoing.append((exchange.to_owners(updates), updates))
        # no place waits for another's orthogonalization before it has done its own: the busiest place alone sets the time
        for (bucket, exchange), (arrive, updates) in zip(forward, outgoing, strict=True):
            results = {index: self._orthogonalize(index, update) for index, update in arrive().items()}
            arrive_back = exchange.to_holders(results, updates)
            if exchange.needed:
                returning.append((bucket, arrive_back))
            else:
                self._apply(bucket, arrive_back())
        for bucket, arrive_back in returning:
            self._apply(bucket, arrive_back())
        self._forget_gradients()

    def _orthogonalize(self, index: int, update: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The whole-matrix half of the step: (direction [m, n], norm, scales); moves the second moment."""
        direction = self._functions.update_direction(update)
        self.matrices_updated += 1
        return direction, *self._functions.update_scales(direction, self._second_moment[index], self._beta2)

    def _apply(self, bucket: BucketMemory, fragments: list[Directed]) -> None:
        """The elementwise half of the step, rectangle by rectangle, so that scales broadcast; then the bucket's gather is launched."""
        for directed in fragments:
            matrix, piece = self.plan.matrices[directed.matrix], directed.fragment
            shape = matrix.local_shape(self.plan.tensor)
            targets = flat_rectangles(shape, bucket.master[piece.in_shard], piece.start)
            directions = flat_rectangles(shape, directed.direction, piece.start)
            first_row = targets[0][0][0]
            for ((row, column), (rows, width), weight), (_, _, direction) in zip(targets, directions, strict=True):
                if directed.scale.size(1) == 1:
                    scale = directed.scale[row - first_row : row - first_row + rows]
                else:
                    scale = directed.scale[:, column : column + width]
                self._functions.apply_update(
                    weight, direction, directed.norm, scale, self._lr[matrix.multiplier], self._weight_decay
                )
        with profile_range("gather"):
            bucket.launch_gather()

    def wait_for_gather(self) -> None:
        """Returns when all parameters hold the new weights on this rank."""
        with profile_range("gather"):
            for bucket in reversed(self._buckets):
                bucket.gathering.wait()

    def wait_for_layer(self, layer: int) -> None:
        """Returns when the block's parameters hold the new weights on this rank; other blocks' gathers may go on. Any other number waits for
        nothing."""
        with profile_range("gather"):
            for bucket in reversed(self._layer_buckets.get(layer, [])):
                bucket.gathering.wait()

    def _require_reduced(self, call: str) -> None:
        if not self._reduced:
            raise RuntimeError(f"{call}() needs start_reduce() first")

    # ---- state

    def state_shards(self) -> list[tuple[str, str, tuple[int, int], list[Rectangle]]]:
        """(kind, name, whole shape, [(offsets, sizes, view), ...]) of every matrix, the same list on every rank but for the rectangles.

        kind: "master", "momentum" or "second_moment", all float32. Views alias the live state: load into them in place, then call
        refresh_weights(). Together the rectangles of a stage's ranks cover each tensor once. Gathers under way are waited for.
        """
        self.wait_for_gather()
        shards = []
        for bucket, exchange in zip(self._buckets, self._exchanges, strict=True):
            for index in bucket.layout.matrices:
                matrix = self.plan.matrices[index]
                for kind, flat in (("master", bucket.master), ("momentum", bucket.momentum)):
                    shards.append((kind, matrix.name, matrix.shape, self._rectangles(exchange, index, flat)))
                shape, moment = second_moment_shape(matrix.shape), self._second_moment.get(index)
                shards.append(
                    ("second_moment", matrix.name, shape, [] if moment is None else [((0, 0), shape, moment)])
                )
        return shards

    def gradient_shards(self) -> list[tuple[str, tuple[int, int], list[Rectangle]]]:
        """(name, whole shape, rectangles) of every matrix's reduced gradient, between wait_for_reduce() and step() or discard_gradients(); views of live memory."""
        self._require_reduced("gradient_shards")
        return [
            (
                self.plan.matrices[index].name,
                self.plan.matrices[index].shape,
                self._rectangles(exchange, index, bucket.reduced),
            )
            for bucket, exchange in zip(self._buckets, self._exchanges, strict=True)
            for index in bucket.layout.matrices
        ]

    def _rectangles(self, exchange: Exchange, index: int, flat: torch.Tensor) -> list[Rectangle]:
        """This place's part of a matrix, in whole coordinates; flat: this place's part of its bucket."""
        piece = exchange.held.get(index)
        if piece is None:
            return []
        matrix, tensor = self.plan.matrices[index], self.mesh.tensor
        return flat_rectangles(
            matrix.local_shape(tensor.size),
            flat[piece.in_shard],
            piece.start,
            matrix.local_offset(tensor.size, tensor.rank),
        )

    @torch.no_grad()
    def refresh_weights(self) -> None:
        """Make the parameters on every rank from the masters, after these were loaded."""
        self.wait_for_gather()
        for bucket in reversed(self._buckets):
            bucket.launch_gather()
        self.wait_for_gather()

    def state_bytes(self) -> dict[str, int]:
        """What this place holds: {"master", "momentum", "second_moment"}. With float32 weights the masters are the weights themselves."""
        kinds = {
            "master": [bucket.master for bucket in self._buckets],
            "momentum": [bucket.momentum for bucket in self._buckets],
            "second_moment": list(self._second_moment.values()),
        }
        return {
            kind: sum(tensor.numel() * tensor.element_size() for tensor in tensors) for kind, tensors in kinds.items()
        }


def _check(
    parameters: dict[str, torch.nn.Parameter], matrices: list[Matrix], tensor: int, gradient_wire: torch.dtype
) -> None:
    if set(parameters) != {matrix.name for matrix in matrices}:
        different = sorted(set(parameters) ^ {matrix.name for matrix in matrices})
        raise ValueError(f"parameters and matrices differ in {', '.join(different[:5])}")
    for matrix in matrices:
        parameter, shape = parameters[matrix.name], matrix.local_shape(tensor)
        if tuple(parameter.shape) != shape or parameter.dtype != torch.float32:
            raise ValueError(f"{matrix.name} is {tuple(parameter.shape)} {parameter.dtype}, expected {shape} float32")
    if gradient_wire not in (torch.bfloat16, torch.float32):
        raise ValueError(f"gradient_wire is {gradient_wire}, expected bfloat16 or float32")
