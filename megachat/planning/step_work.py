"""Counts the work of a training step on one rank: matrix products by shape, attention, bytes that elementwise kernels
move, logits, collectives. From config and plan alone. Pure; no torch.
"""

import functools
from collections import Counter
from typing import Any, NamedTuple

from megachat.config import Config
from megachat.optim.matrix import Matrix
from megachat.optim.owners import lightest_makespan
from megachat.planning.communication import Kind
from megachat.planning.dimensions import (
    MLP_RATIO,
    Dimensions,
    adamw_tables,
    block_matrices,
    blocks_of,
    fits_fp8,
    head_fits_fp8,
    linear_shapes,
    lookup_shapes,
)
from megachat.planning.plan import Plan, stream_tokens

ITEMSIZE = {"bfloat16": 2, "float16": 2, "float32": 4}
# Tensors of [tokens, channels] that the kernels of a block read and write in a micro-batch, counted from
# megachat/model/gpt.py: eager, and as torch.compile fuses them. Backward kernels read and write about twice as much.
# stream: tensors of the model's width. heads: of the query heads; key/value heads have as many for keys, fewer for
# values. hidden: of the MLP's hidden width.
PASSES = {
    False: {"stream": 19.0, "heads": 13.0, "values": 8.0, "hidden": 4.0},
    True: {"stream": 11.0, "heads": 2.0, "values": 3.0, "hidden": 2.0},
}
BACKWARD_RATIO = 2.0  # bytes of the backward pass relative to the forward pass
FP8_BYTES = 5  # per element that is rounded to FP8: read twice in two bytes (largest magnitude, value), written in one
_MOST_STAGES = 4096  # in the cache
_stages: dict[tuple, tuple["Work", "Work"]] = {}
KERNELS_PER_BLOCK = {False: 150, True: 50}  # launches of forward and backward


def muon_dtype(dtype: str) -> str:
    """Returns the dtype of Muon's weights, updates and directions, and of what is sent of it. dtype: of activations."""
    return "bfloat16" if dtype == "bfloat16" else "float32"


class Gemm(NamedTuple):
    """`count` products of [rows, inner] with [inner, columns] in a dtype of ITEMSIZE or "float8"."""

    rows: int
    columns: int
    inner: int
    dtype: str
    count: float = 1  # type: ignore[assignment]  # a tuple has a method count


class AttentionWork(NamedTuple):
    """Attention of rows of `tokens` tokens. forward, backward: how often each pass runs, summed over blocks."""

    rows: int
    tokens: int
    heads: int
    kv_heads: int
    head_size: int
    window: int
    dtype: str
    forward: float
    backward: float


class Collective(NamedTuple):
    """`count` collectives of `size` bytes (of the whole tensor) over an axis."""

    kind: Kind
    size: float
    axis: str
    count: float = 1  # type: ignore[assignment]  # a tuple has a method count


class Work(NamedTuple):
    """Work of a micro-batch, forward and backward, on a rank.

    moved: bytes of elementwise kernels on activations. streamed: bytes of kernels on whole parameters and tables, which
    no cache holds. logits: numbers of the head's output that the loss reads. kernels: launches.
    """

    products: tuple[Gemm, ...] = ()
    attention: tuple[AttentionWork, ...] = ()
    moved: float = 0.0
    streamed: float = 0.0
    logits: float = 0.0
    collectives: tuple[Collective, ...] = ()
    kernels: float = 0.0

    def plus(self, other: "Work") -> "Work":
        """Returns the sum."""
        sums: Any = [mine + theirs for mine, theirs in zip(self, other, strict=True)]  # type: ignore[operator]
        return Work(*sums)


def _linear(tokens: int, shape: tuple[int, int], dtype: str, recipe: str, forward: float = 1) -> Work:
    """Returns the products of a linear's passes, with rounding to FP8 where it fits. forward: forward passes."""
    (rows, columns), moved = shape, 0.0
    if recipe != "off" and fits_fp8(rows, columns, recipe):
        rounded = forward * (tokens * columns + rows * columns) + tokens * rows
        dtype, moved = "float8", FP8_BYTES * rounded
    return Work(_weight_products(tokens, shape, dtype, forward), moved=moved)


def _weight_products(tokens: int, shape: tuple[int, int], dtype: str, forward: float = 1) -> tuple[Gemm, ...]:
    """Returns the products of a weight [rows, columns]: forward, and for the gradients of its input and of itself."""
    rows, columns = shape
    return (
        Gemm(tokens, rows, columns, dtype, forward),
        Gemm(tokens, columns, rows, dtype),
        Gemm(rows, columns, tokens, dtype),
    )


