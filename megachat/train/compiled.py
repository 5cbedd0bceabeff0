"""torch.compile for training: one graph for all blocks of a kind, and a count of what is compiled when nothing should be any more."""

import torch
from torch import nn

from megachat.model.gpt import Block

_GRAPHS_A_LAYER = 8  # at most: its function is cut at kernels that no graph holds, and evaluation has graphs of its own


def apply_compile(layers: nn.ModuleList) -> None:
    """torch.compile the layers in place, each block within what it computes again in the backward pass.

    Blocks of one kind (window, value embedding, place) share their code. torch gives up on a function of more kinds than a limit, without a word
    in the log: the limit is raised to what the model needs.
    """
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, _GRAPHS_A_LAYER * len(layers))
    limits.accumulated_recompile_limit = max(limits.accumulated_recompile_limit, 8 * limits.recompile_limit)
    for layer in layers:
        if not isinstance(layer, Block):
            layer.compile(dynamic=False)
        elif layer.recompute == "selective":
            layer.mixed_and_attended = torch.compile(layer.mixed_and_attended, dynamic=False)
            layer.through_mlp = torch.compile(layer.through_mlp, dynamic=False)
        else:
            layer.whole = torch.compile(layer.whole, dynamic=False)


class NewGraphs:
    """Counts what torch.compile makes in this process. compiles: whether the run does at all; if not, nothing is loaded for it."""

    def __init__(self, *, compiles: bool):
        self._compiles, self._before = compiles, 0

    def count(self) -> int:
        """How many graphs were made since the last call."""
        if not self._compiles:
            return 0
        made = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        since, self._before = made - self._before, made
        return since
