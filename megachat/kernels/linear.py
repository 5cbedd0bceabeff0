"""The linear layer and the lookup table. Their weights are cast to the activations' dtype at each use, so masters can
stay float32.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

Product = Callable[[torch.Tensor, nn.Parameter], torch.Tensor]


class Linear(nn.Module):
    """Computes y = x weight^T without a bias. weight [out_features, in_features]; x in any float dtype, which is also
    the matmul's.

    product: another implementation, used in training only (see megachat.kernels.fp8). Evaluation and sampling use the
    plain one.
    """

    product: Product | None = None

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.product is not None and self.training:
            return self.product(x, self.weight)
        return F.linear(x, self.weight.to(x.dtype))


class Table(nn.Module):
    """Looks up rows by token id: ids [...] int64 -> [..., width] in the table's dtype. weight [rows, width]."""

    def __init__(self, rows: int, width: int, dtype: torch.dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, width, dtype=dtype))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return F.embedding(ids, self.weight)
