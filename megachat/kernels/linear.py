"""The linear layer: no bias, and the weight follows the activations' dtype at each use, so that masters can stay float32."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn


class Linear(nn.Module):
    """y = x weight^T with weight [out_features, in_features]; x in any float dtype, which is also the matmul's.

    product: another way to compute that, for training only (see megachat.kernels.fp8); evaluation and sampling always take the plain one.
    """

    product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.product is not None and self.training:
            return self.product(x, self.weight)
        return F.linear(x, self.weight.to(x.dtype))
