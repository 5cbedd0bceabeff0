"""Logits with a soft cap, and their cross entropy; the plain form that a fused one is compared with."""

import torch
import torch.nn.functional as F


def capped_logits(hidden: torch.Tensor, weight: torch.Tensor, vocab_size: int, cap: float) -> torch.Tensor:
    """cap * tanh(hidden weight^T / cap) in float32, without the padding rows of the table.

    hidden [..., width] in the compute dtype, weight [padded vocabulary, width]. Returns [..., vocab_size] float32.
    """
    logits = F.linear(hidden, weight.to(hidden.dtype))[..., :vocab_size].float()
    return cap * torch.tanh(logits / cap)


def capped_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, vocab_size: int, cap: float, reduction: str = "mean"
) -> torch.Tensor:
    """Cross entropy in nats of `capped_logits` with targets [...] int64, where -1 is not counted; reduction "mean" or "none" (flat)."""
    logits = capped_logits(hidden, weight, vocab_size, cap)
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=-1, reduction=reduction)
