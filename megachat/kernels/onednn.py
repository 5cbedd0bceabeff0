"""Products of linears and head by oneDNN, for float32 on AMD's CPUs with AVX512.

torch multiplies float32 with MKL, which does not use AVX512 there: oneDNN takes 4 to 18 % less time for y = x weight^T
and for x's gradient. For the weight's gradient it is no faster, because it needs a transposed copy.
"""

import torch
from torch import nn

from megachat.kernels.cross_entropy import PlainProducts
from megachat.kernels.linear import Linear

_LEAST_SIDE = 128  # of a weight; smaller ones were not measured

# An operator of its own: torch.compile would copy a transposed weight in front of oneDNN's operator.
_library = torch.library.Library("megachat", "DEF")
_library.define("onednn_product(Tensor x, Tensor weight) -> Tensor")
_library.impl(
    "onednn_product", lambda x, weight: torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], ""), "CPU"
)
torch.library.register_fake(
    "megachat::onednn_product", lambda x, weight: x.new_empty(*x.shape[:-1], weight.shape[0]), lib=_library
)


def onednn_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Returns x weight^T for float32 x [..., in] and weight [out, in] on a CPU, without a gradient."""
    return torch.ops.megachat.onednn_product(x, weight)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return onednn_product(x, weight)

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        x_gradient = onednn_product(gradient, weight.t()) if ctx.needs_input_grad[0] else None
        weight_gradient = gradient.flatten(0, -2).t() @ x.flatten(0, -2) if ctx.needs_input_grad[1] else None
        return x_gradient, weight_gradient


class OneDnnProducts(PlainProducts):
    """Multiplies as PlainProducts does, the logits and the gradient of the hidden rows with oneDNN."""

    def logits(self, chunk: slice) -> torch.Tensor:
        """Returns the chunk's logits [rows of the chunk, columns]."""
        return onednn_product(self.hidden[chunk], self.table)

    def write_hidden_gradient(self, gradient: torch.Tensor, hidden_gradient: torch.Tensor) -> None:
        """Given the gradient of the chunk's logits, writes its hidden rows' gradient."""
        hidden_gradient.copy_(onednn_product(gradient, self.table.t()))


def apply_onednn(layers: list[nn.Module]) -> None:
    """Makes the linears of the layers train with oneDNN's products, unless a side is small.

    lm_head is multiplied in the loss: see OneDnnProducts.
    """
    for module in (module for layer in layers for module in layer.modules()):
        if isinstance(module, Linear) and min(module.weight.shape) >= _LEAST_SIDE:
            module.product = _Linear.apply
