"""Attention of each token over the table rows that belong to its id (L3: Large Lookup Layers, arXiv 2601.21461).

Gathering the rows of every token needs [tokens, most rows, width], 51.5 GB at 65,536 tokens, 512 rows and width 768.
Here tokens with equal ids share their rows, ids with about as many tokens and rows are multiplied in one batch, and
workspace is bounded: besides the results, some tensors of `_WORKSPACE_BYTES`. The backward pass computes scores again.

Each element of a result or gradient is written once, so nothing depends on the order of threads. Tokens are grouped on
the host, once per micro-batch. On a GPU this waits once for the ids; the speed there was not measured, nor was torch's
flex_attention over sorted tokens.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch.utils.weak import WeakIdKeyDictionary

from megachat.kernels.uncompiled import uncompiled

_WORKSPACE_BYTES = 1 << 20  # of one operand on a CPU: what its cache holds
_GPU_WORKSPACE_BYTES = 32 << 20
# Tokens x rows from which an id is a batch of its own, which reads the table without a copy: smaller products take less
# time than starting them
_ALONE = 2048
# Batches pad tokens and rows to the next of these sizes at most
_SIZES = np.array(sorted({2**power for power in range(31)} | {3 * 2**power for power in range(30)}))


class TableRows(NamedTuple):
    """first: int64 [vocabulary + 1]; token t has the rows first[t] .. first[t + 1] - 1 of the whole table.

    start: the row of the whole table that this process holds first. It must hold all rows of a token or none (see
    megachat.planning.dimensions.balanced_cuts). A token without rows here reads zeros, so the sum of all parts' results
    is the result of the whole table. Keep `first` on the CPU: it is read there only.
    """

    first: torch.Tensor
    start: int = 0


@uncompiled
def lookup_attention(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, ids: torch.Tensor, rows: TableRows, scale: float
) -> torch.Tensor:
    """Returns for each token the average of its value rows, weighted by softmax(scale * key rows . query).

    queries [..., width]; keys [table rows, width]; values [table rows, value width], may be `keys` itself; ids [...].
    Result [..., value width] in the dtype of `queries`. Products, softmax and sums are float32. Calls with the same
    tensor `ids` and equal rows share the grouping of tokens.
    """
    groups = token_groups(ids, rows, len(keys), max(keys.size(1), values.size(1)))
    result = _LookupAttention.apply(queries.flatten(0, -2), keys, values, groups, scale)
    return result.unflatten(0, ids.shape)


class _Group(NamedTuple):
    """Ids whose tokens and rows are multiplied in one batch.

    tokens: int64 [ids, most tokens of an id], padded by the number of all tokens; one id may have several parts of
    them. rows: int64 [ids, most rows of an id], padded by the number of table rows; or a slice of the table if there is
    one id. The paddings are masks [ids, most tokens, 1] and [ids, 1, most rows], None if nothing is padded.
    """

    tokens: tuple[torch.Tensor, ...]
    rows: torch.Tensor | slice
    tokens_padding: torch.Tensor | None = None
    rows_padding: torch.Tensor | None = None

    @property
    def single(self) -> bool:
        """Whether each id has one row, so that the softmax is 1."""
        return not isinstance(self.rows, slice) and self.rows.size(1) == 1

    def table_rows(self, table: torch.Tensor) -> torch.Tensor:
        """Returns float32 [ids, most rows, width]."""
        if isinstance(self.rows, slice):
            return table[self.rows].unsqueeze(0).float()
        return _gather(table, self.rows, self.rows_padding)

    def write_rows(self, table: torch.Tensor, values: torch.Tensor) -> None:
        """Writes values [ids, most rows, width] to the rows of `table`, which has one more row for padding."""
        if isinstance(self.rows, slice):
            table[self.rows] = values[0]
        else:
            _scatter(table, self.rows, values)

    def weights(self, queries: torch.Tensor, keys: torch.Tensor, scale: float) -> torch.Tensor:
        """Returns the softmax [ids, tokens, rows]. queries [ids, tokens, width]; keys [ids, rows, width]."""
        scores = torch.bmm(queries, keys.mT).mul_(scale)
        if self.rows_padding is not None:
            scores.masked_fill_(self.rows_padding, -torch.inf)
        return torch.softmax(scores, dim=2)


def _gather(table: torch.Tensor, positions: torch.Tensor, padding: torch.Tensor | None) -> torch.Tensor:
    """Returns table[positions] in float32, some row for padding. table [rows, width], positions [ids, n]."""
    flat = positions.flatten() if padding is None else positions.flatten().clamp(max=len(table) - 1)
    return table.index_select(0, flat).view(*positions.shape, -1).float()


def _scatter(table: torch.Tensor, positions: torch.Tensor, values: torch.Tensor) -> None:
    """Writes values [ids, n, width] to the rows `positions` [ids, n] of `table`."""
    table.index_copy_(0, positions.flatten(), values.flatten(0, 1).to(table.dtype))


def _add_product(total: torch.Tensor | None, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Returns total + left^T right (of each id); total None: zero."""
    return torch.bmm(left.mT, right) if total is None else torch.baddbmm(total, left.mT, right, out=total)


# ids -> (version of ids, rows of the table here and its width; rows of the tokens; groups)
_grouped: WeakIdKeyDictionary = WeakIdKeyDictionary()


