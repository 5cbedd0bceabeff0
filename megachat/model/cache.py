"""The KV cache: keys and values of the tokens that a model has seen, so that it goes on with new ones alone.

A Cache holds rows; a Chunk is one pass of new tokens over them. Rows may have different lengths, chunks any number of tokens, and several rows of
a chunk may go on from one cached row. A block keeps the last window + 1 tokens of each row, the token at position p in slot p modulo their
number, which is all that any later token sees. What is here runs on every layout: each process keeps what its own layers compute.
"""

from collections.abc import Sequence

import torch
from torch import nn

from megachat.kernels.attention import attention, masked_attention
from megachat.planning.dimensions import Dimensions


def cache_bytes(
    dims: Dimensions,
    rows: int,
    tokens: int,
    dtype: torch.dtype,
    *,
    blocks: range | None = None,
    kv_heads: int | None = None,
) -> int:
    """Memory of a Cache in bytes once a chunk has passed. blocks and kv_heads: those of a process; by default the whole model's. The last
    embedding of each row is counted where block 0 is."""
    blocks = range(dims.depth) if blocks is None else blocks
    slots = sum(min(tokens, dims.windows[block] + 1) for block in blocks)
    elements = 2 * slots * (dims.kv_heads if kv_heads is None else kv_heads) * dims.head_size + (
        dims.width if 0 in blocks else 0
    )
    return rows * elements * dtype.itemsize


class Cache:
    """What is kept of `rows` texts of at most `tokens` tokens each. Buffers are made when the first chunk passes, in its dtype, on its device.

    lengths: tokens cached of each row. Chunks must pass in the order in which they were made, without gradients.
    """

    def __init__(self, dims: Dimensions, rows: int, tokens: int):
        if not 1 <= tokens <= dims.sequence_len:
            raise ValueError(f"a cache of {tokens} tokens for a model of {dims.sequence_len}")
        self.dims, self.tokens, self.lengths = dims, tokens, [0] * rows
        self._buffers: dict[
            int, tuple[torch.Tensor, torch.Tensor]
        ] = {}  # of each block: keys and values [rows, slots, kv_heads, head_size]
        self._embedding: torch.Tensor | None = None  # of each row's last token, before smear: [rows, width]

    def extend(self, lengths: Sequence[int]) -> "Chunk":
        """The pass that appends the first lengths[i] of its tokens to row i; what comes behind them in the batch is padding. A row may get none.

        `self.lengths` grows at once. Raises ValueError when a row would not fit.
        """
        starts = self.lengths
        if len(lengths) != len(starts) or max(map(sum, zip(starts, lengths, strict=True))) > self.tokens:
            raise ValueError(
                f"rows of {starts} tokens cannot grow by {list(lengths)} in a cache of {len(starts)} rows of {self.tokens} tokens"
            )
        self.lengths = [start + length for start, length in zip(starts, lengths, strict=True)]
        return Chunk(self, starts, list(lengths), None)

    def branch(self, rows: Sequence[int]) -> "Chunk":
        """The pass whose row i goes on from cached row rows[i] and is not kept: the cache stays as it is. A cached row may be named often."""
        return Chunk(self, [self.lengths[row] for row in rows], [0] * len(rows), list(rows))

    def select(self, rows: Sequence[int]) -> "Cache":
        """A cache of its own whose row i is a copy of row rows[i]; for going on from one prefix in several ways that are kept."""
        chosen = Cache(self.dims, len(rows), self.tokens)
        chosen.lengths = [self.lengths[row] for row in rows]
        chosen._buffers = {
            block: (keys[list(rows)], values[list(rows)]) for block, (keys, values) in self._buffers.items()
        }
        chosen._embedding = None if self._embedding is None else self._embedding[list(rows)]
        return chosen

    @property
    def bytes(self) -> int:
        """Memory of what this process keeps."""
        held = [tensor for pair in self._buffers.values() for tensor in pair] + (
            [] if self._embedding is None else [self._embedding]
        )
        return sum(tensor.nbytes for tensor in held)


