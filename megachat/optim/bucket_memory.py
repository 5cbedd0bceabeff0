"""One bucket on one rank: its buffers, and its collectives over the data axis (reduce gradients, gather weights)."""

import torch

from megachat.optim.exchange import Exchange
from megachat.optim.partition_plan import PartitionPlan
from megachat.parallel.collectives import Pending, all_gather, all_to_all, reduce_scatter
from megachat.parallel.mesh import Mesh


class BucketMemory:
    """The flat buffers of one bucket.

    weights: [data ranks x shard], bfloat16 or float32; the parameters are views of it. shard: this data rank's part of
    the flat buffers. master, momentum: float32 [shard], of this data rank. If the weights are float32, the master is a
    view of them. wire_dtype: dtype in which gradients are sent.
    """

    def __init__(
        self,
        plan: PartitionPlan,
        number: int,
        mesh: Mesh,
        device: torch.device,
        *,
        weight_dtype: torch.dtype,
        wire_dtype: torch.dtype,
        direction_dtype: torch.dtype,
    ):
        self.layout, self.number, self.data = plan.buckets[number], number, mesh.data
        self.exchange = Exchange(plan, number, mesh.stage, direction_dtype, device)
        self._local = {  # by matrix: first element in the flat buffers, shape
            index: (offset, plan.matrices[index].local_shape(plan.tensor))
            for index, offset in zip(self.layout.matrices, self.layout.offsets, strict=True)
        }
        size = self.layout.shard_size
        self.shard = slice(mesh.data.rank * size, (mesh.data.rank + 1) * size)
        self.weights = torch.zeros(mesh.data.size * size, dtype=weight_dtype, device=device)
        separate = weight_dtype != torch.float32
        self.master = torch.zeros(size, device=device) if separate else self.weights[self.shard]
        self.momentum = torch.zeros(size, device=device)
        self.gather = Pending()  # of the weights
        self._wire_dtype = wire_dtype if mesh.data.size > 1 else torch.float32  # one rank sends nothing
        self._gradients: torch.Tensor | None = None
        self._reduce: Pending | None = None
        self._wire: tuple[torch.Tensor, torch.Tensor] | None = None  # (received, sent) during a reduce in wire_dtype

    @property
    def gradients(self) -> torch.Tensor:
        """float32 [data ranks x shard], accumulated over micro-batches. Allocated at the first use."""
        if self._gradients is None:
            self._gradients = torch.zeros(self.weights.numel(), device=self.weights.device)
        return self._gradients

    @property
    def reduced(self) -> torch.Tensor:
        """float32 [shard], this data rank's part of `gradients`. It is the mean of the ranks after finish_reduce()."""
        return self.gradients[self.shard]

    def local_matrix(self, flat: torch.Tensor, index: int) -> torch.Tensor:
        """Returns a local matrix as a view [m, n] of `flat`, which is `weights` or `gradients`."""
        offset, (rows, columns) = self._local[index]
        return flat[offset : offset + rows * columns].view(rows, columns)

    def start_reduce(self) -> None:
        """Starts to compute the mean of the gradients over the data ranks."""
        gradients, name = self.gradients, f"Muon bucket {self.number}, gradients"
        if self._wire_dtype == torch.float32:
            self._reduce = reduce_scatter(self.reduced, gradients, self.data, name=name, asynchronous=True)
        else:
            self._wire = torch.empty_like(gradients, dtype=self._wire_dtype), gradients.to(self._wire_dtype)
            self._reduce = all_to_all(*self._wire, self.data, name=name, asynchronous=True)

    def finish_reduce(self) -> None:
        """Waits for the reduce, if one is in progress. Afterwards `reduced` holds the mean."""
        if self._reduce is None:
            return
        self._reduce.wait()
        reduced = self.reduced
        if self._wire is not None:
            first, *others = self._wire[0].view(self.data.size, -1)
            reduced.copy_(first)
            for other in others:  # float32 sums in rank order: the result does not depend on the route
                reduced.add_(other)
        reduced.div_(self.data.size)
        self._wire = self._reduce = None

    def start_gather(self) -> None:
        """Starts to copy the masters to the weights of every rank. Wait with `gather.wait()`."""
        shard, name = self.weights[self.shard], f"Muon bucket {self.number}, weights"
        if shard.dtype != torch.float32:
            shard.copy_(self.master)
        self.gather = all_gather(self.weights, shard, self.data, name=name, asynchronous=True)
