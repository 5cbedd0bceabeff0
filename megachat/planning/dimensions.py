"""Computes parameters, FLOPs and pipeline stages from a model's dimensions alone; no tensor is made."""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Literal, get_args

from megachat.errors import UserError

VOCAB_MULTIPLE = 64
LARGEST_ORDER = 8  # of n-grams
MLP_RATIO = 4
SMEAR_CHANNELS = 24
GATE_CHANNELS = 12
WINDOW_TILE = 128  # short windows are multiples of the attention kernels' tile
NORM_EPSILON = 1.1920929e-07
ROTARY_BASE = 100_000.0
QK_SCALE = 1.2
Norm = Literal["embedding", "attention", "mlp", "query", "key", "final"]
NORMS: tuple[Norm, ...] = get_args(Norm)  # that can have a learned scale, in the order of the model
_BLOCK_NORMS: tuple[Norm, ...] = ("attention", "mlp", "query", "key")
ROW_REACH = 10  # the longest row that a model takes, relative to sequence_len: nanochat's rotary tables are as long
FP8_TILES = {"tensorwise": 16, "blockwise": 128}  # divide both sides of an FP8 weight and the tokens that it multiplies
FP8_LEAST_SIDE = 128  # rounding smaller matrices costs more than FP8 saves


def up_to_multiple(value: int, multiple: int) -> int:
    """Returns the smallest multiple that is not below `value`."""
    return -(-value // multiple) * multiple


@dataclass(frozen=True)
class LookupDimensions:
    """Lookup layers (L3, arXiv 2601.21461), each at the end of a block.

    blocks: ascending. rows: of each layer's table. up_width: channels of W_up's output. tied: the keys are the values.
    score_scale: "none", or "sqrt" for 1 / sqrt(width). rows_per_token: the rows of each token, integers separated by
    spaces, which JSON keeps on one line; "" until they are allocated. mean_rows: rows that a token of the text has, by
    its frequency in the sample of the allocation; the most that a token may have until they are allocated.
    """

    blocks: tuple[int, ...]
    rows: int
    up_width: int
    tied: bool
    score_scale: Literal["none", "sqrt"]
    mean_rows: float
    rows_per_token: str = field(default="", repr=False)

    @property
    def table_rows(self) -> int:
        """Returns the rows of a layer's tables together, keys and values."""
        return self.rows * (1 if self.tied else 2)

    def first_rows(self) -> tuple[int, ...]:
        """Returns offsets [vocabulary + 1]: token t has the rows from offset t to offset t + 1; () until they are
        allocated.
        """
        return (0, *accumulate(map(int, self.rows_per_token.split()))) if self.rows_per_token else ()


@dataclass(frozen=True)
class NgramDimensions:
    """Hashed n-gram values (megachat/model/ngram.py), added to the attention values of some blocks.

    blocks, orders: ascending; each block has a table [rows, width] per order. A width below kv_width is projected up.
    sign_trick: whether rows are multiplied by signs. seed: of the hashes. bos: the id that begins a document.
    """

    blocks: tuple[int, ...]
    orders: tuple[int, ...]
    rows: int
    width: int
    sign_trick: bool
    seed: int
    bos: int


@dataclass(frozen=True)
class Dimensions:
    """The sizes that define a model. windows[i]: how many earlier positions block i's queries see (sequence_len: all).

    The defaults are nanochat's choices. Its first version, which transformers' NanoChat computes, has no value
    embeddings and no scale on normed queries and keys. It has no residual mix, smear or backout either, which "neutral"
    lambdas leave without effect. norm_scales: the norms with a learned scale per channel, in the order of NORMS;
    nanochat has none.
    """

    depth: int
    width: int
    heads: int
    kv_heads: int
    head_size: int
    sequence_len: int
    vocab_size: int
    windows: tuple[int, ...]
    rotary_base: float = ROTARY_BASE
    qk_scale: float = QK_SCALE
    norm_epsilon: float = NORM_EPSILON
    value_embeddings: bool = True
    lambdas: Literal["learned", "neutral"] = "learned"
    norm_scales: tuple[Norm, ...] = ()
    lookup: LookupDimensions | None = None
    ngram: NgramDimensions | None = None

    @property
    def padded_vocab(self) -> int:
        """Returns the rows of the tables."""
        return up_to_multiple(self.vocab_size, VOCAB_MULTIPLE)

    @property
    def longest_row(self) -> int:
        """Returns the most tokens of a row that the model can compute. Windows stay those of sequence_len."""
        return ROW_REACH * self.sequence_len

    @property
    def kv_width(self) -> int:
        """Returns the channels of all key/value heads."""
        return self.kv_heads * self.head_size

    @property
    def largest_logit(self) -> float:
        """Returns the largest attention logit of queries and keys that are normed and have no learned scale."""
        return self.qk_scale**2 * math.sqrt(self.head_size)

    def has_value_embedding(self, block: int) -> bool:
        """Returns whether the block has one: every other block and always the last, if the model has any."""
        return self.value_embeddings and block % 2 == (self.depth - 1) % 2

    def has_lookup(self, block: int) -> bool:
        """Returns whether the block ends with a lookup layer."""
        return self.lookup is not None and block in self.lookup.blocks

    def has_ngram(self, block: int) -> bool:
        """Returns whether the block has n-gram values."""
        return self.ngram is not None and block in self.ngram.blocks


def saved_dimensions(model: dict) -> Dimensions:
    """Returns the sizes in a checkpoint's facts, with nanochat's choices for those that older ones do not name.

    Raises UserError for missing or unknown keys.
    """
    known = {entry.name for entry in fields(Dimensions)}
    if unknown := sorted(set(model) - known):
        raise UserError(f"the checkpoint's model has {unknown[0]}, which this version does not know: update megachat")
    try:
        lookup = model.get("lookup") and LookupDimensions(
            **(model["lookup"] | {"blocks": tuple(model["lookup"]["blocks"])})
        )
        ngram = model.get("ngram") and NgramDimensions(
            **(model["ngram"] | {key: tuple(model["ngram"][key]) for key in ("blocks", "orders")})
        )
        changed = {"windows": tuple(model["windows"]), "norm_scales": tuple(model.get("norm_scales", ()))}
        dims = Dimensions(**(model | changed | {"lookup": lookup, "ngram": ngram}))
        sizes = [getattr(dims, entry.name) for entry in fields(Dimensions) if entry.type is int]
        if not all(type(size) is int and size > 0 for size in (*sizes, *dims.windows)):
            raise TypeError("a size is no positive integer")
        if not dims.depth == len(dims.windows) <= 1000 or dims.heads * dims.head_size != dims.width:
            raise TypeError("blocks and windows, or heads and width, do not fit together")
        if not set(dims.norm_scales) <= set(NORMS):
            raise TypeError("a norm with a learned scale is unknown")
        if lookup:
            rows = lookup.first_rows()
            if len(rows) != dims.vocab_size + 1 or rows[-1] != lookup.rows or any(a >= b for a, b in pairwise(rows)):
                raise TypeError("it has no allocation of lookup rows that fits table and vocabulary")
        return dims
    except (TypeError, KeyError, ValueError) as error:
        raise UserError(f"the checkpoint lacks sizes of its model ({error}): use another checkpoint") from None


def window_sizes(pattern: str, depth: int, sequence_len: int, short_share: float = 0.25) -> tuple[int, ...]:
    """Tiles the pattern's letters over the blocks: L the whole row, S a share of it in whole tiles; the last block is
    always L.
    """
    short = up_to_multiple(math.ceil(sequence_len * short_share), WINDOW_TILE)
    sizes = [{"L": sequence_len, "S": short}[pattern[block % len(pattern)]] for block in range(depth)]
    return (*sizes[:-1], sequence_len)


def block_matrices(dims: Dimensions, block: int) -> list[tuple[int, int]]:
    """Returns the whole shapes [rows, columns] of Muon's matrices in a block."""
    orders = len(dims.ngram.orders) if dims.ngram and dims.has_ngram(block) else 0
    gates = [(dims.kv_heads, GATE_CHANNELS)] * (dims.has_value_embedding(block) + orders)
    shapes = [*linear_shapes(dims).values(), *gates]
    if dims.lookup and dims.has_lookup(block):
        shapes += lookup_shapes(dims, dims.lookup)
    if dims.ngram and dims.ngram.width < dims.kv_width:
        shapes += [(dims.kv_width, dims.ngram.width)] * orders
    return shapes


@lru_cache(maxsize=1024)
def _matrix_elements(dims: Dimensions) -> tuple[int, ...]:
    """Returns the elements of each block's matrices."""
    return tuple(sum(map(math.prod, block_matrices(dims, block))) for block in range(dims.depth))


def norm_scale_shape(dims: Dimensions, norm: Norm) -> tuple[int, ...]:
    """Returns the shape of a norm's learned scale: a number per channel, those of queries and keys by head."""
    heads = {"query": dims.heads, "key": dims.kv_heads}.get(norm)
    return (dims.width,) if heads is None else (heads, dims.head_size)


def _norm_scale_elements(dims: Dimensions, norms: tuple[Norm, ...]) -> int:
    """Returns the elements of the learned scales of those of the norms that have one."""
    return sum(math.prod(norm_scale_shape(dims, norm)) for norm in norms if norm in dims.norm_scales)


def ngram_elements(dims: Dimensions, block: int) -> int:
    """Returns the elements of a block's n-gram tables."""
    ngram = dims.ngram
    return len(ngram.orders) * ngram.rows * ngram.width if ngram and dims.has_ngram(block) else 0


def lookup_flops(dims: Dimensions, block: int) -> int:
    """Returns a block's training FLOPs per token for reading its lookup tables: 12 x mean rows x width.

    Forward: a product of the query with each key row and a weighted sum of the value rows, 2 x width each; backward
    takes twice as much. What the kernel computes again in the backward pass is not counted, as in attention.
    """
    return round(12 * dims.lookup.mean_rows * dims.width) if dims.lookup and dims.has_lookup(block) else 0


def _attention_flops(dims: Dimensions, block: int) -> int:
    """Returns a block's training FLOPs per token for attention: 12 x heads x head_size x visible keys (PaLM, arXiv
    2204.02311).
    """
    return 12 * dims.heads * dims.head_size * min(dims.windows[block], dims.sequence_len)


def parameter_counts(dims: Dimensions) -> dict[str, int]:
    """Returns the elements by kind: wte, value_embeds, lookup_tables, ngram, lm_head, matrices (Muon's), scalars,
    norm_scales, total.
    """
    tables = {group: sum(sizes) for group, sizes in adamw_tables(dims, 0, dims.depth + 2).items()}
    counts = {
        "wte": tables["embedding"],
        "value_embeds": tables["value_embedding"],
        "lookup_tables": tables["lookup"],
        "ngram": sum(ngram_elements(dims, block) for block in range(dims.depth)),
        "lm_head": tables["unembedding"],
        "matrices": sum(_matrix_elements(dims)),
        "scalars": 2 * dims.depth + SMEAR_CHANNELS + 2,
        "norm_scales": _norm_scale_elements(dims, ("embedding", "final"))
        + dims.depth * _norm_scale_elements(dims, _BLOCK_NORMS),
    }
    return counts | {"total": sum(counts.values())}


def blocks_of(dims: Dimensions, first: int, last: int) -> range:
    """Returns the blocks in the layers [first, last): layer 0 embeds, the blocks follow, then the head."""
    return range(max(first, 1) - 1, min(last, dims.depth + 1) - 1)


def adamw_tables(dims: Dimensions, first: int, last: int, tensor: int = 1) -> dict[str, list[int]]:
    """Returns the elements of each AdamW table in the layers [first, last) by optimizer group, on one of `tensor` ranks
    of the tensor axis. lm_head ("unembedding") is float32, the others have the dtype of tables.
    """
    blocks, table = blocks_of(dims, first, last), dims.padded_vocab * dims.width // tensor
    values = dims.padded_vocab * dims.kv_width // tensor
    return {
        "embedding": [table] if first == 0 else [],
        "value_embedding": [values for block in blocks if dims.has_value_embedding(block)],
        "lookup": [
            dims.lookup.table_rows * dims.width // tensor for block in blocks if dims.lookup and dims.has_lookup(block)
        ],
        "unembedding": [table] if last == dims.depth + 2 else [],
    }


@lru_cache(maxsize=1024)
def layer_costs(dims: Dimensions, grid: int = 1) -> tuple[tuple[int, int], ...]:
    """Returns (parameters, training FLOPs per token) of each layer: the embedding, every block with its tables, the
    head.

    grid: the ranks of a pipeline stage, over which n-gram tables are divided: the share of one rank is counted.
    """
    table = dims.padded_vocab * dims.width
    scales = _norm_scale_elements(dims, _BLOCK_NORMS)
    costs = [(table + SMEAR_CHANNELS + 1 + _norm_scale_elements(dims, ("embedding",)), 6 * SMEAR_CHANNELS)]
    for block, matrices in enumerate(_matrix_elements(dims)):
        tables = sum(map(sum, adamw_tables(dims, block + 1, block + 2).values())) + ngram_elements(dims, block) // grid
        flops = 6 * matrices + _attention_flops(dims, block) + lookup_flops(dims, block)
        costs.append((matrices + 2 + scales + tables, flops))
    return *costs, (table + 1 + _norm_scale_elements(dims, ("final",)), 6 * table)


@lru_cache(maxsize=1024)
def resolve_stages(dims: Dimensions, stages: int, grid: int = 1) -> tuple[tuple[int, int], ...]:
    """Returns the layers [first, last) of each pipeline stage that minimize the largest cost of a stage.

    The cost is the share of all FLOPs plus the share of all parameters: the busiest stage sets the time, the fullest
    must fit its memory. grid: see layer_costs.
    """
    costs = layer_costs(dims, grid)
    all_parameters, all_flops = (sum(cost[kind] for cost in costs) for kind in (0, 1))
    sums = [0.0]
    for parameters, flops in costs:
        sums.append(sums[-1] + (parameters / all_parameters + flops / all_flops))
    # best[count][last]: (the smallest largest cost when layers [0, last) form `count` stages, where the last stage
    # begins)
    best = [{0: (0.0, 0)}]
    for count in range(1, stages + 1):
        best.append({})
        for last in range(count, len(costs) - (stages - count) + 1):
            best[count][last] = min(
                (max(best[count - 1][first][0], sums[last] - sums[first]), first)
                for first in best[count - 1]
                if first < last
            )
    cuts = [len(costs)]
    for count in range(stages, 0, -1):
        cuts.append(best[count][cuts[-1]][1])
    return tuple(pairwise(reversed(cuts)))


def bubble_share(stage_flops: list[int], micro_batches: int) -> float:
    """Returns the share of a 1F1B step (PipeDream, arXiv 2006.09503) in which a rank waits, averaged over stages, by
    FLOPs alone.
    """
    total = sum(stage_flops)
    return 1 - micro_batches * total / len(stage_flops) / ((micro_batches - 1) * max(stage_flops) + total)


def scaling_parameters(dims: Dimensions) -> int:
    """Returns block matrices plus lm_head, the count that gives nanochat its cleanest scaling laws."""
    counts = parameter_counts(dims)
    return counts["matrices"] + counts["lm_head"]


def flops_per_token(dims: Dimensions) -> int:
    """Returns the training FLOPs per token: 6 per matmul parameter, attention's, and those of reading lookup tables."""
    reads = sum(_attention_flops(dims, block) + lookup_flops(dims, block) for block in range(dims.depth))
    return 6 * (scaling_parameters(dims) + SMEAR_CHANNELS) + reads


def fits_fp8(rows: int, columns: int, recipe: str) -> bool:
    """Returns whether a rank's weight [rows, columns] can be multiplied in FP8; others stay in the compute dtype."""
    return min(rows, columns) >= FP8_LEAST_SIDE and not (rows % FP8_TILES[recipe] or columns % FP8_TILES[recipe])


def check_fp8_multiples(tokens: int, weight: tuple[int, ...], tile: int) -> None:
    """Raises ValueError unless the tokens and both sides of the weight are multiples of the tile."""
    if any(size % tile for size in (tokens, *weight)):
        raise ValueError(f"FP8 needs multiples of {tile}: {tokens} tokens, weight {tuple(weight)}")


def linear_shapes(dims: Dimensions, tensor: int = 1) -> dict[str, tuple[int, int]]:
    """Returns the weights [rows, columns] of a block's linears except the gate, on each of `tensor` ranks of the tensor
    axis.
    """
    inner, hidden = dims.heads * dims.head_size // tensor, MLP_RATIO * dims.width // tensor
    return {
        "attn.c_q": (inner, dims.width),
        "attn.c_k": (dims.kv_width // tensor, dims.width),
        "attn.c_v": (dims.kv_width // tensor, dims.width),
        "attn.c_proj": (dims.width, inner),
        "mlp.c_fc": (hidden, dims.width),
        "mlp.c_proj": (dims.width, hidden),
    }


def lookup_shapes(dims: Dimensions, lookup: LookupDimensions, tensor: int = 1) -> list[tuple[int, int]]:
    """Returns the weights [rows, columns] of a lookup layer's linears on each of `tensor` ranks of the tensor axis."""
    up = lookup.up_width // tensor
    return [(up, dims.width), (dims.width, up), (dims.width, dims.width // tensor)]


def head_fits_fp8(dims: Dimensions, tensor: int, recipe: str) -> bool:
    """Returns whether every rank's rows of lm_head, without padding, can be multiplied in FP8."""
    tile = FP8_TILES[recipe]
    return fits_fp8(dims.padded_vocab // tensor, dims.width, recipe) and not (
        dims.padded_vocab % (tile * tensor) or dims.vocab_size % tile
    )


def balanced_cuts(first: Sequence[int], ranks: int) -> tuple[int, ...]:
    """Cuts a table whose token t has the rows first[t] .. first[t + 1] - 1 between tokens, with balanced rows.

    Returns `ranks` + 1 row offsets; rank r holds the rows from offset r to offset r + 1. A rank may hold none, because
    the rows of a token stay on one rank.
    """
    cuts = []
    for rank in range(ranks + 1):
        ideal = int(first[-1]) * rank / ranks
        after = bisect_left(first, ideal)
        cuts.append(min((int(first[max(0, after - 1)]), int(first[after])), key=lambda cut: abs(cut - ideal)))
    return tuple(cuts)


def passed_tensors(dims: Dimensions, layer: int) -> int:
    """Returns how many tensors of the stream's size a layer receives from another stage.

    These are x, x0 unless only the head follows, and x_backout after the middle block.
    """
    return 1 + (layer <= dims.depth) + (layer - 1 > dims.depth // 2)
