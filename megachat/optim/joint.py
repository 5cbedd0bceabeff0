"""The optimizer step: from reduced gradients to updated weights, for AdamW (under ZeRO-1), Muon and sparse tables.

All optimizers use the same gradient norm, clipping factor, loss scale and decision to skip, on every layout.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from megachat.kernels.gradient_norm import SumOfSquares
from megachat.optim.graph import UpdateGraph
from megachat.optim.partition import MuonPartition
from megachat.optim.row_tables import RowTables
from megachat.parallel.collectives import all_reduce
from megachat.parallel.engine import ZeroAdamW
from megachat.parallel.mesh import Mesh
from megachat.parallel.progress import profile_range


class Requests(NamedTuple):
    """What ranks request during a step. Each rank passes its requests to the step and gets back those of any rank."""

    stop: bool = False  # save and end the job after this step
    save_failed: bool = False  # end the job with the error of the save in progress


NO_REQUESTS = Requests()


@dataclass(frozen=True)
class StepOutcome:
    """The result of a step, equal on all ranks.

    norm: of the whole gradient, without loss scale, before clipping; inf if it was not finite. skipped: whether the
    gradient was not finite, so that nothing was changed. requests: those that any rank made. loss_scale: the factor
    that was in the gradients; 1 unless the run computes in float16.
    """

    norm: float
    skipped: bool
    requests: Requests
    loss_scale: float


@dataclass(frozen=True)
class Optimizers:
    """What the steps of a run update on this rank, and how.

    sum_of_squares: the kernel of the gradient norm. clip_norm: a larger norm of the whole gradient is scaled down to
    it; 0 turns clipping off. graph: replays the update of Muon and AdamW, and after_update. after_update: called after
    the updates, when AdamW's weights are gathered.
    """

    adamw: ZeroAdamW
    muon: MuonPartition
    rows: RowTables
    mesh: Mesh
    sum_of_squares: SumOfSquares
    clip_norm: float
    graph: UpdateGraph | None = None
    after_update: Callable[[], object] | None = None

    def update(self, gradient_scale: float | torch.Tensor, scaled_norm: torch.Tensor) -> None:
        """Updates the weights with the gradients times gradient_scale. scaled_norm: see ZeroAdamW.apply."""
        self.rows.step(gradient_scale)
        if self.graph:
            self.graph.step(gradient_scale, self.after_update)
            return
        self.muon.step(gradient_scale)
        self.adamw.apply(scaled_norm)
        if self.after_update:
            self.after_update()


@torch.no_grad()
def optimizer_step(
    optimizers: Optimizers,
    *,
    requests: Requests = NO_REQUESTS,
    before_update: Callable[[], object] | None = None,
    inspect_gradients: Callable[[], object] | None = None,
    inspect_discarded: Callable[[], object] | None = None,
) -> StepOutcome:
    """Updates the weights with the reduced gradients, or skips the step on all ranks; all ranks call it.

    requests: of this rank; the all-reduce of the norm carries them. inspect_gradients: called when all gradients are
    reduced, and not yet clipped or discarded. before_update: called before the first weight or state changes, on all
    ranks or, in a skipped step, on none. inspect_discarded: called in a skipped step only, before the gradients are
    discarded.
    """
    adamw, muon, rows, mesh = optimizers.adamw, optimizers.muon, optimizers.rows, optimizers.mesh
    loss_scale = adamw.loss_scale
    # 1. Gradients: ZeRO has averaged AdamW's shares; Muon's last buckets may still be in flight.
    muon.wait_for_reduce()
    rows.wait_for_reduce()
    if inspect_gradients:
        inspect_gradients()

    # 2. One all-reduce over all ranks carries the squared norm of the whole gradient and the requests.
    with profile_range("norm"):
        squares = optimizers.sum_of_squares(adamw.local_gradients() + rows.gradients(), muon.sum_of_squares())
        joint = torch.cat((squares.view(1), torch.tensor(requests, dtype=torch.float32, device=mesh.device)))
        all_reduce(joint, mesh.world, name="gradient norm")
        # The host waits here for the device, once per step. What follows is computed on the host: reading the device
        # again would wait for Muon's update, which is launched by then.
        squared, *requested = joint.tolist()
        scaled_norm = torch.tensor(squared).sqrt()  # the loss scale is still in it
        finite = math.isfinite(squared)

    # 3. If the norm is finite, update. One factor undoes the loss scale and clips; ZeRO computes the same for AdamW.
    #    Muon only launches the gathers of its weights: each block waits for them in the next forward pass.
    norm = scaled_norm / loss_scale
    if finite:
        if before_update:
            before_update()
        gradient_scale = 1.0 / loss_scale
        if optimizers.clip_norm > 0:
            gradient_scale = gradient_scale / ((norm + 1e-6) / optimizers.clip_norm).clamp_min(1.0)
        optimizers.update(gradient_scale, scaled_norm)
    else:  # 4. Otherwise no rank changes a weight or a state; float16's loss scale decreases.
        if inspect_discarded:
            inspect_discarded()
        muon.discard_gradients()
        rows.discard_gradients()
        adamw.apply(None)
    requests = Requests(*(ranks > 0 for ranks in requested))
    return StepOutcome(norm.item() if finite else math.inf, not finite, requests, loss_scale)
