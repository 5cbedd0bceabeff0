"""Hashed n-gram values: rows of tables for the last ids at each position, which attention adds to its values.

Engram family (arXiv 2601.07372; nanochat's pull request 854). See megachat.kernels.ngram for the hashes.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from megachat.kernels.linear import Linear
from megachat.kernels.ngram import ngram_rows, signs
from megachat.model.parameters import declare
from megachat.place import Place, set_place
from megachat.planning.dimensions import Dimensions, NgramDimensions

if TYPE_CHECKING:
    from megachat.model.cache import Chunk

Read = Callable[[torch.Tensor], torch.Tensor]


class NgramHashes:
    """Rows and signs of a micro-batch, computed once and shared by the blocks, whose hashes are the same.

    They are kept as long as the tensor of ids. Equal index tensors are one tensor, so that tables which are divided
    over ranks share their requests: on all ranks alike, also if only some of them continue a cached text.
    """

    def __init__(self, ngram: NgramDimensions):
        self.ngram = ngram
        self._kept = WeakTensorKeyDictionary()  # ids -> (its version, the ids before it, what was computed by order)

    def __call__(
        self, ids: torch.Tensor, order: int, before: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns (rows int64 [batch, tokens], -1: none; signs int8 [batch, tokens, width], None without them).

        before: see megachat.kernels.ngram.
        """
        version, earlier, results = self._kept.get(ids, (None, None, {}))
        if version != ids._version or earlier is not before:
            results = {}
            self._kept[ids] = ids._version, before, results
        if order not in results:
            results[order] = self._compute(ids, order, before)
        return results[order]

    def _compute(
        self, ids: torch.Tensor, order: int, before: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        ngram = self.ngram
        rows = ngram_rows(ids, order, ngram.rows, ngram.seed, ngram.bos, before)
        return rows, signs(ids, order, ngram.seed, ngram.width, before) if ngram.sign_trick else None


class NgramTable(nn.Module):
    """Reads rows of one order's table in one block.

    place: identity of the table [rows, width]. weight: the table; None if its rows are elsewhere (see `attach`).
    columns: [first, last) of those that this process reads. up: [kv_width, width], of tables narrower than the values.
    """

    def __init__(self, dims: Dimensions, ngram: NgramDimensions, block: int, order: int, dtype: torch.dtype | None):
        super().__init__()
        self.place = Place(f"ngram.{block}.{order}.weight", (ngram.rows, ngram.width), block, ("constant", 0.0), "rows")
        self.columns = (0, ngram.width)
        self._read: Read | None = None
        self.weight, self.up = None, None
        if dtype is not None:
            self.weight = nn.Parameter(torch.empty(self.place.whole, dtype=dtype))
            set_place(self.weight, self.place)
        if ngram.width < dims.kv_width:
            self.up, bound = Linear(ngram.width, dims.kv_width), (3 / ngram.width) ** 0.5
            declare(self.up.weight, f"ngram.{block}.{order}.up.weight", block, ("uniform", -bound, bound), "column")

    def attach(self, read: Read, ranks: int = 1, rank: int = 0) -> None:
        """Reads rows through `read` from now on: int64 [batch, tokens], -1 for no row -> [batch, tokens, columns].

        ranks, rank: of the tensor axis. Each rank reads an equal share of the columns, those of its key/value heads, in
        rank order. It reads all columns if the table is projected up.
        """
        self._read = read
        if self.divided:
            share = self.place.whole[1] // ranks
            self.columns = (rank * share, (rank + 1) * share)

    @property
    def divided(self) -> bool:
        """Whether each rank of the tensor axis reads an equal share of the columns."""
        return self.up is None

    def forward(self, rows: torch.Tensor, pattern: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        """rows [batch, tokens]; pattern: signs [batch, tokens, width] or None. Returns [batch, tokens, columns], or
        [batch, tokens, kv_width] projected up, of which a tensor rank computes its columns.
        """
        values = self._rows(rows).to(dtype)
        if pattern is not None:
            values = values * pattern[..., slice(*self.columns)]
        return values if self.up is None else self.up(values)

    def _rows(self, rows: torch.Tensor) -> torch.Tensor:
        if self._read is not None:
            return self._read(rows)
        if self.weight is None:
            raise RuntimeError(f"{self.place.name} has neither a weight nor a function that reads its rows")
        return F.embedding(rows.clamp_min(0), self.weight) * (rows >= 0).unsqueeze(-1)


class NgramValues(nn.Module):
    """ids [batch, tokens] -> one tensor of values [batch, tokens, kv_width of this process] per order.

    Runs outside of what a block compiles and recomputes, because tables that are divided over ranks communicate.
    past: see megachat.model.cache.
    """

    def __init__(
        self, dims: Dimensions, hashes: NgramHashes, block: int, dtypes: tuple[torch.dtype, torch.dtype | None]
    ):
        super().__init__()
        ngram, (self.compute_dtype, stored) = hashes.ngram, dtypes
        self.hashes, self.past = hashes, None
        self.tables = nn.ModuleDict(
            {str(order): NgramTable(dims, ngram, block, order, stored) for order in ngram.orders}
        )

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        past: Chunk | None = self.past
        before = None if past is None else past.previous_ids(ids)
        return tuple(
            table(*self.hashes(ids, int(order), before), self.compute_dtype) for order, table in self.tables.items()
        )
