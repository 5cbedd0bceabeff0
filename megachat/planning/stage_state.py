"""Counts what a pipeline stage's state needs on its fullest rank. Cached: a search counts the same stages often."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import nn

from megachat.model.gpt import ModelOptions, build_layers
from megachat.model.parameters import placed_parameters
from megachat.planning.dimensions import Dimensions
from megachat.planning.manifest import adamw_shares, muon_partition
from megachat.planning.plan import Layout
from megachat.planning.step_work import stage_matrices


@dataclass(frozen=True)
class StageState:
    """Elements on the fullest rank of a stage, except where bytes are named.

    adamw_elements, adamw_shard, largest_share: of AdamW's parameters on a rank, their share by ZeRO-1, and that of the
    largest group. adamw_weights: bytes of the weights of a share. largest_adamw: AdamW's largest parameter. shards: of
    Muon's buckets. largest_shard: of one bucket. muon_moments: bytes. exchanged: of fragments and directions.
    """

    adamw_elements: int
    adamw_shard: int
    adamw_weights: int
    largest_adamw: int
    largest_share: int
    shards: int
    largest_shard: int
    muon_moments: int
    exchanged: int
    largest_matrix: int


@lru_cache(maxsize=8)
def _meta_layers(dims: Dimensions, dtype: torch.dtype) -> nn.ModuleList:
    with torch.device("meta"):
        return build_layers(dims, ModelOptions(compute_dtype=dtype))


@lru_cache(maxsize=256)
def stage_parameters(dims: Dimensions, layers: tuple[int, int], dtype: torch.dtype) -> list[nn.Parameter]:
    """Returns the whole (uncut) parameters of the layers [first, last), without memory. dtype: of activations."""
    return placed_parameters(_meta_layers(dims, dtype)[slice(*layers)])


def stage_state(
    dims: Dimensions,
    layers: tuple[int, int],
    layout: Layout,
    dtype: torch.dtype,
    multiplier: str | Mapping[str, float],
) -> StageState:
    """Returns the state of the layers [first, last) on a stage of the layout. multiplier: optimizer.muon_multiplier."""
    key = multiplier if isinstance(multiplier, str) else tuple(multiplier.items())
    return _stage_state(dims, layers, layout.data, layout.tensor, dtype, key)


StateCount = Callable[[Dimensions, tuple[int, int], Layout, torch.dtype, str | Mapping[str, float]], StageState]


def estimated_stage_state(
    dims: Dimensions,
    layers: tuple[int, int],
    layout: Layout,
    dtype: torch.dtype,
    multiplier: str | Mapping[str, float],
) -> StageState:
    """Returns the same with state that is divided evenly: without the padding of shards and the choice of owners.

    For a search, which counts exactly what it shows. multiplier: has no effect.
    """
    return _estimated_state(dims, layers, layout.data, layout.tensor, dtype)


@lru_cache(maxsize=4096)
def _estimated_state(
    dims: Dimensions, layers: tuple[int, int], data: int, tensor: int, dtype: torch.dtype
) -> StageState:
    first, last = layers
    matrices = stage_matrices(dims, first, last)
    blocks = range(max(first, 1) - 1, min(last, dims.depth + 1) - 1)
    table = -(-dims.padded_vocab * dims.width // tensor)
    values = [-(-dims.padded_vocab * dims.kv_width // tensor) for block in blocks if dims.has_value_embedding(block)]
    lookups = [
        (1 if dims.lookup.tied else 2) * dims.lookup.rows * dims.width // tensor
        for block in blocks
        if dims.lookup and dims.has_lookup(block)
    ]
    narrow = [*([table] if first == 0 else []), *values, *lookups]  # in the dtype of tables
    head = [table] if last == dims.depth + 2 else []
    elements, shard = sum(narrow) + sum(head), -(-(sum(narrow) + sum(head)) // data)
    size = 4 if dtype == torch.float16 else dtype.itemsize
    muon, grid = sum(rows * columns for rows, columns in matrices), data * tensor
    shards, largest = -(-muon // grid), max((rows * columns for rows, columns in matrices), default=0)
    return StageState(
        adamw_elements=elements,
        adamw_shard=shard,
        adamw_weights=(size * sum(narrow) + 4 * sum(head)) // data,
        largest_adamw=max((*narrow, *head), default=0),
        largest_share=max(sum(values), *narrow, *head, 0) // data,
        shards=shards,
        largest_shard=-(-shards // max(1, 2 * len(blocks))),  # two buckets per block: hardly any plan has more
        muon_moments=4 * shards + 4 * sum(map(max, matrices)) // grid,
        exchanged=(2 if grid > 1 else 1) * max(shards, largest),
        largest_matrix=largest,
    )


@lru_cache(maxsize=4096)
def _stage_state(
    dims: Dimensions,
    layers: tuple[int, int],
    data: int,
    tensor: int,
    dtype: torch.dtype,
    multiplier: str | tuple[tuple[str, float], ...],
) -> StageState:
    parameters, layout = stage_parameters(dims, layers, dtype), Layout(data, tensor, 1)
    # tensor ranks differ in their parts of tables that the axis does not divide evenly
    shares = [adamw_shares(parameters, layout, rank) for rank in range(tensor)]
    adamw = max(shares, key=lambda groups: sum(group.share for group in groups))
    partition = muon_partition(multiplier if isinstance(multiplier, str) else dict(multiplier), layout, parameters)
    states = [partition.state_bytes(rank) for rank in range(partition.grid_size)]
    owned = [0] * partition.grid_size
    for matrix, owner in zip(partition.matrices, partition.owners, strict=True):
        owned[owner] += matrix.elements
    return StageState(
        adamw_elements=sum(sum(group.sizes) for group in adamw),
        adamw_shard=sum(group.share for group in adamw),
        adamw_weights=sum(group.parameters[0].dtype.itemsize * group.share for group in adamw),
        largest_adamw=max((size for group in adamw for size in group.sizes), default=0),
        largest_share=max((group.share for group in adamw), default=0),
        shards=partition.shard_elements,
        largest_shard=max((bucket.shard_size for bucket in partition.buckets), default=0),
        muon_moments=max(state["momentum"] + state["second_moment"] for state in states),
        exchanged=(2 if partition.grid_size > 1 else 1) * max(owned),
        largest_matrix=max((matrix.elements for matrix in partition.matrices), default=0),
    )
