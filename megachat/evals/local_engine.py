"""What evaluations need of an engine, and an engine of one process without DeepSpeed and process groups."""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn

from megachat.model.gpt import run_layers


class EvaluationEngine(Protocol):
    """What evaluations need of an engine: megachat.parallel.engine.Engine on ranks, or LocalEngine."""

    module: Any  # with all layers of this process

    def evaluate(
        self,
        micro_batches: list,
        measure: nn.Module | None = None,
        before_forward: Callable[[int], object] = lambda number: None,
    ) -> list[torch.Tensor]:
        """Returns `measure(output, targets)` of each (ids, targets), by default of the loss in evaluation mode."""
        ...


class LocalEngine:
    """Runs the layers of a whole model in this process. loss: a megachat.model.gpt.Loss."""

    def __init__(self, layers: nn.ModuleList, loss: nn.Module):
        self.module: Any = layers
        self.device = next(layers.parameters()).device
        self.loss = loss.to(self.device).eval()

    @torch.no_grad()
    def evaluate(
        self,
        micro_batches: list,
        measure: nn.Module | None = None,
        before_forward: Callable[[int], object] = lambda number: None,
    ) -> list[torch.Tensor]:
        """Returns `measure(output, targets)` of each (ids, targets), see EvaluationEngine."""
        results = []
        for number, (ids, targets) in enumerate(micro_batches):
            before_forward(number)
            output = run_layers(self.module, ids.to(self.device))
            results.append((measure or self.loss)(output, targets.to(self.device)))
        return results