def block_work(config: Config, plan: Plan, block: int, dtype: str) -> Work:
    """Returns the work of a block in a micro-batch. dtype: of activations, a key of ITEMSIZE."""
    dims, layout, recompute = plan.dims, plan.layout, config.batch.recompute
    tensor, size = layout.tensor, ITEMSIZE[dtype]
    tokens, local = plan.micro_tokens, stream_tokens(config, plan)
    recipe, whole = config.precision.fp8, recompute == "block"
    forwards = 2 if whole else 1
    passes = PASSES[config.precision.compile]
    work = Work(kernels=KERNELS_PER_BLOCK[config.precision.compile] * (4 / 3 if whole else 1))
    for name, shape in linear_shapes(dims, tensor).items():
        # a recomputed pass ends with the last tensor that backward needs: the last product is repeated only in FP8,
        # which saves rounded factors after its product
        last = name == "mlp.c_proj" and not (whole and dims.has_lookup(block))
        again = (whole or (recompute == "selective" and name.startswith("mlp"))) and (
            not last or (recipe != "off" and fits_fp8(*shape, recipe))
        )
        work = work.plus(_linear(tokens, shape, dtype, recipe, 2 if again else 1))
    inner, kv_inner = dims.heads * dims.head_size // tensor, dims.kv_width // tensor
    stream = passes["stream"] * local * dims.width + passes["heads"] * tokens * (inner + kv_inner)
    if dims.has_value_embedding(block):
        stream += passes["values"] * tokens * kv_inner
    hidden = passes["hidden"] * tokens * MLP_RATIO * dims.width // tensor
    forward = stream * forwards + hidden * (1 if recompute == "none" else 2)
    attention = AttentionWork(
        plan.micro_rows,
        dims.sequence_len,
        dims.heads // tensor,
        max(1, dims.kv_heads // tensor),
        dims.head_size,
        min(dims.windows[block], dims.sequence_len),
        dtype,
        forward=forwards,
        backward=1,
    )
    # Two regions of the tensor axis: each forward pass gathers where it enters one and sums where it leaves one, the
    # backward pass the other way round. A repeated pass leaves the last region only if a lookup layer follows; a
    # repeated MLP never does.
    unused_sums = int(whole and not dims.has_lookup(block))
    gathers = 2 * forwards + 2 + (recompute == "selective")
    work = work._replace(
        attention=(attention,),
        moved=work.moved + size * (forward + BACKWARD_RATIO * (stream + hidden)),
        streamed=_parameter_bytes(dims, block, tensor, dtype),
        collectives=_tensor_collectives(config, plan, size, gathers, 2 * forwards + 2 - unused_sums),
    )
    if dims.has_lookup(block):
        work = work.plus(_lookup_work(config, plan, dtype, forwards))
    return work.plus(_ngram_work(config, plan, dtype)) if dims.has_ngram(block) else work


def _tensor_collectives(config: Config, plan: Plan, size: int, gathers: int, sums: int) -> tuple[Collective, ...]:
    """Returns the collectives on the stream where passes enter and leave regions of the tensor axis.

    sums: over the ranks; parallel.sequence makes them reduce-scatters. gathers: only with parallel.sequence.
    """
    if plan.layout.tensor == 1:
        return ()
    stream = plan.micro_tokens * plan.dims.width * size
    if config.parallel.sequence:
        gather = Collective("all_gather", stream, "tensor", gathers)
        return gather, Collective("reduce_scatter", stream, "tensor", sums)
    return (Collective("all_reduce", stream, "tensor", sums),)


def _parameter_bytes(dims: Dimensions, block: int, tensor: int, dtype: str) -> float:
    """Returns the bytes of a micro-batch's kernels on a block's parameters: gradients of matrices added to float32
    buckets, and gradients of value embeddings, zeroed, written and added to float32 sums."""
    size = ITEMSIZE[dtype]
    matrices = sum(rows * columns for rows, columns in linear_shapes(dims, tensor).values())
    table = dims.padded_vocab * dims.kv_width // tensor if dims.has_value_embedding(block) else 0
    return matrices * (size + 8) + table * (2 * size + 8)


def _lookup_work(config: Config, plan: Plan, dtype: str, forward: int) -> Work:
    """Returns the work of a lookup layer: its linears, its norms, reading its rows, and the gradient of its tables."""
    dims, tensor, size = plan.dims, plan.layout.tensor, ITEMSIZE[dtype]
    lookup = dims.lookup
    assert lookup is not None
    tokens = plan.micro_tokens
    work = Work()
    *repeated, last = lookup_shapes(dims, lookup, tensor)
    for shape in repeated:
        work = work.plus(_linear(tokens, shape, dtype, config.precision.fp8, forward))
    rounded = config.precision.fp8 != "off" and fits_fp8(*last, config.precision.fp8)
    work = work.plus(_linear(tokens, last, dtype, config.precision.fp8, forward if rounded else 1))  # as in block_work
    tables = lookup.table_rows * dims.width // tensor
    # the products of a query with its rows: as a matrix-vector product per token, so it is the rows' bytes that count
    read = tokens * lookup.mean_rows * dims.width * size * (2 * forward + 4) / tensor
    channels = tokens * (4 * dims.width + 3 * lookup.up_width // tensor) * (forward + BACKWARD_RATIO)
    # as in block_work, and a repeated pass never leaves the last region
    collectives = _tensor_collectives(config, plan, size, 2 * forward + 2, 2 * forward + 2 - (forward - 1))
    # the second region is entered with what was read beside the stream, both of the stream's width
    collectives += _tensor_collectives(config, plan, size, forward, 1)
    return work._replace(
        moved=work.moved + read + channels * size,
        streamed=tables * (2 * size + 12),
        collectives=collectives,
        kernels=KERNELS_PER_BLOCK[False],
    )


def _ngram_work(config: Config, plan: Plan, dtype: str) -> Work:
    """Returns the work of a block's n-gram values: rows read from the ranks that store them, gates, and gradients."""
    dims, layout, size = plan.dims, plan.layout, ITEMSIZE[dtype]
    ngram = dims.ngram
    assert ngram is not None
    tokens, orders = plan.micro_tokens, len(ngram.orders)
    work = Work()
    if ngram.width < dims.kv_width:
        for _ in ngram.orders:
            work = work.plus(
                _linear(tokens, (dims.kv_width // layout.tensor, ngram.width), dtype, config.precision.fp8)
            )
    # hashes, the search for distinct rows, rows read, scattered back, signs and gates
    moved = orders * tokens * (ngram.width * size * (6 + 8) + dims.kv_width // layout.tensor * size * 8 + 8 * 40)
    collectives: tuple[Collective, ...] = ()
    if layout.data * layout.tensor > 1:
        share = min(1.0, ngram.rows / tokens) * tokens
        collectives = (
            Collective("all_to_all", 8 * share * orders, "stage"),
            Collective("all_to_all", ngram.width * size * share * orders, "stage", 2),
        )
    return work._replace(moved=work.moved + moved, collectives=collectives, kernels=60 * orders)


def embedding_work(config: Config, plan: Plan, dtype: str) -> Work:
    """Returns the work of the embedding: reading, norm and smear, and the gradient of the table."""
    dims, tensor, size = plan.dims, plan.layout.tensor, ITEMSIZE[dtype]
    tokens = plan.micro_tokens
    table = dims.padded_vocab * dims.width // tensor
    work = Work(
        moved=tokens * dims.width * size * 14 * (1 + BACKWARD_RATIO), streamed=table * (2 * size + 8), kernels=40
    )
    if tensor > 1:
        # whole: the smear needs each token's neighbor
        stream = Collective("all_reduce", tokens * dims.width * size, "tensor")
        gather = (stream._replace(kind="all_gather"),) if config.parallel.sequence else ()
        work = work._replace(collectives=(stream, *gather))
    return work


def head_work(config: Config, plan: Plan, dtype: str) -> Work:
    """Returns the work of head and loss: the products, the logits, and the gradient of the table."""
    dims, tensor, size = plan.dims, plan.layout.tensor, ITEMSIZE[dtype]
    tokens, columns = plan.micro_tokens, dims.padded_vocab // tensor
    precision = config.precision
    kind = dtype
    if precision.fp8 != "off" and precision.fp8_head and head_fits_fp8(dims, tensor, precision.fp8):
        kind = "float8"
    rounding = FP8_BYTES * (tokens * (dims.width + columns) + 2 * columns * dims.width) if kind == "float8" else 0
    return Work(
        _weight_products(tokens, (columns, dims.width), kind),
        moved=stream_tokens(config, plan) * dims.width * size * 8 * (1 + BACKWARD_RATIO) + rounding,
        streamed=columns * dims.width * (4 + size + 4 + 12),
        logits=tokens * columns,
        collectives=_tensor_collectives(config, plan, size, 1, 1),
        kernels=40,
    )


def stage_work(config: Config, plan: Plan, stage: int, dtype: str) -> tuple[Work, Work]:
    """Returns the work of a pipeline stage in a micro-batch: of its embedding and blocks, and of the head (empty on
    other stages than the last). Cached, because a search counts the same stages often."""
    dims, layout, (first, last) = plan.dims, plan.layout, plan.stages[stage]
    # everything that the work depends on
    sizes = layout.tensor, layout.data * layout.tensor > 1, plan.micro_rows, config.parallel.sequence
    key = dims, sizes, config.batch.recompute, config.precision, first, last, dtype
    if key not in _stages:
        if len(_stages) >= _MOST_STAGES:
            _stages.clear()
        _stages[key] = _stage_work(config, plan, first, last, dtype)
    return _stages[key]


def _stage_work(config: Config, plan: Plan, first: int, last: int, dtype: str) -> tuple[Work, Work]:
    dims = plan.dims
    work = embedding_work(config, plan, dtype) if first == 0 else Work()
    kinds: dict[tuple, Work] = {}
    for block in blocks_of(dims, first, last):
        key = dims.windows[block], dims.has_value_embedding(block), dims.has_lookup(block), dims.has_ngram(block)
        kinds.setdefault(key, block_work(config, plan, block, dtype))
        work = work.plus(kinds[key])
    head = head_work(config, plan, dtype) if last == dims.depth + 2 else Work()
    return work, head


class OptimizerWork(NamedTuple):
    """The optimizer step of a stage's busiest rank.

    matrices: (rows, columns, count) that it orthogonalizes, whole. shard: Muon's elements that it stores. adamw:
    elements of AdamW's parameters on the rank, by bytes of their dtype. exchanged: bytes of the largest exchange of a
    rank with owners, both ways. reduced: elements of Muon on the rank, over the data axis.
    """

    matrices: tuple[tuple[int, int, float], ...]
    shard: float
    adamw: dict[int, int]
    exchanged: float
    reduced: int


@functools.lru_cache(maxsize=4096)
def stage_matrices(dims: Dimensions, first: int, last: int) -> tuple[tuple[int, int], ...]:
    """Returns the whole shapes of Muon's matrices in the layers [first, last)."""
    return tuple(shape for block in blocks_of(dims, first, last) for shape in block_matrices(dims, block))


@functools.lru_cache(maxsize=4096)
def _busiest_rank(shapes: tuple[tuple[int, int], ...], ranks: int) -> tuple[tuple[int, int, float], ...]:
    """Returns what the busiest rank orthogonalizes: the mean of all ranks, scaled to the load of a balanced
    assignment."""
    if not shapes:
        return ()
    costs = [Matrix("", shape, 0).flops for shape in shapes]
    scale = lightest_makespan(costs, ranks) / sum(costs)
    return tuple((*shape, count * scale) for shape, count in Counter(shapes).items())


def optimizer_work(plan: Plan, stage: int, dtype: str) -> OptimizerWork:
    """Returns the optimizer's work of a stage's busiest rank, as the Muon partition divides it: matrices balanced by
    their cost, shards equal, tables over the data axis."""
    dims, layout, (first, last) = plan.dims, plan.layout, plan.stages[stage]
    shapes = stage_matrices(dims, first, last)
    whole = sum(rows * columns for rows, columns in shapes)
    elements, grid = whole // layout.tensor, layout.data * layout.tensor
    size = ITEMSIZE[muon_dtype(dtype)]
    # tensor shards travel to the owner and back; over the data axis only matrices that do not divide evenly
    exchanged = 2 * size * whole / grid * (layout.tensor - 1) / layout.tensor
    if layout.data > 1:
        counts = Counter((min(shape), max(shape)) for shape in shapes)
        uneven = sum(count % layout.data * short * long for (short, long), count in counts.items())
        exchanged += 2 * size * uneven / grid
    tables = adamw_tables(dims, first, last, layout.tensor)
    adamw = {4: sum(tables.pop("unembedding"))}
    table_size = ITEMSIZE["float32" if dtype == "float16" else dtype]
    adamw[table_size] = adamw.get(table_size, 0) + sum(map(sum, tables.values()))
    matrices = _busiest_rank(shapes, grid)
    return OptimizerWork(matrices, elements / layout.data, adamw, exchanged, elements)
