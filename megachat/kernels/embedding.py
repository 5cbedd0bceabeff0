"""The lookup table: rows by token id."""

import torch
import torch.nn.functional as F
from torch import nn


class Table(nn.Module):
    """ids [...] int64 -> [..., width] of the table's dtype; weight [rows, width]."""

    def __init__(self, rows: int, width: int, dtype: torch.dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, width, dtype=dtype))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return F.embedding(ids, self.weight)
