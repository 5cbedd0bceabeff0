"""Replays a part of the step as a CUDA graph."""

from collections.abc import Callable
from typing import Any

import torch

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
