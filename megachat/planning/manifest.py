"""What a run will do, before it does it: config, plan with formulas, parameters, and who owns what."""

import dataclasses
import math
from collections.abc import Mapping

import torch

from megachat.config import Config
from megachat.model.gpt import ModelOptions, build_layers
from megachat.model.parameters import placed_parameters
from megachat.optim.groups import GROUPS, assign, muon_matrices
from megachat.optim.partition_plan import Matrix, make_plan
from megachat.parallel.tensor import cut_shape
from megachat.place import Place, place_of
from megachat.planning.dimensions import layer_costs
from megachat.planning.plan import Plan
from megachat.planning.zero import zero1_owners
from megachat.text import number_ranges, text_table


@dataclasses.dataclass(frozen=True)
class Ownership:
    """One line of the manifest. stages: the pipeline stages that hold some of it. cut: how the tensor axis divides it. state_ranks: the world
    ranks that hold its state; owner: the one that orthogonalizes it (Muon only); lr and decay at multiplier 1."""

    name: str
    shape: tuple[int, ...]
    optimizer: str
    stages: tuple[int, ...]
    cut: str
    state_ranks: tuple[int, ...]
    owner: int | None
    lr: float
    decay: float


def ownership(config: Config, plan: Plan) -> list[Ownership]:
    """Every parameter with its optimizer and owners, in model order; no memory is taken for the model."""
    with torch.device("meta"):
        layers = build_layers(plan.dims, ModelOptions())
    lines: dict[str, Ownership] = {}
    for stage, (first, last) in enumerate(plan.stages):
        parameters = placed_parameters(layers[first:last])
        groups = assign([place_of(parameter) for parameter in parameters])
        matrices = muon_matrices(
            dict.fromkeys(place_of(parameter) for parameter in parameters), groups, config.optimizer.muon_multiplier
        )
        multipliers = {matrix.name: matrix.multiplier for matrix in matrices}
        state_ranks, owners = _muon_ranks(matrices, plan, stage)
        held = _adamw_owners(
            [parameter for parameter in parameters if place_of(parameter).name not in state_ranks], groups, plan, stage
        )
        for where in (place_of(parameter) for parameter in parameters):
            group, before = groups[where.name], lines.get(where.name)
            rate = plan.rates[group.rate] * multipliers.get(where.name, 1.0)
            decay = plan.weight_decay if where.name in state_ranks else group.weight_decay
            ranks = {*(state_ranks.get(where.name) or held[where]), *(before.state_ranks if before else ())}
            stages = {stage, *(before.stages if before else ())}
            owner, cut = owners.get(where.name), where.cut if plan.layout.tensor > 1 else "whole"
            lines[where.name] = Ownership(
                where.name,
                where.whole,
                group.optimizer,
                tuple(sorted(stages)),
                cut,
                tuple(sorted(ranks)),
                owner,
                rate,
                decay,
            )
    return list(lines.values())


def _muon_ranks(matrices: list[Matrix], plan: Plan, stage: int) -> tuple[dict[str, set[int]], dict[str, int]]:
    """World ranks of a stage that hold each matrix's state, and the one that orthogonalizes it."""
    first = stage * plan.layout.data * plan.layout.tensor
    partition = make_plan(matrices, plan.layout.data, tensor=plan.layout.tensor)
    each = list(zip(partition.matrices, partition.fragments, partition.owners, strict=True))
    state_ranks = {matrix.name: {first + fragment.rank for fragment in fragments} for matrix, fragments, _ in each}
    return state_ranks, {matrix.name: first + owner for matrix, _, owner in each}


