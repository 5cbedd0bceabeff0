"""Attention with a sliding window for CPUs: only the tiles that a window touches are computed, and no mask spans the row."""

import torch
import torch.nn.functional as F

from megachat.kernels.attention import attention, masked_attention

TILE = 128  # queries a tile: each is multiplied with window + TILE keys, so a smaller one wastes less and starts more kernels


def windowed_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
    """Softmax attention where query i sees keys i - window .. i; shapes, dtypes and result as `megachat.kernels.attention.attention`.

    The first `window` queries see all before them: plain causal attention. The others are cut into tiles, whose keys are copies that
    overlap by the window, so that one mask serves all tiles (block-local attention as in Longformer, arXiv 2004.05150).
    """
    tokens = q.size(1)
    if window + TILE >= tokens:
        return attention(q, k, v, window)
    tiles = -(-(tokens - window) // TILE)
    missing = window + tiles * TILE - tokens  # what pads the last tile is seen by padding alone
    queries = F.pad(q[:, window:], (0, 0, 0, 0, 0, missing)).unflatten(1, (tiles, TILE)).flatten(0, 1)
    keys, values = (
        F.pad(part, (0, 0, 0, 0, 0, missing)).unfold(1, window + TILE, TILE).permute(0, 1, 4, 2, 3).flatten(0, 1)
        for part in (k, v)
    )
    behind = window + torch.arange(TILE, device=q.device)[:, None] - torch.arange(window + TILE, device=q.device)
    tiled = masked_attention(queries, keys, values, (behind >= 0) & (behind <= window))
    rest = tiled.unflatten(0, (-1, tiles)).flatten(1, 2)[:, : tokens - window]
    first = attention(q[:, :window], k[:, :window], v[:, :window], window)
    return torch.cat((first, rest), dim=1)
