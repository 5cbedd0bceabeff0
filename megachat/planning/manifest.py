"""The manifest: which ranks store the optimizer state of each parameter, from config and plan. Takes no memory for the
model.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from megachat.config import Config
from megachat.model.gpt import ModelOptions, build_layers
from megachat.model.parameters import placed_parameters
from megachat.optim.groups import adamw_members, assign_groups, group_of, muon_matrices, require_used_patterns
from megachat.optim.matrix import Matrix
from megachat.optim.partition_plan import PartitionPlan, make_plan
from megachat.parallel.cuts import cut_shape
from megachat.place import place_of
from megachat.planning.plan import Layout, Plan
from megachat.text import number_ranges, text_table

_ZERO1_ALIGNMENT = 2  # DeepSpeed aligns a rank's share to this many elements (nccl_start_alignment_factor)


@dataclass(frozen=True)
class Ownership:
    """One line of the manifest.

    stages: the pipeline stages that hold some of the parameter. cut: how the tensor axis divides it. state_ranks: the
    world ranks that hold its optimizer state. owner: the world rank that orthogonalizes it (Muon only). lr and decay
    are at schedule multiplier 1.
    """

    name: str
    shape: tuple[int, ...]
    optimizer: str
    stages: tuple[int, ...]
    cut: str
    state_ranks: tuple[int, ...]
    owner: int | None
    lr: float
    decay: float


@dataclass(frozen=True)
class AdamWShares:
    """One AdamW group of a pipeline stage, laid end to end on one tensor rank and shared by ZeRO-1 over the data ranks.

    sizes: elements of each parameter on the tensor rank. share: elements whose state each data rank holds, padding
    included. owners: for each parameter, the data ranks that hold part of its state.
    """

    parameters: list[nn.Parameter]
    sizes: list[int]
    share: int
    owners: list[tuple[int, ...]]


def zero1_shares(sizes: list[int], ranks: int) -> tuple[int, list[tuple[int, ...]]]:
    """Returns AdamWShares' share and owners for parameters of `sizes` elements, as DeepSpeed's ZeRO-1 cuts them over
    `ranks` data ranks.
    """
    unit = _ZERO1_ALIGNMENT * ranks
    share = -(-sum(sizes) // unit) * unit // ranks
    owners, start = [], 0
    for size in sizes:
        owners.append(tuple(range(start // share, (start + size - 1) // share + 1)))
        start += size
    return share, owners


def adamw_shares(parameters: list[nn.Parameter], layout: Layout, tensor_rank: int) -> list[AdamWShares]:
    """Returns the AdamW groups of a stage's whole (uncut) parameters on one tensor rank, without empty groups."""
    groups, shares = assign_groups(map(place_of, parameters)), []
    for _, members in adamw_members(parameters, groups):
        sizes = [
            parameter.numel()
            if place_of(parameter).cut == "whole"  # may be a part of the named tensor
            else math.prod(cut_shape(place_of(parameter), layout.tensor, tensor_rank)[0])
            for parameter in members
        ]
        shares.append(AdamWShares(members, sizes, *zero1_shares(sizes, layout.data)))
    return shares


def muon_partition(
    multiplier: str | Mapping[str, float], layout: Layout, parameters: list[nn.Parameter]
) -> PartitionPlan:
    """Returns the Muon partition of a stage's whole (uncut) parameters. multiplier: optimizer.muon_multiplier."""
    places = dict.fromkeys(place_of(parameter) for parameter in parameters)
    matrices = muon_matrices(places, assign_groups(places), multiplier)
    return make_plan(matrices, layout.data, tensor=layout.tensor)


def ownership(config: Config, plan: Plan) -> list[Ownership]:
    """Returns every parameter with its optimizer and the ranks that hold its state, in model order.

    Raises UserError if a pattern of optimizer.muon_multiplier matches no matrix.
    """
    with torch.device("meta"):
        layers = build_layers(plan.dims, ModelOptions())
    stage_size = plan.layout.data * plan.layout.tensor
    state_ranks: dict[str, set[int]] = defaultdict(set)
    muon: dict[str, tuple[Matrix, int]] = {}  # with the owner rank
    for stage, (first, last) in enumerate(plan.stages):
        parameters = placed_parameters(layers[first:last])
        partition = muon_partition(config.optimizer.muon_multiplier, plan.layout, parameters)
        for matrix, owner in zip(partition.matrices, partition.owners, strict=True):
            muon[matrix.name] = matrix, stage * stage_size + owner
        for name, rank in _state_ranks(plan.layout, parameters, partition):
            state_ranks[name].add(stage * stage_size + rank)
    lines = []
    places = {place_of(parameter).name: place_of(parameter) for parameter in layers.parameters()}
    require_used_patterns(config.optimizer.muon_multiplier, places.values())
    for place in places.values():
        group, ranks = group_of(place.name), tuple(sorted(state_ranks[place.name]))
        muon_matrix, owner_rank = muon.get(place.name, (None, None))
        lines.append(
            Ownership(
                name=place.name,
                shape=place.whole,
                optimizer=group.optimizer,
                stages=tuple(sorted({rank // stage_size for rank in ranks})),
                cut=place.cut if plan.layout.tensor > 1 or place.cut == "rows" else "whole",
                state_ranks=ranks,
                owner=owner_rank,
                lr=plan.rates[group.rate] * (muon_matrix.multiplier if muon_matrix else 1.0),
                decay=plan.weight_decay if muon_matrix else group.weight_decay,
            )
        )
    return lines


def _state_ranks(layout: Layout, parameters: list[nn.Parameter], partition: PartitionPlan) -> Iterator[tuple[str, int]]:
    """Yields (parameter name, grid rank that holds some of its state) for a stage's whole (uncut) parameters."""
    for index, matrix in enumerate(partition.matrices):
        yield from ((matrix.name, rank) for rank, _ in partition.stored(index))
    for place in map(place_of, parameters):
        if group_of(place.name).optimizer == "rows":  # each rank has a range of the rows, if there are enough
            yield from ((place.name, rank) for rank in range(min(partition.grid_size, place.whole[0])))
    for tensor_rank in range(layout.tensor):
        for shares in adamw_shares(parameters, layout, tensor_rank):
            for parameter, data_ranks in zip(shares.parameters, shares.owners, strict=True):
                name = place_of(parameter).name
                yield from ((name, data_rank * layout.tensor + tensor_rank) for data_rank in data_ranks)


def describe_ownership(lines: list[Ownership]) -> str:
    """Returns the manifest as a table, with the number of parameters per optimizer at the end."""
    rows = [("parameter", "shape", "optimizer", "stage", "cut", "state on ranks", "owner", "lr", "decay")]
    for line in lines:
        shape, owner = "x".join(map(str, line.shape)), "-" if line.owner is None else str(line.owner)
        ranks = number_ranges(line.stages), line.cut, number_ranges(line.state_ranks), owner
        rows.append((line.name, shape, line.optimizer, *ranks, f"{line.lr:.4g}", f"{line.decay:.4g}"))
    muon, tables = (sum(line.optimizer == kind for line in lines) for kind in ("muon", "rows"))
    total = f"{muon} matrices on Muon, {len(lines) - muon - tables} tensors on AdamW"
    total += f", {tables} sparse tables divided by rows" if tables else ""
    return "\n".join(["parameters and their owners", *text_table(rows), total])