def _adamw_owners(parameters: list, groups: Mapping, plan: Plan, stage: int) -> dict[Place, set[int]]:
    """World ranks of a stage that hold each AdamW parameter's state, as ZeRO-1 lays the stage's groups out on every tensor rank."""
    data, tensor = plan.layout.data, plan.layout.tensor
    held: dict[Place, set[int]] = {}
    for group in GROUPS:
        own = [parameter for parameter in parameters if groups[place_of(parameter).name] is group]
        for rank in range(tensor):
            shapes = [cut_shape(tuple(parameter.shape), place_of(parameter).cut, tensor, rank)[0] for parameter in own]
            for parameter, owners in zip(own, zero1_owners([math.prod(shape) for shape in shapes], data), strict=True):
                held.setdefault(place_of(parameter), set()).update(
                    (stage * data + owner) * tensor + rank for owner in owners
                )
    return held


def describe_config(config: Config) -> str:
    """Every setting, one a line; those that differ from the defaults are marked."""
    changed = config.model_dump(exclude_defaults=True)
    lines = ["config (* differs from the default)"]
    for section, settings in config.model_dump().items():
        for key, value in settings.items():
            mark = "*" if key in changed.get(section, {}) else " "
            lines.append(f"{mark} {section}.{key} = {value!r}")
    return "\n".join(lines)


def describe_plan(plan: Plan) -> str:
    """Every derived number with its formula."""
    lines = ["plan"]
    for field in dataclasses.fields(plan):
        value = getattr(plan, field.name)
        if field.name == "dims":
            lines += _numbers(
                "", {entry.name: getattr(value, entry.name) for entry in dataclasses.fields(value)}, plan.why
            )
        elif field.name == "layout":
            lines.append(f"  layout = data {value.data} x tensor {value.tensor} x pipeline {value.pipeline}")
        elif field.name == "stages":
            lines.append(f"  stages = {describe_stages(plan)}   [{plan.why['stages']}]")
        elif field.name in ("rates", "parameters"):
            lines += _numbers(f"{field.name}.", value, plan.why)
        elif field.name != "why":
            lines += _numbers("", {field.name: value}, plan.why)
    return "\n".join(lines)


def describe_stages(plan: Plan) -> str:
    """Each pipeline stage's layers and what they weigh, on one line."""
    costs = layer_costs(plan.dims)

    def share(kind: int, first: int, last: int) -> float:
        return sum(cost[kind] for cost in costs[first:last]) / sum(cost[kind] for cost in costs)

    told = [
        f"layers {a}-{b - 1} ({share(0, a, b):.0%} of parameters, {share(1, a, b):.0%} of FLOPs)"
        for a, b in plan.stages
    ]
    return ", ".join(told)


def _numbers(prefix: str, values: Mapping[str, object], why: Mapping[str, str]) -> list[str]:
    def shown(value) -> str:
        return f"{value:,}" if isinstance(value, int) else f"{value:.6g}" if isinstance(value, float) else str(value)

    return [
        f"  {prefix}{name} = {shown(value)}" + (f"   [{why[prefix + name]}]" if prefix + name in why else "")
        for name, value in values.items()
    ]


def describe_ownership(lines: list[Ownership]) -> str:
    """The manifest as a table, with a count by optimizer at the end."""
    rows = [("parameter", "shape", "optimizer", "stage", "cut", "state on ranks", "owner", "lr", "decay")]
    for line in lines:
        shape = "x".join(map(str, line.shape))
        owner = "-" if line.owner is None else str(line.owner)
        where = (number_ranges(line.stages), line.cut, number_ranges(line.state_ranks), owner)
        rows.append((line.name, shape, line.optimizer, *where, f"{line.lr:.4g}", f"{line.decay:.4g}"))
    muon = sum(line.optimizer == "muon" for line in lines)
    return "\n".join(
        [
            "parameters and their owners",
            *text_table(rows),
            f"{muon} matrices on Muon, {len(lines) - muon} tensors on AdamW",
        ]
    )


def plan_values(plan: Plan) -> dict:
    """The plan as JSON values."""
    values = {field.name: getattr(plan, field.name) for field in dataclasses.fields(plan)}
    plain = {name: dict(value) if isinstance(value, Mapping) else value for name, value in values.items()}
    return plain | {"dims": dataclasses.asdict(plan.dims), "layout": dataclasses.asdict(plan.layout)}