def token_groups(ids: torch.Tensor, rows: TableRows, table_rows: int, width: int) -> list[_Group]:
    """Returns the groups of tokens: the same list as before while `ids` is not written and the rows are equal."""
    key, known = (ids._version, rows.start, table_rows, width), _grouped.get(ids)
    if known and known[0] == key and (known[1] is rows.first or torch.equal(known[1], rows.first)):
        return known[2]
    groups = _make_groups(ids, (rows.first.cpu().numpy() - rows.start).clip(0, table_rows), width)
    _grouped[ids] = (key, rows.first, groups)
    return groups


def _make_groups(ids: torch.Tensor, first: np.ndarray, width: int) -> list[_Group]:
    """Groups tokens on the host, those without rows in no group. first: of the rows that this process holds."""
    device, host = ids.device, ids.flatten().cpu().numpy()
    rows_per_batch = (_GPU_WORKSPACE_BYTES if ids.is_cuda else _WORKSPACE_BYTES) // (4 * width)
    order = np.argsort(host, kind="stable")
    unique, starts, counts = np.unique(host[order], return_index=True, return_counts=True)
    firsts, sizes = first[unique], first[unique + 1] - first[unique]
    alone = (counts * sizes >= _ALONE) & (sizes > 1)
    groups = []
    for start, count, begin, size in np.stack((starts, counts, firsts, sizes), axis=1)[alone].tolist():
        tokens = _to(order[None, start : start + count], device)
        most = max(1, rows_per_batch * width // max(size, width))
        groups.append(_Group(tokens.split(most, dim=1), slice(begin, begin + size)))
    kinds = np.searchsorted(_SIZES, counts) * len(_SIZES) + np.searchsorted(_SIZES, sizes)
    kinds[alone | (sizes == 0)] = -1
    for kind in np.unique(kinds[kinds >= 0]):
        members = np.flatnonzero(kinds == kind)
        step = max(1, rows_per_batch // int(max(counts[members].max(), sizes[members].max())))
        for part in np.split(members, range(step, len(members), step)):
            positions, no_token = _ranges(starts[part], counts[part])
            rows, no_row = _ranges(firsts[part], sizes[part])
            positions = np.where(no_token, len(order), order[np.where(no_token, 0, positions)])
            rows[no_row] = first[-1]
            masks = [_to(mask, device) if mask.any() else None for mask in (no_token[:, :, None], no_row[:, None, :])]
            groups.append(_Group((_to(positions, device),), _to(rows, device), *masks))
    return groups


def _ranges(starts: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns lines starts[i], starts[i] + 1, ... [n, largest size], and where they are longer than their size."""
    offsets = np.arange(sizes.max())
    return starts[:, None] + offsets, offsets >= sizes[:, None]


def _to(array: np.ndarray, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(array).to(device, non_blocking=True)


class _LookupAttention(torch.autograd.Function):
    """Keeps only its inputs for the backward pass, which computes the softmax of each group again.

    Results and gradients have one more row while they are written, for padding.
    """

    @staticmethod
    def forward(ctx, queries, keys, values, groups, scale):
        ctx.tied, ctx.groups, ctx.scale = values is keys, groups, scale
        ctx.save_for_backward(queries, keys, values)
        result = queries.new_zeros(len(queries) + 1, values.size(1))
        for group in groups:
            v = group.table_rows(values)
            if group.single:
                _scatter(result, group.tokens[0], v.expand(-1, group.tokens[0].size(1), -1))
                continue
            k = v if ctx.tied else group.table_rows(keys)
            for tokens in group.tokens:
                weights = group.weights(_gather(queries, tokens, group.tokens_padding), k, scale)
                _scatter(result, tokens, torch.bmm(weights, v))
        return result.resize_(len(queries), values.size(1))

    @staticmethod
    def backward(ctx, gradient):
        queries, keys, values = ctx.saved_tensors
        d_queries = queries.new_zeros(len(queries) + 1, queries.size(1))
        d_keys = keys.new_zeros(len(keys) + 1, keys.size(1))
        d_values = d_keys if ctx.tied else values.new_zeros(len(values) + 1, values.size(1))
        for group in ctx.groups:
            if group.single:
                group.write_rows(d_values, _output_gradient(gradient, group, group.tokens[0]).sum(1, keepdim=True))
                continue
            v = group.table_rows(values)
            k = v if ctx.tied else group.table_rows(keys)
            key_sum = value_sum = None
            for tokens in group.tokens:
                q, g = _gather(queries, tokens, group.tokens_padding), _output_gradient(gradient, group, tokens)
                weights = group.weights(q, k, ctx.scale)
                d_scores = torch.bmm(g, v.mT)
                d_scores.sub_((d_scores * weights).sum(2, keepdim=True)).mul_(weights).mul_(ctx.scale)
                _scatter(d_queries, tokens, torch.bmm(d_scores, k))
                value_sum = _add_product(value_sum, weights, g)
                key_sum = _add_product(value_sum if ctx.tied else key_sum, d_scores, q)
            group.write_rows(d_keys, key_sum)
            if not ctx.tied:
                group.write_rows(d_values, value_sum)
        d_values = None if ctx.tied else d_values.resize_(values.shape)
        return d_queries.resize_(queries.shape), d_keys.resize_(keys.shape), d_values, None, None


def _output_gradient(gradient: torch.Tensor, group: _Group, tokens: torch.Tensor) -> torch.Tensor:
    """Returns the gradient of the tokens' results, float32 [ids, tokens, width], zeros for padding."""
    rows = _gather(gradient, tokens, group.tokens_padding)
    return rows if group.tokens_padding is None else rows.masked_fill_(group.tokens_padding, 0)
