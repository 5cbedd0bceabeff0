"""Attention kernels for a GPU: flash-attention and flex_attention of torch. They compute what `attention` computes."""

import importlib
from collections.abc import Callable
from typing import Any

import torch

from megachat.kernels.attention import attention
from megachat.kernels.uncompiled import uncompiled

FLASH_MODULES = {"flash2": "flash_attn", "flash3": "flash_attn_interface", "flash4": "flash_attn.cute"}


def flash_function(name: str) -> Callable:
    """Imports a generation of flash-attention ("flash2", "flash3" or "flash4") and returns its function."""
    return importlib.import_module(FLASH_MODULES[name]).flash_attn_func


class FlashAttention:
    """Calls flash-attention 2 (arXiv 2307.08691), 3 (arXiv 2407.08608) or 4; they count windows as `attention`."""

    def __init__(self, name: str):
        self._function, self._unlimited = flash_function(name), None if name == "flash4" else -1

    @uncompiled
    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
        full = window >= q.size(1) - 1
        window_size = (self._unlimited, self._unlimited) if full else (window, 0)
        output = self._function(q, k, v, causal=True, window_size=window_size)
        return output[0] if isinstance(output, tuple) else output  # some versions also return the sums of exponentials


class FlexAttention:
    """Calls torch's flex_attention with windows as block masks. Rows of other lengths use the reference."""

    def __init__(self, tokens: int, *, compiled: bool = True):
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        self._attend = torch.compile(flex_attention, dynamic=False) if compiled else flex_attention
        self._create_mask, self._tokens = create_block_mask, tokens
        self._masks: dict[int, Any] = {}

    @uncompiled
    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
        if q.size(1) != self._tokens:
            return attention(q, k, v, window)
        mask = self._mask(min(window, self._tokens - 1), q.device)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        return self._attend(q, k, v, block_mask=mask, enable_gqa=q.size(1) != k.size(1)).transpose(1, 2)

    def _mask(self, window: int, device: torch.device):
        def visible(batch, head, query, key):
            return (query >= key) & (query - key <= window)

        if window not in self._masks:
            self._masks[window] = self._create_mask(visible, None, None, self._tokens, self._tokens, device=device)
        return self._masks[window]