class Chunk:
    """One pass of new tokens; made by `Cache.extend` and `Cache.branch`. Modules with a `past` ask it for what came before (see `set_past`)."""

    def __init__(self, cache: Cache, starts: list[int], lengths: list[int], rows: list[int] | None):
        self.cache, self.starts, self.lengths, self.rows = cache, starts, lengths, rows
        self._alike = len(set(starts)) == 1
        self._made: dict[tuple, torch.Tensor] = {}  # indices and masks, which blocks share

    def positions(self, tokens: int, device: torch.device) -> slice | torch.Tensor:
        """Of the batch's tokens, for the rotary tables: a slice, or int64 [batch, tokens]; those of padding are any."""
        if self._alike and self.starts[0] + tokens <= self.cache.dims.sequence_len:
            return slice(self.starts[0], self.starts[0] + tokens)
        return self._once(
            "positions",
            device,
            lambda: self._queries(tokens).clamp(max=self.cache.dims.sequence_len - 1).expand(len(self.starts), -1),
        )

    def before(self, x: torch.Tensor) -> torch.Tensor:
        """Embeddings x [batch, tokens, width] -> each token's previous one's, zeros before a row's first; keeps the last for the next chunk."""
        if self.cache._embedding is None:
            self.cache._embedding = x.new_zeros(len(self.cache.lengths), x.size(-1))
        last = self.cache._embedding
        if self.rows is not None:
            return torch.cat((last[self.rows].unsqueeze(1), x[:, :-1]), dim=1)
        ends = torch.tensor(self.lengths, device=x.device)
        latest = x[torch.arange(len(x), device=x.device), (ends - 1).clamp_min(0)]
        self.cache._embedding = torch.where((ends > 0).unsqueeze(1), latest, last)
        return torch.cat((last.unsqueeze(1), x[:, :-1]), dim=1)

    def attend(self, block: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
        """`attention` of new queries over cached and new keys; shapes as there. Keeps the new keys and values, unless this is a branch."""
        tokens, slots, seen = q.size(1), min(self.cache.tokens, window + 1), max(self.starts)
        if not seen:
            if self.rows is None:
                self._keep(block, k, v, slots)
            return attention(q, k, v, window)
        if self.rows is None and (
            seen + tokens <= slots or tokens == 1
        ):  # nothing that these tokens see is overwritten by them
            keys, values = (whole[:, : min(slots, seen + tokens)] for whole in self._keep(block, k, v, slots))
            if tokens == 1 and self._alike:
                return masked_attention(q, keys, values, None)
            return masked_attention(
                q,
                keys,
                values,
                self._once(("mask", window), q.device, lambda: self._mask(window, slots, tokens, inside=True)),
            )
        keys, values = (whole[:, : min(slots, seen)] for whole in self.cache._buffers[block])
        if self.rows is not None:
            keys, values = keys[self.rows], values[self.rows]
        keys, values = torch.cat((keys, k), dim=1), torch.cat((values, v), dim=1)
        if self.rows is None:
            self._keep(block, k, v, slots)
        return masked_attention(
            q,
            keys,
            values,
            self._once(("mask", window), q.device, lambda: self._mask(window, slots, tokens, inside=False)),
        )

    def _keep(self, block: int, k: torch.Tensor, v: torch.Tensor, slots: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Write new keys and values into their slots; returns the block's buffers."""
        if block not in self.cache._buffers:
            shape = len(self.cache.lengths), slots, *k.shape[2:]
            self.cache._buffers[block] = k.new_zeros(shape), v.new_zeros(shape)
        tokens, first = k.size(1), self.starts[0] % slots
        for whole, new in zip(self.cache._buffers[block], (k, v), strict=True):
            if (
                self._alike
                and first + tokens <= slots
                and (self.starts[0] < slots or all(length == tokens for length in self.lengths))
            ):
                whole[:, first : first + tokens] = new  # padding too: no later token sees it before it is overwritten
            else:
                rows, at, slot = self._once(("places", slots), k.device, lambda: self._places(tokens, slots))
                whole[rows, slot] = new[rows, at]
        return self.cache._buffers[block]

    def _places(self, tokens: int, slots: int) -> torch.Tensor:
        """[3, n]: row, place in the chunk and slot of every token to be kept, the last `slots` of each row."""
        starts, lengths, at = torch.tensor(self.starts), torch.tensor(self.lengths).unsqueeze(1), torch.arange(tokens)
        rows, at = ((at < lengths) & (at >= lengths - slots)).nonzero(as_tuple=True)
        return torch.stack((rows, at, (starts[rows] + at) % slots))

    def _queries(self, tokens: int) -> torch.Tensor:
        """Positions of the new tokens, [batch or 1, tokens]."""
        return torch.tensor(self.starts[:1] if self._alike else self.starts).unsqueeze(1) + torch.arange(tokens)

    def _mask(self, window: int, slots: int, tokens: int, *, inside: bool) -> torch.Tensor:
        """Boolean [batch or 1, 1, tokens, keys], true where a new token sees a key. inside: the new keys are in their slots already; otherwise
        they come behind the cached ones. Padding is masked like tokens, so that every query sees a key."""
        queries = self._queries(tokens)
        ends = queries[:, :1] + (tokens if inside else 0)
        slot = torch.arange(min(slots, max(self.starts) + (tokens if inside else 0)))
        keys = ends - 1 - (ends - 1 - slot) % slots  # the latest position of each slot; negative where there is none
        if not inside:
            keys = torch.cat((keys, queries), dim=1)
        behind = queries.unsqueeze(2) - keys.unsqueeze(1)
        return ((behind >= 0) & (behind <= window) & (keys >= 0).unsqueeze(1)).unsqueeze(1)

    def _once(self, key, device: torch.device, make) -> torch.Tensor:
        if key not in self._made:
            self._made[key] = make().to(device)
        return self._made[key]


def set_past(model: nn.Module, chunk: Chunk | None) -> None:
    """The next pass of the model, or of one process's layers of it, is this chunk's; None: every pass is a whole text again."""
    for module in model.modules():
        if hasattr(module, "past"):
            module.past = chunk
