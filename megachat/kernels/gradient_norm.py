"""The sum of squares under the joint gradient norm: the torch reference. multi_tensor.py has a faster version."""

from collections.abc import Sequence
from typing import Protocol

import torch

_CPU_PART = 1 << 16  # elements: float64 squares of more would be new pages of memory in every step


class SumOfSquares(Protocol):
    """Computes what `torch_sum_of_squares` computes."""

    def __call__(self, tensors: Sequence[torch.Tensor], before: torch.Tensor | None = None) -> torch.Tensor: ...


def torch_sum_of_squares(tensors: Sequence[torch.Tensor], before: torch.Tensor | None = None) -> torch.Tensor:
    """Returns `before` plus the sum of the squares of all elements, 0-dim float32. Infinity and NaN propagate.

    With `before` (0-dim float32), the tensors are added to it in their order. Without it there must be at least one
    tensor; sums are float64, so that the result does not depend on the order.
    """
    if before is None:
        parts = (part for one in tensors for part in ([one] if one.is_cuda else one.reshape(-1).split(_CPU_PART)))
        return torch.stack([part.float().square().sum(dtype=torch.float64) for part in parts]).sum().float()
    for tensor in tensors:
        before = before + tensor.float().square().sum()
    return before
