"""What one rank holds of AdamW under DeepSpeed's ZeRO-1: read and written by checkpoints, checks and CUDA graphs."""

from collections.abc import Iterator

import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import nn

from megachat.parallel.deepspeed_version import PRIVATE_NAMES
from megachat.parallel.mesh import Mesh
from megachat.parallel.rectangles import MASTER, MOMENTS, TensorShard, flat_rectangles
from megachat.place import is_counted_copy, place_of

_LOSS_SCALER_STATE = PRIVATE_NAMES[DynamicLossScaler]


class ZeroState(DeepSpeedZeroOptimizer):
    """The masters, moments and gradients of this rank's share. engine.ZeroAdamW takes the step."""

    mesh: Mesh

    def share_slices(self, index: int) -> Iterator[tuple[nn.Parameter, int, slice]]:
        """Yields (parameter, its first element on this rank, its slice of the rank's share) of group `index`."""
        rank, size = self.mesh.data.rank, self.single_partition_of_fp32_groups[index].numel()
        begin, end = rank * size, (rank + 1) * size
        for parameter, offset in zip(self.bit16_groups[index], self.round_robin_bit16_offsets[index], strict=True):
            low, high = max(begin, offset), min(end, offset + parameter.numel())
            if low < high:
                yield parameter, low - offset, slice(low - begin, high - begin)

    def fragments(self) -> Iterator[tuple[nn.Parameter, int, int, dict[str, torch.Tensor]]]:
        """Yields (parameter, start, length, {MASTER or one of MOMENTS: flat float32 view}) of this rank's share.

        start and length count the parameter's elements, row-major. The views are live: a checkpoint is read into them.
        Parameters without elements on this rank are left out.
        """
        for index, flat in enumerate(self.single_partition_of_fp32_groups):
            state = self.optimizer.state[flat]
            if MOMENTS[0] not in state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device)
                state |= {kind: torch.zeros_like(flat) for kind in MOMENTS}
            for parameter, start, here in self.share_slices(index):
                moments = {kind: state[kind][here] for kind in MOMENTS}
                yield parameter, start, here.stop - here.start, {MASTER: flat.detach()[here]} | moments

    def state_shards(self) -> list[TensorShard]:
        """Returns the state in fragments(). Parts of one named tensor have a shard each."""
        return [
            parameter_shard(kind, parameter, start, view)
            for parameter, start, _, views in self.fragments()
            for kind, view in views.items()
        ]

    def names_of_copies(self) -> set[str]:
        """Returns the parameters of which this rank has a copy, and tensor rank 0 the one that counts."""
        return {place_of(p).name for p, *_ in self.fragments() if not is_counted_copy(p, self.mesh.tensor.rank)}

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
        if self.loss_scaler.dynamic and "cur_iter" in state:
            for key in _LOSS_SCALER_STATE:
                setattr(self.loss_scaler, key, state[key])

    # ---- gradients

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

    def set_gradient_shares(self, shares: list[torch.Tensor]) -> None:
        """Replaces the reduced gradients with shares from gradient_shares()."""
        for index, share in enumerate(shares):
            sizes = [gradient.numel() for gradient in self.averaged_gradients[index]]
            for gradient, part in zip(self.averaged_gradients[index], share.split(sizes), strict=True):
                gradient.copy_(part.view_as(gradient))

    # ---- the update as part of a CUDA graph (optim/graph.py)

    def prepare_capture(self) -> None:
        """Gives gradients and rates memory that stays, so that update_captured() can be captured and replayed."""
        self.step_counters()  # creates AdamW's state
        self.optimizer._warned_capturable_if_run_uncaptured = True  # the first calls are not captured, on purpose
        for flat in self.single_partition_of_fp32_groups:
            flat.grad = torch.zeros_like(flat)
        for group in self.param_groups:
            group["lr"], group["capturable"] = torch.zeros((), device=self.mesh.device), True

    def keep_gradients(self) -> None:
        """Moves the reduced gradients to the memory that stays."""
        for index, flat in enumerate(self.single_partition_of_fp32_groups):
            gradients = [gradient.flatten() for gradient in self.averaged_gradients[index]]
            torch._foreach_copy_(list(flat.grad.split([gradient.numel() for gradient in gradients])), gradients)
            self.averaged_gradients[index] = None
        self.zero_grad()

    def update_captured(self, gradient_scale: torch.Tensor) -> None:
        """Updates masters and weights with the kept gradients times the scale (0-d); nothing but tensors changes."""
        for flat in self.single_partition_of_fp32_groups:
            flat.grad.mul_(gradient_scale)
        self.optimizer.step()
        self.refresh_weights()


def parameter_shard(kind: str, parameter: nn.Parameter, start: int, flat: torch.Tensor) -> TensorShard:
    """Returns elements [start, start + len(flat)) of a parameter as a shard of its named tensor."""
    place = place_of(parameter)
    rectangles = flat_rectangles(tuple(parameter.shape), flat, start, place.offset or None)
    return TensorShard(kind, place.name, place.whole, rectangles)
