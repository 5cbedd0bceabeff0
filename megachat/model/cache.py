"""The KV cache: keys and values of the tokens that a model has seen, so that it continues with the new ones only.

A Cache holds rows; a Chunk is one pass of new tokens over them. Rows may have different lengths, chunks any number of
tokens, and several rows of a chunk may continue one cached row. A block keeps the last window + 1 tokens of each row,
all that a later token can see. The token at position p is in slot p modulo their number. On every layout, each process
caches what its local layers compute.
"""

from collections.abc import Callable, Hashable, Sequence

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
    """Returns the bytes of a Cache after a chunk has passed.

    blocks, kv_heads: those of one process; default: the whole model's. Each row's last embedding is counted with block
    0, its last ids if one of the blocks has n-gram values.
    """
    blocks = range(dims.depth) if blocks is None else blocks
    slots = sum(min(tokens, dims.windows[block] + 1) for block in blocks)
    elements = 2 * slots * (dims.kv_heads if kv_heads is None else kv_heads) * dims.head_size
    elements += dims.width if 0 in blocks else 0
    ids = _ids_before(dims) if any(dims.has_ngram(block) for block in blocks) else 0
    return rows * (elements * dtype.itemsize + 8 * ids)


def _ids_before(dims: Dimensions) -> int:
    """Returns how many earlier ids the longest n-gram of a token has."""
    return max(dims.ngram.orders) - 1 if dims.ngram else 0


class Cache:
    """Caches `rows` texts of at most `tokens` tokens each.

    The first chunk creates the buffers in its dtype, on its device.

    lengths: tokens cached per row. Chunks must pass in the order of their creation, without gradients.
    """

    def __init__(self, dims: Dimensions, rows: int, tokens: int):
        if not 1 <= tokens <= dims.longest_row:
            raise ValueError(f"a cache of {tokens} tokens for a model of at most {dims.longest_row}")
        self.dims, self.tokens, self.lengths = dims, tokens, [0] * rows
        # per block: keys and values [rows, slots, kv_heads, head_size]
        self._buffers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._embedding: torch.Tensor | None = None  # of each row's last token, before smear: [rows, width]
        self._ids: torch.Tensor | None = None  # the last ids of each row, -1 before its first: [rows, order - 1]

    def extend(self, lengths: Sequence[int]) -> "Chunk":
        """Returns the pass that appends its first lengths[i] tokens to row i; the tokens after them in the batch are
        padding.

        A row may get none. `self.lengths` grows at once. Raises ValueError if a row would not fit.
        """
        starts = self.lengths
        if len(lengths) != len(starts) or max(map(sum, zip(starts, lengths, strict=True))) > self.tokens:
            raise ValueError(
                f"rows of {starts} tokens cannot grow by {list(lengths)} in a cache of {len(starts)} rows of "
                f"{self.tokens} tokens"
            )
        self.lengths = [start + length for start, length in zip(starts, lengths, strict=True)]
        return Chunk(self, starts, list(lengths), None)

    def branch(self, rows: Sequence[int]) -> "Chunk":
        """Returns the pass whose row i continues cached row rows[i] and is not cached.

        A cached row may occur several times.
        """
        return Chunk(self, [self.lengths[row] for row in rows], [0] * len(rows), list(rows))

    def select(self, rows: Sequence[int]) -> "Cache":
        """Returns a new cache whose row i is a copy of row rows[i], for continuing one prefix in several ways."""
        selected = Cache(self.dims, len(rows), self.tokens)
        selected.lengths = [self.lengths[row] for row in rows]
        selected._buffers = {
            block: (keys[list(rows)], values[list(rows)]) for block, (keys, values) in self._buffers.items()
        }
        selected._embedding = None if self._embedding is None else self._embedding[list(rows)]
        selected._ids = None if self._ids is None else self._ids[list(rows)]
        return selected

    @property
    def bytes(self) -> int:
        """Returns the bytes that this process caches."""
        last = sum(0 if tensor is None else tensor.nbytes for tensor in (self._embedding, self._ids))
        return last + sum(tensor.nbytes for pair in self._buffers.values() for tensor in pair)


