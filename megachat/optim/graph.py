"""Replays a part of the step as a CUDA graph."""

from collections.abc import Callable
from typing import Any

import torch

from megachat.optim.partition import MuonPartition
from megachat.parallel.engine import ZeroAdamW

EAGER_CALLS = 2  # before the capture: they compile kernels and make the libraries' workspaces


class StepGraph:
    """Runs a function that takes no arguments: the first calls as it is, the others as the replay of a CUDA graph.

    The function must do the same operations on the same memory in every call. So whatever changes between steps is in
    tensors that exist before the first call, the host waits for nothing, and no collective is called. Its temporary
    memory is kept for the replays. cuda: torch.cuda; tests replace it.
    """

    def __init__(self, cuda: Any = torch.cuda):
        self._cuda, self._calls = cuda, 0
        self._graph: Any = None

    def run(self, function: Callable[[], object]) -> None:
        """Does the work of one call of the function."""
        self._calls += 1
        if self._calls <= EAGER_CALLS:
            function()
            return
        if self._graph is None:
            self._graph = self._cuda.CUDAGraph()
            # thread_local: other threads, such as the one that saves, may use the GPU during the capture
            with self._cuda.graph(self._graph, capture_error_mode="thread_local"):
                function()
        self._graph.replay()


class UpdateGraph:
    """The update of Muon and AdamW, and what follows it, as one CUDA graph. For one data x tensor rank per pipeline
    stage, because collectives are not captured.

    DeepSpeed's ZeRO step makes a new gradient of each group and reads the clipping factor and the rates on the host.
    Here each step copies AdamW's gradients to memory that stays, and factor and rates are 0-d float32 tensors. A rate
    is rounded to float32; the rest is what ZeRO computes.
    """

    def __init__(self, adamw: ZeroAdamW, muon: MuonPartition, graph: StepGraph | None = None):
        if muon.mesh.stage.size > 1:
            raise ValueError(f"the exchange between {muon.mesh.stage.size} ranks of a stage cannot be captured")
        self._adamw, self._muon, self._graph = adamw, muon, graph or StepGraph()
        self._gradient_scale = torch.ones((), device=muon.mesh.device)
        adamw.prepare_capture()

    def step(self, gradient_scale: float | torch.Tensor, after_update: Callable[[], object] | None = None) -> None:
        """Does what MuonPartition.step and ZeroAdamW.apply do, with a gradient that is finite, then calls
        `after_update`, which must be the same in every step."""
        self._muon.begin_update()
        self._adamw.keep_gradients()
        self._gradient_scale.fill_(gradient_scale)
        self._graph.run(lambda: self._update(after_update))
        self._muon.end_update()
        self._adamw.update_loss_scale(skipped=False)

    def _update(self, after_update: Callable[[], object] | None) -> None:
        """Does the work on the device; nothing but tensors changes."""
        self._muon.update(self._gradient_scale)
        self._adamw.update_captured(self._gradient_scale)
        if after_update:
            after_update()
