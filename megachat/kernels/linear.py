"""The linear layer: no bias, and the weight follows the activations' dtype at each use, so that masters can stay float32."""

import torch
import torch.nn.functional as F
from torch import nn


class Linear(nn.Module):
    """y = x weight^T with weight [out_features, in_features]; x in any float dtype, which is also the matmul's."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight.to(x.dtype))