class Chunk:
    """One pass of new tokens, created by `Cache.extend` or `Cache.branch`; modules with a `past` use it (see
    `set_past`).
    """

    def __init__(self, cache: Cache, starts: list[int], lengths: list[int], rows: list[int] | None):
        self.cache, self.starts, self.lengths, self.rows = cache, starts, lengths, rows
        self._same_start = len(set(starts)) == 1
        self._shared: dict[Hashable, torch.Tensor] = {}  # indices and masks that the blocks share

    def positions(self, tokens: int, device: torch.device) -> slice | torch.Tensor:
        """Returns the positions of the batch's tokens, for the rotary tables: a slice, or int64 [batch, tokens].

        Those of padding are arbitrary.
        """
        if self._same_start and self.starts[0] + tokens <= self.cache.dims.longest_row:
            return slice(self.starts[0], self.starts[0] + tokens)
        last = self.cache.dims.longest_row - 1
        return self._share(
            "positions", device, lambda: self._queries(tokens).clamp(max=last).expand(len(self.starts), -1)
        )

    def previous_embeddings(self, x: torch.Tensor) -> torch.Tensor:
        """Returns each token's previous embedding for x [batch, tokens, width], zeros before a row's first; caches the
        last.
        """
        if self.cache._embedding is None:
            self.cache._embedding = x.new_zeros(len(self.cache.lengths), x.size(-1))
        last = self.cache._embedding
        if self.rows is not None:
            return torch.cat((last[self.rows].unsqueeze(1), x[:, :-1]), dim=1)
        ends = torch.tensor(self.lengths, device=x.device)
        latest = x[torch.arange(len(x), device=x.device), (ends - 1).clamp_min(0)]
        self.cache._embedding = torch.where((ends > 0).unsqueeze(1), latest, last)
        return torch.cat((last.unsqueeze(1), x[:, :-1]), dim=1)

    def previous_ids(self, ids: torch.Tensor) -> torch.Tensor:
        """Returns the ids before those of the chunk, -1 before a row's first: [batch, order of the longest n-gram - 1].

        ids: int64 [batch, tokens]. The blocks of this process share the result; the first call caches the last ids.
        """
        return self._share("ids", ids.device, lambda: self._take_ids(ids))

    def _take_ids(self, ids: torch.Tensor) -> torch.Tensor:
        count, cache = _ids_before(self.cache.dims), self.cache
        if cache._ids is None:
            cache._ids = ids.new_full((len(cache.lengths), count), -1)
        if self.rows is not None:
            return cache._ids[self.rows]
        before = cache._ids
        ends = torch.tensor(self.lengths, device=ids.device).unsqueeze(1) + torch.arange(count, device=ids.device)
        cache._ids = torch.cat((before, ids), dim=1).gather(1, ends)
        return before

    def attend(self, block: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
        """Computes `attention` of new queries over cached and new keys, shapes as there.

        Caches the new ones unless a branch.
        """
        tokens, slots, seen = q.size(1), min(self.cache.tokens, window + 1), max(self.starts)
        if not seen:
            if self.rows is None:
                self._store(block, k, v, slots)
            return attention(q, k, v, window)
        # the new keys may be stored first if they overwrite nothing that these tokens see
        stored_first = self.rows is None and (seen + tokens <= slots or tokens == 1)
        if stored_first:
            keys, values = (whole[:, : min(slots, seen + tokens)] for whole in self._store(block, k, v, slots))
            if tokens == 1 and self._same_start:
                return masked_attention(q, keys, values, None)
        else:
            keys, values = (whole[:, : min(slots, seen)] for whole in self.cache._buffers[block])
            if self.rows is not None:
                keys, values = keys[self.rows], values[self.rows]
            keys, values = torch.cat((keys, k), dim=1), torch.cat((values, v), dim=1)
            if self.rows is None:
                self._store(block, k, v, slots)
        mask = self._share(("mask", window), q.device, lambda: self._mask(window, slots, tokens, stored=stored_first))
        return masked_attention(q, keys, values, mask)

    def _store(self, block: int, k: torch.Tensor, v: torch.Tensor, slots: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes new keys and values into their slots; returns the block's buffers."""
        if block not in self.cache._buffers:
            shape = len(self.cache.lengths), slots, *k.shape[2:]
            self.cache._buffers[block] = k.new_zeros(shape), v.new_zeros(shape)
        tokens, first = k.size(1), self.starts[0] % slots
        no_padding = all(length == tokens for length in self.lengths)
        contiguous = self._same_start and first + tokens <= slots and (self.starts[0] < slots or no_padding)
        for whole, new in zip(self.cache._buffers[block], (k, v), strict=True):
            if contiguous:
                whole[:, first : first + tokens] = new  # padding too: no later token sees it before it is overwritten
            else:
                rows, at, slot = self._share(("slots", slots), k.device, lambda: self._slots(tokens, slots))
                whole[rows, slot] = new[rows, at]
        return self.cache._buffers[block]

    def _slots(self, tokens: int, slots: int) -> torch.Tensor:
        """Returns [3, n]: row, index in the chunk and slot of every token to cache, each row's last `slots`."""
        starts, lengths, at = torch.tensor(self.starts), torch.tensor(self.lengths).unsqueeze(1), torch.arange(tokens)
        rows, at = ((at < lengths) & (at >= lengths - slots)).nonzero(as_tuple=True)
        return torch.stack((rows, at, (starts[rows] + at) % slots))

    def _queries(self, tokens: int) -> torch.Tensor:
        """Returns the positions of the new tokens, [batch or 1, tokens]."""
        return torch.tensor(self.starts[:1] if self._same_start else self.starts).unsqueeze(1) + torch.arange(tokens)

    def _mask(self, window: int, slots: int, tokens: int, *, stored: bool) -> torch.Tensor:
        """Returns boolean [batch or 1, 1, tokens, keys], true where a new token sees a key.

        stored: the new keys are in their slots already; else they follow the cached ones. Padding is masked like
        tokens, so that every query sees a key.
        """
        queries = self._queries(tokens)
        new = tokens if stored else 0
        ends = queries[:, :1] + new
        slot = torch.arange(min(slots, max(self.starts) + new))
        keys = ends - 1 - (ends - 1 - slot) % slots  # the latest position of each slot; negative if there is none
        if not stored:
            keys = torch.cat((keys, queries), dim=1)
        behind = queries.unsqueeze(2) - keys.unsqueeze(1)
        return ((behind >= 0) & (behind <= window) & (keys >= 0).unsqueeze(1)).unsqueeze(1)

    def _share(self, key: Hashable, device: torch.device, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        if key not in self._shared:
            self._shared[key] = compute().to(device)
        return self._shared[key]


_PAST = "past"  # the attribute of Embed and Attention that holds the chunk


def set_past(model: nn.Module, chunk: Chunk | None) -> None:
    """Makes the next pass of the model, or of a process's layers of it, the chunk's; None: every pass is a whole text
    again.
    """
    for module in model.modules():
        if hasattr(module, "past"):
            setattr(module, _PAST, chunk)
