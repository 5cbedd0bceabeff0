"""One bucket's memory on one rank, and its two collectives over the data axis: gradients to shards, weights from shards."""

import torch

from megachat.optim.partition_plan import PartitionPlan
from megachat.parallel.collectives import Pending, all_gather, all_to_all, reduce_scatter
from megachat.parallel.mesh import Axis


class BucketMemory:
    """See buckets.Bucket for how the local shards of matrices lie in it. data: the data axis. wire: dtype of gradients between ranks."""

    def __init__(
        self,
        plan: PartitionPlan,
        number: int,
        data: Axis,
        weight_dtype: torch.dtype,
        wire: torch.dtype,
        device: torch.device,
    ):
        self.layout, self.data, self._name = plan.buckets[number], data, f"Muon bucket {number}"
        self._shapes = [plan.matrices[index].local_shape(plan.tensor) for index in self.layout.matrices]
        self._own = slice(data.rank * self.layout.shard, (data.rank + 1) * self.layout.shard)
        self.weights = torch.zeros(data.size * self.layout.shard, dtype=weight_dtype, device=device)
        # float32 weights are their own masters
        self.master = (
            self.weights[self._own] if weight_dtype == torch.float32 else torch.zeros(self.layout.shard, device=device)
        )
        self.momentum = torch.zeros(self.layout.shard, device=device)
        self.gathering = Pending()
        self._wire_dtype = torch.float32 if data.size == 1 else wire  # one rank: no wire, so no rounding for it
        self._wire: tuple[torch.Tensor, torch.Tensor] | None = (
            None  # (received, sent) while a reduction in another dtype is under way
        )
        self._reducing: Pending | None = None
        self._gradients: torch.Tensor | None = None

    @property
    def gradients(self) -> torch.Tensor:
        """float32 [ranks * shard], accumulated over micro-batches. Made at first use."""
        if self._gradients is None:
            self._gradients = torch.zeros(self.weights.numel(), device=self.weights.device)
        return self._gradients

    @property
    def reduced(self) -> torch.Tensor:
        """float32 [shard], this rank's part of `gradients`, where the mean over ranks lands."""
        return self.gradients[self._own]

    def part(self, flat: torch.Tensor, place: int) -> torch.Tensor:
        """The matrix at `place` of the bucket, its local shard, a view [m, n] of a whole flat buffer."""
        offset, (rows, columns) = self.layout.offsets[place], self._shapes[place]
        return flat[offset : offset + rows * columns].view(rows, columns)

    def launch_reduction(self) -> None:
        """Begin the mean of the gradients over the ranks."""
        whole, name = self.gradients, f"{self._name}, gradients"
        if self._wire_dtype == torch.float32:
            self._reducing = reduce_scatter(self.reduced, whole, self.data, name=name, asynchronous=True)
        else:
            self._wire = torch.empty_like(whole, dtype=self._wire_dtype), whole.to(self._wire_dtype)
            self._reducing = all_to_all(*self._wire, self.data, name=name, asynchronous=True)

    def finish_reduction(self) -> None:
        """Wait for it, if one is under way; then `reduced` holds the mean."""
        if self._reducing is None:
            return
        self._reducing.wait()
        mine = self.reduced
        if self._wire is not None:
            first, *others = self._wire[0].view(self.data.size, -1)
            mine.copy_(first)
            for other in others:  # in the order of ranks and in float32: the sum does not depend on how it was routed
                mine.add_(other)
        mine.div_(self.data.size)
        self._wire = self._reducing = None

    def launch_gather(self) -> None:
        """Begin to make the weights on every rank from the masters; `gathering` waits for it."""
        mine = self.weights[self._own]
        if mine.dtype != torch.float32:
            mine.copy_(self.master)
        self.gathering = all_gather(self.weights, mine, self.data, name=f"{self._name}, weights", asynchronous=True)
