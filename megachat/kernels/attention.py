"""Causal attention with a sliding window; the plain-torch form that every faster backend is compared with."""

import torch
import torch.nn.functional as F


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
    """Softmax attention where query i sees keys i - window .. i.

    q [batch, tokens, heads, head_size]; k, v [batch, tokens, kv_heads, head_size]; all of one dtype. Returns q's shape and dtype.
    Key/value heads are shared by heads / kv_heads query heads each (GQA, arXiv 2305.13245).
    """
    tokens = q.size(1)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    shared = q.size(1) != k.size(1)
    if window >= tokens - 1:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=shared)
    else:
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=window_mask(tokens, window, q.device), enable_gqa=shared)
    return y.transpose(1, 2)


def masked_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: torch.Tensor | None) -> torch.Tensor:
    """Softmax attention where query i of row b sees the keys j with visible[b, 0, i, j]; with None every query sees every key.

    q [batch, tokens, heads, head_size]; k, v [batch, keys, kv_heads, head_size]; visible boolean [batch or 1, 1, tokens, keys]. A query must see
    a key. Returns q's shape and dtype.
    """
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=q.size(1) != k.size(1)).transpose(1, 2)


def window_mask(tokens: int, window: int, device: torch.device) -> torch.Tensor:
    """Boolean [tokens, tokens], true where query (row) sees key (column)."""
    position = torch.arange(tokens, device=device)
    behind = position[:, None] - position[None, :]
    return (behind >= 0) & (behind <= window)
