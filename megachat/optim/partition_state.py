"""What one rank stores of the Muon partition: built once, and read and written by checkpoints, checks and counts."""

from abc import ABC, abstractmethod

import torch

from megachat.optim.bucket_memory import BucketMemory
from megachat.optim.matrix import Matrix
from megachat.optim.muon import orthogonalization_dtype, second_moment_shape
from megachat.optim.partition_plan import make_plan
from megachat.parallel.collectives import all_gather_objects
from megachat.parallel.mesh import Mesh
from megachat.parallel.rectangles import MASTER, Rectangle, TensorShard, flat_rectangles


class PartitionState(ABC):
    """The buckets of this rank, and the second moments of the matrices that it owns. MuonPartition updates them.

    See MuonPartition for the arguments and errors of the constructor.
    """

    def __init__(
        self,
        parameters: dict[str, torch.nn.Parameter],
        matrices: list[Matrix],
        mesh: Mesh,
        *,
        compute_dtype: torch.dtype,
        gradient_wire: torch.dtype,
        blocks_per_bucket: int | None,
    ):
        self.mesh = mesh
        self.plan = make_plan(matrices, mesh.data.size, tensor=mesh.tensor.size, blocks_per_bucket=blocks_per_bucket)
        _validate(parameters, matrices, mesh.tensor.size, gradient_wire)
        if len(set(all_gather_objects(self.plan.digest, mesh.stage, name="Muon plans compared"))) > 1:
            raise RuntimeError(
                "the ranks of a pipeline stage planned different Muon partitions: their parameters or settings differ"
            )
        self.direction_dtype = orthogonalization_dtype(compute_dtype)
        self.device = next(iter(parameters.values())).device if parameters else mesh.device
        dtypes = {
            "weight_dtype": torch.bfloat16 if compute_dtype == torch.bfloat16 else torch.float32,
            "wire_dtype": gradient_wire,
            "direction_dtype": self.direction_dtype,
        }
        numbers = range(len(self.plan.buckets))
        self._buckets = [BucketMemory(self.plan, number, mesh, self.device, **dtypes) for number in numbers]
        self._block_buckets: dict[int, list[BucketMemory]] = {}
        for bucket in reversed(self._buckets):
            for block in {self.plan.matrices[index].block for index in bucket.layout.matrices}:
                self._block_buckets.setdefault(block, []).append(bucket)
        self._second_moment = {
            index: torch.zeros(second_moment_shape(matrix.shape), device=self.device)
            for index, matrix in enumerate(self.plan.matrices)
            if self.plan.owners[index] == mesh.stage.rank
        }
        self._move_into_buckets(parameters)

    @torch.no_grad()
    def _move_into_buckets(self, parameters: dict[str, torch.nn.Parameter]) -> None:
        for bucket in self._buckets:
            for index in bucket.layout.matrices:
                parameter = parameters[self.plan.matrices[index].name]
                if fragment := bucket.exchange.fragments.get(index):
                    bucket.master[fragment.in_shard] = parameter.reshape(-1)[fragment.start : fragment.stop]
                view = bucket.local_matrix(bucket.weights, index)
                view.copy_(parameter)
                parameter.data = view
                parameter.grad = None

    @abstractmethod
    def wait_for_gather(self) -> None:
        """Returns when all parameters on this rank have the new weights."""

    def state_shards(self) -> list[TensorShard]:
        """Returns the float32 "master", "momentum" and "second_moment" of every matrix, after gathers in progress.

        Only the rectangles differ between ranks. Together, those of all ranks of the stage cover each tensor once. They
        are views of the live state: load into them in place, then call refresh_weights().
        """
        self.wait_for_gather()
        shards = []
        for bucket in self._buckets:
            for index in bucket.layout.matrices:
                shards.append(self._shard(MASTER, index, bucket, bucket.master))
                shards.append(self._shard("momentum", index, bucket, bucket.momentum))
                matrix, moment = self.plan.matrices[index], self._second_moment.get(index)
                shape = second_moment_shape(matrix.shape)
                whole: list[Rectangle] = [] if moment is None else [((0, 0), shape, moment)]
                shards.append(TensorShard("second_moment", matrix.name, shape, whole))
        return shards

    def _shard(self, kind: str, index: int, bucket: BucketMemory, flat: torch.Tensor) -> TensorShard:
        matrix, fragment, tensor = self.plan.matrices[index], bucket.exchange.fragments.get(index), self.mesh.tensor
        rectangles: list[Rectangle] = []
        if fragment:
            shape, offset = matrix.local_shape(tensor.size), matrix.local_offset(tensor.size, tensor.rank)
            rectangles = flat_rectangles(shape, flat[fragment.in_shard], fragment.start, offset)
        return TensorShard(kind, matrix.name, matrix.shape, rectangles)

    def masters_and_weights(self) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
        """Returns (matrix, masters, weights) of this rank's shards, live; nothing if the weights are the masters."""
        self.wait_for_gather()
        pairs = []
        for bucket in self._buckets:
            weights = bucket.weights[bucket.shard]
            for index, fragment in bucket.exchange.fragments.items() if weights.dtype != torch.float32 else ():
                here = fragment.in_shard
                pairs.append((self.plan.matrices[index].name, bucket.master[here], weights[here]))
        return pairs

    @torch.no_grad()
    def refresh_weights(self) -> None:
        """Copies the masters to the parameters on every rank. Call it after loading the masters."""
        self.wait_for_gather()
        for bucket in reversed(self._buckets):
            bucket.start_gather()
        self.wait_for_gather()

    def state_tensors(self) -> dict[str, list[torch.Tensor]]:
        """Returns the state on this rank by kind, live. With float32 weights, the masters are part of them."""
        return {
            MASTER: [bucket.master for bucket in self._buckets],
            "momentum": [bucket.momentum for bucket in self._buckets],
            "second_moment": list(self._second_moment.values()),
        }

    def gradient_buffers(self) -> list[torch.Tensor]:
        """Returns the buffers in which the gradients of this rank are summed, live float32."""
        return [bucket.gradients for bucket in self._buckets]


def _validate(
    parameters: dict[str, torch.nn.Parameter], matrices: list[Matrix], tensor: int, gradient_wire: torch.dtype
) -> None:
    if different := sorted(set(parameters) ^ {matrix.name for matrix in matrices}):
        raise ValueError(f"parameters and matrices differ in {', '.join(different[:5])}")
    for matrix in matrices:
        parameter, shape = parameters[matrix.name], matrix.local_shape(tensor)
        if tuple(parameter.shape) != shape or parameter.dtype != torch.float32:
            raise ValueError(f"{matrix.name} is {tuple(parameter.shape)} {parameter.dtype}, expected {shape} float32")
    if gradient_wire not in (torch.bfloat16, torch.float32):
        raise ValueError(f"gradient_wire is {gradient_wire}, expected bfloat16 or float32")
