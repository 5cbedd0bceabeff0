"""Attention of each token over the table rows that belong to its id (L3: Large Lookup Layers, arXiv 2601.21461).

Gathering the rows of every token needs [tokens, most rows, width], 51.5 GB at 65,536 tokens, 512 rows and width 768.
Here tokens with equal ids share their rows, and workspace is bounded: nothing larger than `_WORKSPACE_BYTES` is made
besides the results, and the backward pass computes scores again.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch

_WORKSPACE_BYTES = 16 << 20
_SHARED_FROM = 4  # occurrences of an id from which its rows are multiplied in place; rarer ids are gathered in batches


class TableRows(NamedTuple):
    """first: int64 [vocabulary + 1]; token t has the rows first[t] .. first[t + 1] - 1 of the table.

    A token without rows reads zeros.
    """

    first: torch.Tensor

    @staticmethod
    def from_allocation(allocation: torch.Tensor) -> "TableRows":
        """allocation: rows of each token, integers [vocabulary]."""
        zero = torch.zeros(1, dtype=torch.int64, device=allocation.device)
        return TableRows(torch.cat([zero, allocation.to(torch.int64).cumsum(0)]))

    def part(self, start: int, rows: int) -> "TableRows":
        """Returns the rows of a part of the table, `rows` rows from row `start`, counted from the part's first row.

        Tokens of other parts have no rows, so the sum of all parts' results is the result of the whole table. A token
        must not be divided (see megachat.planning.dimensions.balanced_cuts).
        """
        return TableRows(self.first.clamp(start, start + rows) - start)


def lookup_attention(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, ids: torch.Tensor, rows: TableRows, scale: float
) -> torch.Tensor:
    """Returns for each token the average of its value rows, weighted by softmax(scale * key rows . query).

    queries [tokens, width]; keys [table rows, width]; values [table rows, value width], may be `keys` itself; ids
    [tokens]. Result [tokens, value width]. Softmax and sums are float32.
    """
    return _LookupAttention.apply(queries, keys, values, ids, rows, scale)


class _Batch(NamedTuple):
    """Tokens whose rows are multiplied together.

    tokens: int64 [n]. span: the part of the table that all of them share, because they have the same id, or None.
    places: without a span, int64 [n, most rows], in which rows that a token does not have are -1; else empty.
    """

    tokens: torch.Tensor
    span: slice | None
    places: torch.Tensor

    @property
    def single(self) -> bool:
        """Whether each token has one row, so that the softmax is 1."""
        return self.span is None and self.places.size(1) == 1

    def of(self, table: torch.Tensor) -> torch.Tensor:
        """Returns the batch's rows in float32: [rows, width] if they are shared, else [n, most rows, width]."""
        return (table[self.places.clamp_min(0)] if self.span is None else table[self.span]).float()


