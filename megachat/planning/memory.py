"""Estimates the bytes that one rank holds while it trains, by use, from the plan alone: no tensor is made.

Weights, masters, optimizer state and gradients are exact. Activations are what eager torch keeps for the backward pass,
with an attention kernel that keeps no scores and norms that keep their input. They agree within 1 % with what torch's
FakeTensorMode tracks. Workspace is an estimate of what else exists at the peak.
"""

import math
from dataclasses import dataclass

import torch

from megachat.config import Config
from megachat.kernels.cross_entropy import CHUNK_BYTES, GPU_CHUNK_BYTES
from megachat.planning.dimensions import (
    MLP_RATIO,
    Dimensions,
    LookupDimensions,
    NgramDimensions,
    blocks_of,
    fits_fp8,
    linear_shapes,
    lookup_shapes,
    passed_tensors,
    up_to_multiple,
)
from megachat.planning.plan import Plan, stream_tokens
from megachat.planning.row_tables import row_bytes
from megachat.planning.stage_state import StageState, StateCount, stage_state

FILLS = 0.92  # share of a device's memory that a run can use; CUDA, NCCL and gaps between tensors take the rest
MEMORY_USES = ("weights", "masters", "moments", "gradients", "activations", "workspace")  # what Memory.total is
_LOOKUP_WORKSPACE_BYTES = 64 << 20  # of the kernel, whose tests hold it below this
_NEWTON_SCHULZ_BYTES = 24  # per element of the matrix at work: float32 copies, factors of the iteration


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest rank of a pipeline stage, on its device.

    tables: of masters and moments, those of sparse tables. host: of sparse tables in host memory beside a GPU. wire:
    what sparse tables send to other ranks in a step, at most.
    """

    stage: int
    weights: int
    masters: int
    moments: int
    gradients: int
    activations: int
    workspace: int
    tables: int = 0
    host: int = 0
    wire: int = 0

    @property
    def state(self) -> int:
        """Weights, masters and moments, which do not depend on the batch."""
        return self.weights + self.masters + self.moments

    @property
    def total(self) -> int:
        return self.state + self.gradients + self.activations + self.workspace


def memory_of_stages(
    config: Config,
    plan: Plan,
    dtype: torch.dtype,
    *,
    on_gpu: bool = True,
    state_of: StateCount = stage_state,
    device_bytes: int | None = None,
) -> list[Memory]:
    """Returns the memory of the fullest rank of each pipeline stage.

    dtype: of activations. on_gpu: the head works in larger chunks there than on a CPU. state_of: exact, or
    estimated_stage_state, which is much faster. device_bytes: see head_chunk_bytes.
    """
    chunk = head_chunk_bytes(config, plan, dtype, on_gpu=on_gpu, state_of=state_of, device_bytes=device_bytes)
    return [_stage_memory(config, plan, dtype, stage, on_gpu, state_of, chunk) for stage in range(len(plan.stages))]


def head_chunk_bytes(
    config: Config,
    plan: Plan,
    dtype: torch.dtype,
    *,
    on_gpu: bool = True,
    state_of: StateCount = stage_state,
    device_bytes: int | None = None,
) -> int:
    """Returns the bytes of float32 logits that head and loss work on at a time.

    This is precision.head_chunk_mb, by default the device's size. On a GPU whose memory is known it is halved, at most
    four times, where the last stage fits with the smaller chunk only.
    """
    if config.precision.head_chunk_mb:
        return config.precision.head_chunk_mb << 20
    if not on_gpu:
        return CHUNK_BYTES
    last, limit = len(plan.stages) - 1, FILLS * (device_bytes or math.inf)

    def fits(chunk: int) -> bool:
        return _stage_memory(config, plan, dtype, last, on_gpu, state_of, chunk).total <= limit

    chunks = [GPU_CHUNK_BYTES >> halvings for halvings in range(5)]
    if device_bytes is None or fits(chunks[0]) or not fits(chunks[-1]):
        return GPU_CHUNK_BYTES
    return next(chunk for chunk in chunks if fits(chunk))


def _stage_memory(
    config: Config, plan: Plan, dtype: torch.dtype, stage: int, on_gpu: bool, state_of: StateCount, chunk: int
) -> Memory:
    data = plan.layout.data
    state = state_of(config, plan, stage, dtype)
    narrow = dtype == torch.bfloat16  # else float32 weights are their own masters
    activations = stage_activations(config, plan, stage, dtype)
    forward = _forward_workspace(config, plan, stage, dtype, chunk) + _pipeline_buffers(config, plan, stage, dtype)
    forward += 4 * state.largest_adamw  # DeepSpeed's reduction buffer
    if narrow and data > 1:  # gradients of two buckets on the wire, as sent and as received
        forward += 2 * 2 * 2 * data * state.largest_shard
    rows = row_bytes(config, plan, stage, dtype)
    update = _muon_workspace(state, narrow)
    # a CUDA graph keeps its memory, and AdamW's gradients are copied to where it reads them
    kept = update + 4 * state.adamw_shard if config.precision.optimizer_graph else 0
    tables, beside = rows.masters + rows.moments, on_gpu and rows.on_host
    return Memory(
        stage,
        weights=data * (state.adamw_weights + (2 if narrow else 4) * state.shards),
        masters=4 * state.adamw_shard + (4 * state.shards if narrow else 0) + (0 if beside else rows.masters),
        moments=8 * state.adamw_shard + state.muon_moments + (0 if beside else rows.moments),
        gradients=4 * (state.adamw_elements + data * state.shards) + rows.gradients,
        activations=activations,
        # of the passes, or of the optimizer step, when no activation exists: AdamW's flat gradient, or Muon's tensors
        workspace=max(forward, rows.workspace, max(4 * state.largest_share, update) - activations) + kept,
        tables=0 if beside else tables,
        host=tables if beside else 0,
        wire=rows.wire,
    )


def kept_bytes_per_block(
    dims: Dimensions,
    block: int,
    tokens: int,
    *,
    itemsize: int = 2,
    tensor: int = 1,
    sequence: bool = False,
    fp8: str = "off",
    recompute: str = "none",
) -> int:
    """Returns the bytes that a block keeps of a micro-batch of `tokens` tokens for its backward pass on one rank, its
    input included.

    itemsize: of the compute dtype. tensor, sequence: how the tensor axis cuts the block. fp8, recompute: as
    precision.fp8, batch.recompute.
    """
    local = tokens // tensor if sequence else tokens  # tokens of the stream on this rank
    width, heads, kv_heads = dims.width, dims.heads // tensor, dims.kv_heads // tensor
    ngrams = _kept_ngram_bytes(dims, block, tokens, itemsize, kv_heads, fp8)
    if recompute == "block":
        return local * width * itemsize + ngrams
    inner, kv_inner = heads * dims.head_size, kv_heads * dims.head_size
    values = 3 * local * width  # the stream as received, after the residual mix, and after attention
    # queries and keys before and after their norms, values, and attention's result
    values += tokens * (3 * inner + 3 * kv_inner)
    # what the learned scales of queries and keys multiply
    values += tokens * (inner * ("query" in dims.norm_scales) + kv_inner * ("key" in dims.norm_scales))
    if dims.has_value_embedding(block):
        values += tokens * (kv_inner + 2 * kv_heads)
    if dims.ngram and dims.has_ngram(block):
        values += tokens * 2 * kv_heads * len(dims.ngram.orders)
    # the factor of every norm, and attention's sums
    kept = ngrams + values * itemsize + 4 * (local + tokens * (2 * heads + kv_heads))
    shapes = linear_shapes(dims, tensor)
    rounded = {name for name, shape in shapes.items() if fp8 != "off" and fits_fp8(*shape, fp8)}
    same_input = [("attn.c_q", "attn.c_k", "attn.c_v"), ("attn.c_proj",)]
    if recompute == "none":  # the MLP: its norm's factor, what is squared, and the inputs of its linears
        kept += 4 * local + tokens * MLP_RATIO * width // tensor * itemsize
        same_input += [("mlp.c_fc",), ("mlp.c_proj",)]
    for names in same_input:
        columns = shapes[names[0]][1]
        # one tensor for all; the input of attn.c_proj is attention's result. Gates multiply a part of it without FP8
        gated = names[0] == "attn.c_q" and (dims.has_value_embedding(block) or dims.has_ngram(block))
        if names != ("attn.c_proj",) and (gated or not rounded.issuperset(names)):
            kept += tokens * columns * itemsize
        for name in rounded.intersection(names):  # one byte per number of input and weight
            kept += tokens * columns + math.prod(shapes[name])
    if dims.lookup and dims.has_lookup(block):
        kept += _lookup_kept(dims, dims.lookup, tokens, local, itemsize, tensor, fp8)
    return kept


def _kept_ngram_bytes(dims: Dimensions, block: int, tokens: int, itemsize: int, kv_heads: int, fp8: str) -> int:
    """Returns the bytes that a block keeps of its n-gram values, whatever it recomputes, on one rank.

    Of each order: the values, what an up-projection multiplies, and what all blocks share.
    """
    ngram = dims.ngram
    if ngram is None or not dims.has_ngram(block):
        return 0
    channels, kept = kv_heads * dims.head_size, 0
    if ngram.width < dims.kv_width:
        rounded = fp8 != "off" and fits_fp8(channels, ngram.width, fp8)  # one byte per number of input and weight
        kept = (tokens + channels) * ngram.width if rounded else tokens * ngram.width * itemsize
    return len(ngram.orders) * (tokens * channels * itemsize + kept) + _shared_ngram_bytes(ngram, tokens)


def _shared_ngram_bytes(ngram: NgramDimensions, tokens: int) -> int:
    """Returns the bytes that all blocks of a stage keep once of the n-grams of a micro-batch.

    Of each order: the index of each row in the table and among the rows that were read, int64; and the signs, int8,
    which are made 64 at a time.
    """
    return len(ngram.orders) * tokens * (16 + (up_to_multiple(ngram.width, 64) if ngram.sign_trick else 0))


def _lookup_kept(
    dims: Dimensions, lookup: LookupDimensions, tokens: int, local: int, itemsize: int, tensor: int, fp8: str
) -> int:
    """Returns the bytes that a lookup layer keeps for its backward pass on one rank. local: tokens of the stream.

    These are its input, the query, what it read beside its input, and W_up's output before and after its norm. Linears
    in FP8 keep a rounded input instead of what they multiply.
    """
    shapes, up = lookup_shapes(dims, lookup, tensor), lookup.up_width // tensor
    fits_up, fits_mix_up, fits_mix_x = fits = [fp8 != "off" and fits_fp8(*shape, fp8) for shape in shapes]
    values = local * dims.width + tokens * (dims.width + up)
    values += 0 if fits_up and fits_mix_x else tokens * 2 * dims.width
    values += 0 if fits_mix_up else tokens * up
    rounded = [shape for shape, fit in zip(shapes, fits, strict=True) if fit]
    factors = 4 * (local + tokens)
    return values * itemsize + factors + sum(tokens * columns + rows * columns for rows, columns in rounded)


def stage_activations(config: Config, plan: Plan, stage: int, dtype: torch.dtype) -> int:
    """Returns the bytes kept for the backward passes of all micro-batches in flight in a stage (1F1B, arXiv
    2006.09503).
    """
    dims, layout, (first, last) = plan.dims, plan.layout, plan.stages[stage]
    tokens, local, size = plan.micro_tokens, stream_tokens(config, plan), dtype.itemsize
    table = dims.padded_vocab * dims.width // layout.tensor
    blocks = blocks_of(dims, first, last)
    kept = sum(
        kept_bytes_per_block(
            dims,
            block,
            tokens,
            itemsize=size,
            tensor=layout.tensor,
            sequence=config.parallel.sequence,
            fp8=config.precision.fp8,
            recompute=config.batch.recompute,
        )
        for block in blocks
    )
    if dims.ngram and (readers := sum(map(dims.has_ngram, blocks))):
        kept -= (readers - 1) * _shared_ngram_bytes(dims.ngram, tokens)
    if dtype == torch.float16:  # weights are float32 and cast at each use
        kinds = {"none": ("attn", "mlp"), "selective": ("attn",), "block": ()}[config.batch.recompute]
        shapes = linear_shapes(dims, layout.tensor)
        kept += size * len(blocks) * sum(math.prod(shapes[name]) for name in shapes if name.startswith(kinds))
        if dims.lookup and config.batch.recompute != "block":
            matrices = sum(math.prod(shape) for shape in lookup_shapes(dims, dims.lookup, layout.tensor))
            kept += size * matrices * sum(dims.has_lookup(block) for block in blocks)
    if first == 0:
        kept += 2 * tokens * dims.width * size + 4 * tokens  # the rows of the table and their norm
    else:  # x is counted as the first block's input, if there is one
        kept += (passed_tensors(dims, first) - bool(blocks)) * local * dims.width * size
    if last == dims.depth + 2:
        # the norm's input and result, and the gradients of result and table
        kept += (local + 2 * tokens) * dims.width * size + 4 * table
        if dims.depth // 2 in blocks[-1:]:  # x_backout, which elsewhere is the next block's input
            kept += local * dims.width * size
    else:
        kept += local * dims.width * size  # the output to the next stage
    return min(layout.pipeline - stage, plan.accumulation) * kept


def _pipeline_buffers(config: Config, plan: Plan, stage: int, dtype: torch.dtype) -> int:
    """Returns the bytes of DeepSpeed's buffers: inputs received for the micro-batches in flight, and gradients on both
    sides.
    """
    dims, layout, (first, last) = plan.dims, plan.layout, plan.stages[stage]
    tokens = stream_tokens(config, plan)
    in_flight = max(2, min(layout.pipeline - stage, plan.accumulation))
    received = (2 + in_flight) * passed_tensors(dims, first) if first else 0
    sent = passed_tensors(dims, last) if last < dims.depth + 2 else 0
    return (received + sent) * tokens * dims.width * dtype.itemsize


def _forward_workspace(config: Config, plan: Plan, stage: int, dtype: torch.dtype, chunk: int) -> int:
    """Returns the larger of what the head needs for a chunk of logits and what a block's backward pass needs beside its
    activations.
    """
    dims, tensor, size = plan.dims, plan.layout.tensor, dtype.itemsize
    tokens = plan.micro_tokens
    hidden = tokens * MLP_RATIO * dims.width // tensor
    block = (2 * hidden + 6 * tokens * dims.width) * size + 4 * MLP_RATIO * dims.width**2 // tensor
    if config.batch.recompute != "none":
        block += kept_bytes_per_block(
            dims, dims.depth - 1, tokens, itemsize=size, tensor=tensor, fp8=config.precision.fp8
        )
    first, last = plan.stages[stage]
    if dims.lookup and any(first <= 1 + at < last for at in dims.lookup.blocks):
        # the gradient of the whole table, in float32 and in the table's dtype, beside the kernel's workspace
        tables = dims.lookup.table_rows * dims.width // tensor
        block = max(block, (4 + size) * tables + _LOOKUP_WORKSPACE_BYTES)
    if last != dims.depth + 2:
        return block
    table = dims.padded_vocab * dims.width // tensor
    chunk = min(chunk, 4 * tokens * dims.padded_vocab // tensor)
    # two float32 forms of the logits, and logits and their gradient in the compute dtype
    head = table * size * 2 + 2 * chunk + chunk * size // 2
    return max(block, head, 4 * table)


def _muon_workspace(state: StageState, narrow: bool) -> int:
    """Returns the bytes of Muon's updates, directions and the matrix being orthogonalized."""
    size = 2 if narrow else 4
    updates = (state.shards * size if narrow else 0) + state.exchanged * size
    return updates + state.largest_matrix * _NEWTON_SCHULZ_BYTES


def describe_memory(stages: list[Memory], device_bytes: int | None) -> str:
    """Returns one line: the fullest rank, its memory by use, and the device's memory if it is known."""
    fullest = max(stages, key=lambda stage: stage.total)
    parts = ", ".join(f"{use} {format_bytes(getattr(fullest, use))}" for use in MEMORY_USES)
    where = f" on stage {fullest.stage}, the fullest" if len(stages) > 1 else ""
    device = f"; the device has {format_bytes(device_bytes)}" if device_bytes else ""
    host, wire = max(stage.host for stage in stages), max(stage.wire for stage in stages)
    beside = f"; sparse tables: {format_bytes(host)} of host memory per rank" if host else ""
    sent = f"; sparse tables: at most {format_bytes(wire)} sent per rank and step" if wire else ""
    return f"estimated memory per rank{where}: {format_bytes(fullest.total)} ({parts}){device}{beside}{sent}"


def format_bytes(count: float) -> str:
    """Returns bytes in GB or MB."""
    return f"{count / 1e9:.1f} GB" if count >= 5e7 else f"{count / 1e6:.1f} MB"
