"""torch.compile for training: all blocks of a kind share a graph; graphs that are compiled late are counted."""

from collections.abc import Callable

import torch
from torch import nn

from megachat.kernels.cross_entropy import PlainProducts
from megachat.model.gpt import Block

# At most: a layer is cut at kernels that a graph cannot hold, and evaluation has graphs of its own.
_GRAPHS_PER_LAYER = 8


def torch_mode(compile_mode: str) -> str | None:
    """Returns torch.compile's mode for precision.compile_mode.

    Never one with CUDA graphs: they overwrite outputs that pipeline stages and evaluations keep (the residual stream
    of the first layer is read by all blocks).
    """
    return "max-autotune-no-cudagraphs" if compile_mode == "max-autotune" else None


def apply_compile(layers: nn.ModuleList, mode: str | None = None) -> None:
    """Compiles the layers in place, each block within the part that it recomputes in the backward pass.

    Blocks of one kind (window, value embedding, position) share their code. torch silently stops compiling a function
    that has more kinds than its limit, so the limit is raised to what the model needs.
    """
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, _GRAPHS_PER_LAYER * len(layers))
    limits.accumulated_recompile_limit = max(limits.accumulated_recompile_limit, 8 * limits.recompile_limit)
    for layer in layers:
        if not isinstance(layer, Block):
            layer.compile(dynamic=False, mode=mode)
            continue
        for name in ("mix_and_attend", "add_mlp") if layer.recompute == "selective" else ("whole",):
            setattr(layer, name, torch.compile(getattr(layer, name), dynamic=False, mode=mode))


def compiled_products(products: type[PlainProducts]) -> type[PlainProducts]:
    """Returns the products with compiled elementwise functions, which pass over the logits fewer times."""

    def fused_squash(logits, cap):  # in place, or with a scatter, compiled code is slower than eager code
        gate = torch.sigmoid(logits.float() * (-2 / cap))
        share = torch.exp(cap - 2 * cap * gate)
        return gate, share, share.sum(dim=1, keepdim=True)

    def fused_gradient(gate, share, factor, index, at_index):
        at_target = torch.arange(share.size(1), device=share.device) == index
        return (share * factor + torch.where(at_target, at_index, 0.0)) * (4 * (gate - gate * gate))

    functions: dict[str, Callable] = {"squash": fused_squash, "logits_gradient": fused_gradient}
    compiled = {name: staticmethod(torch.compile(function, dynamic=False)) for name, function in functions.items()}
    return type(f"Compiled{products.__name__}", (products,), compiled)


class NewGraphs:
    """Counts the graphs that torch.compile makes in this process. compiles: whether the run compiles at all."""

    def __init__(self, *, compiles: bool):
        self._compiles, self._before = compiles, 0

    def count(self) -> int:
        """Returns how many graphs were made since the last call."""
        if not self._compiles:
            return 0
        made = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        since, self._before = made - self._before, made
        return since
