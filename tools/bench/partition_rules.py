"""Rules that distribute Muon over data-parallel ranks, evaluated from their plans: load balance and bytes sent."""

import torch

from megachat.config import Config
from megachat.model.gpt import ModelOptions, build_layers
from megachat.model.parameters import placed_parameters
from megachat.optim.groups import assign_groups, muon_matrices
from megachat.optim.matrix import Matrix
from megachat.optim.partition_plan import make_plan
from megachat.place import place_of
from megachat.planning.sizes import resolve_dimensions

MODELS = {"d12": (12, 64), "d24": (24, 64), "d32": (32, 64), "7B": (32, 128)}  # depth, width per block


def model_matrices(depth: int, aspect_ratio: int) -> list[Matrix]:
    """Returns the Muon matrices of megachat's model of that size, the small gates included."""
    config = Config.model_validate({"model": {"depth": depth, "aspect_ratio": aspect_ratio}})
    with torch.device("meta"):
        parameters = placed_parameters(build_layers(resolve_dimensions(config, 65536), ModelOptions()))
    places = list(dict.fromkeys(place_of(parameter) for parameter in parameters))
    return muon_matrices(places, assign_groups(places), "rows_over_cols")


def by_shape(matrices: list[Matrix]) -> list[list[Matrix]]:
    """Returns the matrices of each shape, shapes in the order of their first matrix."""
    stacks: dict[tuple[int, int], list[Matrix]] = {}
    for matrix in matrices:
        stacks.setdefault(matrix.shape, []).append(matrix)
    return list(stacks.values())


def dealt_by_cost(matrices: list[Matrix], ranks: int) -> list[list[Matrix]]:
    """Assigns whole matrices, the costliest first, to the rank with the least cost, then the fewest elements (LPT)."""
    dealt, loads = [[] for _ in range(ranks)], [(0, 0)] * ranks
    for matrix in sorted(matrices, key=lambda matrix: (-matrix.flops, matrix.name)):
        rank = min(range(ranks), key=lambda rank: loads[rank])
        dealt[rank].append(matrix)
        loads[rank] = loads[rank][0] + matrix.flops, loads[rank][1] + matrix.elements
    return dealt


def planned_megachat(matrices: list[Matrix], ranks: int) -> tuple[list[int], float]:
    """Returns the FLOPs of each rank and the mean bytes sent per rank of megachat's partition."""
    plan = make_plan(matrices, ranks)
    sent = plan.wire_bytes(gradient_bytes=2, weight_bytes=2, direction_bytes=2)
    return plan.flops(), sum(sum(one.values()) for one in sent) / ranks


def planned_chunks(matrices: list[Matrix], ranks: int) -> tuple[list[int], float]:
    """Returns FLOPs and bytes, as planned_megachat, of nanochat's rule (nanochat/optim.py): matrices are stacked by
    shape, each rank updates ceil(count / ranks) of each stack, stacks are padded, both wires are float32."""
    loads, sent = [0] * ranks, 0
    for stack in by_shape(matrices):
        chunk = -(-len(stack) // ranks)
        sent += 2 * 4 * (ranks - 1) * chunk * stack[0].elements
        for number, matrix in enumerate(stack):
            loads[number // chunk] += matrix.flops
    return loads, sent


def planned_whole(matrices: list[Matrix], ranks: int) -> tuple[list[int], float]:
    """Returns FLOPs and bytes, as planned_megachat, of whole matrices dealt by cost: every rank's buffer has the size
    of the fullest, both wires are bfloat16."""
    dealt = dealt_by_cost(matrices, ranks)
    fullest = max(sum(matrix.elements for matrix in members) for members in dealt)
    return [sum(matrix.flops for matrix in members) for members in dealt], 2 * 2 * (ranks - 1) * fullest


RULES = {"megachat": planned_megachat, "nanochat's chunks": planned_chunks, "whole matrices by cost": planned_whole}


def lower_bound(matrices: list[Matrix], ranks: int) -> float:
    """Returns the bytes that each rank must send if every element is updated once and both wires have two bytes."""
    return 4 * sum(matrix.elements for matrix in matrices) * (ranks - 1) / ranks


def planned_table(rank_counts: tuple[int, ...]) -> dict:
    """Returns model -> rule -> ranks -> {"load": busiest rank over the mean, "bytes": sent over the lower bound}."""
    table: dict = {}
    for model, size in MODELS.items():
        matrices = model_matrices(*size)
        for rule, planned in RULES.items():
            for ranks in rank_counts:
                loads, sent = planned(matrices, ranks)
                values = {"load": max(loads) * ranks / sum(loads), "bytes": sent / lower_bound(matrices, ranks)}
                table.setdefault(model, {}).setdefault(rule, {})[ranks] = values
    return table