def _batches(ids: torch.Tensor, rows: TableRows, width: int) -> Iterator[_Batch]:
    """Groups tokens into batches whose scores and gathered rows fit the workspace."""
    order = torch.argsort(ids, stable=True)
    order = order[(rows.first[ids + 1] > rows.first[ids])[order]]
    unique, counts = torch.unique_consecutive(ids[order], return_counts=True)
    firsts, sizes = rows.first[unique], rows.first[unique + 1] - rows.first[unique]
    starts = counts.cumsum(0) - counts
    shared = counts >= _SHARED_FROM
    listed = zip(*(tensor[shared].tolist() for tensor in (starts, counts, firsts, sizes)), strict=True)
    for start, count, first, size in listed:
        most = max(1, _WORKSPACE_BYTES // (4 * max(size, width)))
        for begin in range(start, start + count, most):
            yield _Batch(order[begin : min(begin + most, start + count)], slice(first, first + size), order[:0])
    # the rest by capacity: 1, 2, 4, ... rows, so that padding at most doubles the work
    rare = order[~shared.repeat_interleave(counts)]
    rare_sizes = rows.first[ids[rare] + 1] - rows.first[ids[rare]]
    capacity = 1
    while rare.numel():
        of_class = rare_sizes <= capacity
        members, offsets = rare[of_class], torch.arange(capacity, device=ids.device)
        for tokens in members.split(max(1, _WORKSPACE_BYTES // (4 * capacity * width))):
            first, end = rows.first[ids[tokens]], rows.first[ids[tokens] + 1]
            places = first[:, None] + offsets
            yield _Batch(tokens, None, torch.where(places < end[:, None], places, -1))
        rare, rare_sizes, capacity = rare[~of_class], rare_sizes[~of_class], 2 * capacity


def _weights(batch: _Batch, queries: torch.Tensor, keys: torch.Tensor, scale: float) -> torch.Tensor:
    """Returns the softmax [n, rows] float32. queries [n, width] float32; keys: as batch.of returns them."""
    if batch.span is not None:
        return torch.softmax(scale * (queries @ keys.T), dim=-1)
    scores = scale * torch.bmm(keys, queries.unsqueeze(2)).squeeze(2)
    return torch.softmax(scores.masked_fill(batch.places < 0, -torch.inf), dim=-1)


def _weighted_sum(batch: _Batch, weights: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Returns [n, width]: the sum of each token's rows. weights [n, rows]; table: as batch.of returns it."""
    return torch.bmm(weights.unsqueeze(1), table).squeeze(1) if batch.span is None else weights @ table


def _add_outer(batch: _Batch, total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Adds left [n, rows] x right [n, width] to the batch's rows of `total` [table rows, width]."""
    if batch.span is not None:
        total[batch.span] += left.T @ right
    else:  # the rows that a token does not have get zeros
        outer = left.unsqueeze(2) * right.unsqueeze(1)
        total.index_add_(0, batch.places.clamp_min(0).flatten(), outer.flatten(0, 1))


class _LookupAttention(torch.autograd.Function):
    """Keeps only its inputs for the backward pass, which computes the softmax of each batch again."""

    @staticmethod
    def forward(ctx, queries, keys, values, ids, rows, scale):
        ctx.tied = values is keys
        ctx.save_for_backward(queries, keys, values, ids)
        ctx.rows, ctx.scale = rows, scale
        result = queries.new_zeros(len(queries), values.size(1))
        for batch in _batches(ids, rows, max(keys.size(1), values.size(1))):
            if batch.single:
                result[batch.tokens] = values[batch.places[:, 0]].to(result.dtype)
                continue
            k = batch.of(keys)
            v = k if ctx.tied else batch.of(values)
            weights = _weights(batch, queries[batch.tokens].float(), k, scale)
            result[batch.tokens] = _weighted_sum(batch, weights, v).to(result.dtype)
        return result

    @staticmethod
    def backward(ctx, gradient):
        queries, keys, values, ids = ctx.saved_tensors
        d_queries = torch.zeros_like(queries)
        d_keys = torch.zeros(keys.shape, dtype=torch.float32, device=keys.device)
        d_values = d_keys if ctx.tied else torch.zeros(values.shape, dtype=torch.float32, device=values.device)
        for batch in _batches(ids, ctx.rows, max(keys.size(1), values.size(1))):
            g, q = gradient[batch.tokens].float(), queries[batch.tokens].float()
            if batch.single:
                d_values.index_add_(0, batch.places[:, 0], g)
                continue
            k = batch.of(keys)
            v = k if ctx.tied else batch.of(values)
            weights = _weights(batch, q, k, ctx.scale)
            d_weights = g @ v.T if batch.span is not None else torch.bmm(v, g.unsqueeze(2)).squeeze(2)
            d_scores = ctx.scale * weights * (d_weights - (d_weights * weights).sum(1, keepdim=True))
            d_queries[batch.tokens] = _weighted_sum(batch, d_scores, k).to(queries.dtype)
            del k, v
            _add_outer(batch, d_keys, d_scores, q)
            _add_outer(batch, d_values, weights, g)
        return d_queries, d_keys.to(keys.dtype), None if ctx.tied else d_values.to(values.dtype), None, None, None
