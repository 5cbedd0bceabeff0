"""Causal attention with a sliding window: the plain-torch reference and a faster version for a CPU.

Each version takes q, k, v and the window, and computes what `attention` computes. Those for a GPU are in
gpu_attention.py and te.py.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int], torch.Tensor]
# Queries per tile of windowed_attention. Each tile is multiplied with window + TILE keys: a smaller one wastes less and
# starts more kernels.
TILE = 128
MOST_COPIED = 1 << 17  # keys that windowed_attention copies for a row; beyond, copies take too much memory
# Rows longer than MASKED_ROW have a mask per BLOCK of queries: one for the whole row grows with its length squared
MASKED_ROW, BLOCK = 4096, 1024


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
    """Computes softmax attention where query i sees keys i - window .. i.

    q [batch, tokens, heads, head_size]; k, v [batch, tokens, kv_heads, head_size]; all of one dtype. Returns q's shape
    and dtype. Each key/value head is shared by heads / kv_heads query heads (GQA, arXiv 2305.13245).
    """
    tokens = q.size(1)
    if window >= tokens - 1:
        return _sdpa(q, k, v, is_causal=True)
    position = torch.arange(tokens, device=q.device)
    block, outputs = BLOCK if tokens > MASKED_ROW else tokens, []
    for begin in range(0, tokens, block):
        end, first = min(begin + block, tokens), max(0, begin - window)  # first: the first key that the block sees
        behind = position[begin:end, None] - position[None, first:end]
        visible = (behind >= 0) & (behind <= window)
        outputs.append(masked_attention(q[:, begin:end], k[:, first:end], v[:, first:end], visible))
    return torch.cat(outputs, dim=1) if len(outputs) > 1 else outputs[0]


def masked_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: torch.Tensor | None) -> torch.Tensor:
    """Computes softmax attention where query i of row b sees key j if visible[b, 0, i, j]; with None, all see all.

    q [batch, tokens, heads, head_size]; k, v [batch, keys, kv_heads, head_size]; visible: boolean, broadcastable to
    [batch, 1, tokens, keys]. Every query must see at least one key. Returns q's shape and dtype.
    """
    return _sdpa(q, k, v, attn_mask=visible)


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **mask) -> torch.Tensor:
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.size(1) != k.size(1), **mask).transpose(1, 2)


def windowed_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
    """Computes `attention` on a CPU without a mask over the whole row, in the tiles that the window touches.

    The first `window` queries see all tokens before them, which is plain causal attention. The others are cut into
    tiles. The keys of a tile are a copy that overlaps the next tile's by the window, so one mask serves all tiles (as
    in Longformer, arXiv 2004.05150).
    """
    tokens = q.size(1)
    tiles = -(-(tokens - window) // TILE)
    if window + TILE >= tokens or tiles * (window + TILE) > MOST_COPIED:
        return attention(q, k, v, window)
    missing = window + tiles * TILE - tokens  # the padding of the last tile is seen by padding queries only
    queries = F.pad(q[:, window:], (0, 0, 0, 0, 0, missing)).unflatten(1, (tiles, TILE)).flatten(0, 1)
    keys, values = (
        F.pad(tensor, (0, 0, 0, 0, 0, missing)).unfold(1, window + TILE, TILE).permute(0, 1, 4, 2, 3).flatten(0, 1)
        for tensor in (k, v)
    )
    behind = window + torch.arange(TILE, device=q.device)[:, None] - torch.arange(window + TILE, device=q.device)
    tiled = masked_attention(queries, keys, values, (behind >= 0) & (behind <= window))
    rest = tiled.unflatten(0, (-1, tiles)).flatten(1, 2)[:, : tokens - window]
    first = attention(q[:, :window], k[:, :window], v[:, :window], window)
    return torch.cat((first, rest), dim=1)
