"""Lookup layers (L3: Large Lookup Layers, arXiv 2601.21461)."""

import torch
from torch import nn

from megachat.kernels.channel_norm import ChannelNorm, norm
from megachat.kernels.linear import Linear, Table
from megachat.kernels.lookup import TableRows, lookup_attention
from megachat.model.parameters import declare
from megachat.place import Place, place_of, set_place
from megachat.planning.dimensions import Dimensions, LookupDimensions


class LookupRead(nn.Module):
    """Reads each token's rows of a lookup table. The table is divided over the tensor axis between tokens."""

    def __init__(self, dims: Dimensions, lookup: LookupDimensions, dtype: torch.dtype, block: int):
        super().__init__()
        first = lookup.first_rows()
        self.scale = dims.width**-0.5 if lookup.score_scale == "sqrt" else 1.0
        self.keys = Table(lookup.rows, dims.width, dtype)
        self.values = None if lookup.tied else Table(lookup.rows, dims.width, dtype)
        for kind, table in (("keys", self.keys), ("values", self.values)):
            if table is not None:
                name, whole = f"lookup.{block}.{kind}.weight", tuple(table.weight.shape)
                set_place(table.weight, Place(name, whole, block, ("normal", 1.0), "tokens", first_rows=first))
        self.first = torch.tensor(first, dtype=torch.int64, device="cpu")  # no buffer: the kernel reads it on the CPU

    def forward(self, query: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """query [batch, tokens, width], normed; ids [batch, tokens]. Returns what each token reads, like query."""
        keys = self.keys.weight
        values = keys if self.values is None else self.values.weight
        offset = place_of(keys).offset
        return lookup_attention(query, keys, values, ids, TableRows(self.first, *offset[:1]), self.scale)


class LookupMix(nn.Module):
    """W_mix [norm(W_up read); x] of the concatenation (read, x). W_mix is stored as its two parts, so that the tensor
    axis divides both evenly.
    """

    def __init__(self, dims: Dimensions, lookup: LookupDimensions, block: int):
        super().__init__()
        self.w_up, self.norm = Linear(dims.width, lookup.up_width), ChannelNorm(lookup.up_width, dims.norm_epsilon)
        self.w_mix_up, self.w_mix_x = Linear(lookup.up_width, dims.width), Linear(dims.width, dims.width)
        bound = (3 / dims.width) ** 0.5
        declare(self.w_up.weight, f"lookup.{block}.w_up.weight", block, ("uniform", -bound, bound), "column")
        for name, linear in (("w_mix_up", self.w_mix_up), ("w_mix_x", self.w_mix_x)):  # zero: no effect at the start
            declare(linear.weight, f"lookup.{block}.{name}.weight", block, ("constant", 0.0), "row")

    def forward(self, read_and_x: torch.Tensor) -> torch.Tensor:
        """read_and_x [batch, tokens, 2 * width] -> [batch, tokens, width]."""
        read, x = read_and_x.chunk(2, dim=-1)
        weight = self.w_mix_x.weight
        offset = place_of(weight).offset
        begin = offset[1] if offset else 0  # the channels of x that this tensor rank multiplies
        return self.w_mix_up(self.norm(self.w_up(read))) + self.w_mix_x(x[..., begin : begin + weight.size(1)])


class Lookup(nn.Module):
    """A lookup layer (L3, arXiv 2601.21461): x + W_mix [norm(W_up read); x], where a token's query norm(x) reads the
    table rows of its id.
    """

    def __init__(self, dims: Dimensions, lookup: LookupDimensions, dtype: torch.dtype, block: int):
        super().__init__()
        self.norm_epsilon = dims.norm_epsilon
        self.read, self.mix = LookupRead(dims, lookup, dtype, block), LookupMix(dims, lookup, block)

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """x [batch, tokens, width]; ids [batch, tokens]."""
        return x + self.mix(torch.cat((self.read(norm(x, self.norm_epsilon), ids), x), dim=-1))
