"""QK clip: bounds the attention logits of every head after an optimizer step, by its learned scales.

MuonClip (Kimi K2, arXiv 2507.20534) rescales the rows of W_q and W_k of a head whose largest logit in the batch exceeds
a limit. Here queries and keys are normed, which undoes any such factor, and it is their learned scales that set the
size of logits. So these are rescaled, and not by a measured maximum but by the largest logit that any tokens can have:

    qk_scale^2 * sqrt(head_size) * max over channels of |scale of the query * scale of the key|

It follows from the weights alone, so that nothing is reduced over ranks, and the result is the same on every layout.
"""

import torch
from torch import nn

from megachat.model.gpt import Attention
from megachat.parallel.engine import ZeroAdamW
from megachat.planning.dimensions import Dimensions


def clip_factors(
    query: torch.Tensor, key: torch.Tensor, unscaled: float, limit: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the factors on the scales of queries and keys, [..., heads, 1] and [..., kv_heads, 1].

    query [..., heads, head_size], key [..., kv_heads, head_size]: the scales. unscaled: Dimensions.largest_logit. The
    product of both factors of a head is limit / its largest logit if that is below 1, else 1. Each gets its square
    root; a key that several heads share gets that of the smallest, and their queries get the rest.
    """
    shared = query.size(-2) // key.size(-2)
    largest = unscaled * (query * key.repeat_interleave(shared, -2)).abs().amax(-1, keepdim=True)
    share = (limit / largest).clamp_max(1.0)
    of_key = share.unflatten(-2, (-1, shared)).amin(-2).sqrt()
    return share / of_key.repeat_interleave(shared, -2), of_key


@torch.no_grad()
def clip_scales(layers: nn.ModuleList, adamw: ZeroAdamW, dims: Dimensions, limit: float) -> None:
    """Rescales the learned scales of this rank's queries and keys, so that no attention logit can exceed `limit`."""
    blocks = [module for module in layers.modules() if isinstance(module, Attention)]
    queries = [block.query_scale for block in blocks if block.query_scale is not None]
    keys = [block.key_scale for block in blocks if block.key_scale is not None]
    if not blocks:  # a pipeline stage without any
        return
    pair = clip_factors(torch.stack((*queries,)), torch.stack((*keys,)), dims.largest_logit, limit)
    factors = dict(zip(queries + keys, (*pair[0], *pair[1]), strict=True))
    for parameter, start, length, state in adamw.fragments():  # this rank's share of the masters
        if parameter in factors:
            state["master"] *= factors[parameter].expand_as(parameter).flatten()[start : start + length]
    for parameter, factor in factors.items():
        parameter.mul_(factor)
