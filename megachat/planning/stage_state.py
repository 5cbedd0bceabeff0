"""Counts the state of a pipeline stage on its fullest rank, exactly or, for a search, by an estimate. Both are cached,
because a search counts the same stages often.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import nn

from megachat.config import Config
from megachat.model.gpt import ModelOptions, build_layers
from megachat.model.parameters import placed_parameters
from megachat.planning.dimensions import Dimensions, adamw_tables, blocks_of
from megachat.planning.manifest import adamw_shares, muon_partition
from megachat.planning.plan import Layout, Plan
from megachat.planning.step_work import stage_matrices


@dataclass(frozen=True)
class StageState:
    """Elements on the fullest rank of a stage, or bytes where that is written."""

    adamw_elements: int  # AdamW's parameters
    adamw_shard: int  # the rank's share of them by ZeRO-1
    adamw_weights: int  # bytes of the weights of that share
    largest_adamw: int  # AdamW's largest parameter
    largest_share: int  # the rank's share of AdamW's largest group
    shards: int  # the rank's shards of all Muon buckets
    largest_shard: int  # its shard of the largest bucket
    muon_moments: int  # bytes of momentum and second moments
    exchanged: int  # updates that the rank receives as an owner, and their directions if any are sent
    largest_matrix: int


# (config, plan, stage, dtype of activations) -> the state of the stage
StateCount = Callable[[Config, Plan, int, torch.dtype], StageState]


def stage_state(config: Config, plan: Plan, stage: int, dtype: torch.dtype) -> StageState:
    """Counts the state of a stage as its ranks will divide it. dtype: of activations."""
    rule = config.optimizer.muon_multiplier
    hashable = rule if isinstance(rule, str) else tuple(rule.items())
    return _exact_state(plan.dims, plan.stages[stage], plan.layout.data, plan.layout.tensor, dtype, hashable)


def estimated_stage_state(config: Config, plan: Plan, stage: int, dtype: torch.dtype) -> StageState:
    """Estimates the same as if everything were divided evenly: no shard is padded, and all owners have equal work.

    For a search, which counts exactly what it shows.
    """
    return _even_state(plan.dims, plan.stages[stage], plan.layout.data, plan.layout.tensor, dtype)


@lru_cache(maxsize=8)
def _meta_layers(dims: Dimensions, dtype: torch.dtype) -> nn.ModuleList:
    with torch.device("meta"):
        return build_layers(dims, ModelOptions(compute_dtype=dtype))


@lru_cache(maxsize=256)
def stage_parameters(dims: Dimensions, layers: tuple[int, int], dtype: torch.dtype) -> list[nn.Parameter]:
    """Returns the whole (uncut) parameters of the layers [first, last), without memory. dtype: of activations."""
    return placed_parameters(_meta_layers(dims, dtype)[slice(*layers)])


@lru_cache(maxsize=4096)
def _exact_state(
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


@lru_cache(maxsize=4096)
def _even_state(dims: Dimensions, layers: tuple[int, int], data: int, tensor: int, dtype: torch.dtype) -> StageState:
    tables, grid = adamw_tables(dims, *layers, tensor), data * tensor
    values, head = sum(tables["value_embedding"]), sum(tables["unembedding"])
    elements, largest = sum(map(sum, tables.values())), max(map(max, filter(None, tables.values())), default=0)
    table_bytes = ModelOptions(compute_dtype=dtype).table_dtype.itemsize
    matrices = stage_matrices(dims, *layers)
    sizes = [rows * columns for rows, columns in matrices]
    shards, largest_matrix = -(-sum(sizes) // grid), max(sizes, default=0)
    return StageState(
        adamw_elements=elements,
        adamw_shard=-(-elements // data),
        adamw_weights=(table_bytes * (elements - head) + 4 * head) // data,
        largest_adamw=largest,
        largest_share=max(values, largest) // data,  # value embeddings are one group
        shards=shards,
        largest_shard=-(-shards // max(1, 2 * len(blocks_of(dims, *layers)))),  # hardly any plan has more buckets
        muon_moments=4 * shards + 4 * sum(map(max, matrices)) // grid,
        exchanged=(2 if grid > 1 else 1) * max(shards, largest_matrix),
        largest_matrix=largest_matrix,
    )
