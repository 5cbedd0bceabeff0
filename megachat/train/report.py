"""What a run will do, before it does it: config, plan with formulas, parameters, and who owns what."""

import dataclasses
from collections.abc import Mapping

import torch

from megachat.config import Config
from megachat.model.gpt import build_layers
from megachat.model.parameters import placed_parameters
from megachat.optim.groups import GROUPS, assign
from megachat.optim.partition_plan import make_plan
from megachat.parallel.zero import zero1_owners
from megachat.plan import Plan
from megachat.train.build import model_options, muon_matrices


@dataclasses.dataclass(frozen=True)
class Ownership:
    """One line of the manifest: owners are the data ranks that hold its state; lead orthogonalizes it (Muon only); lr and decay at multiplier 1."""

    name: str
    shape: tuple[int, ...]
    optimizer: str
    owners: tuple[int, ...]
    lead: int | None
    lr: float
    decay: float


def ownership(config: Config, plan: Plan) -> list[Ownership]:
    """Every parameter with its optimizer and owners, in model order; no memory is taken for the model."""
    with torch.device("meta"):
        parameters = placed_parameters(build_layers(plan.dims, model_options(config, torch.float32)))
    groups = assign([parameter.place for parameter in parameters])
    matrices = muon_matrices(dict.fromkeys(parameter.place for parameter in parameters), groups, config.optimizer.muon_multiplier)
    partition = make_plan(matrices, plan.layout.data)
    muon = {matrix.name: matrix for matrix in matrices}
    place_of = {matrix.name: index for index, matrix in enumerate(partition.matrices)}
    order = [group.name for group in GROUPS]
    adamw = sorted((p for p in parameters if p.place.name not in muon), key=lambda p: order.index(groups[p.place.name].name))
    by_group = {name: [(p.place, p.numel()) for p in adamw if groups[p.place.name].name == name] for name in order}
    held = {}
    for members in by_group.values():
        held |= {where: owners for (where, _), owners in zip(members, zero1_owners([n for _, n in members], plan.layout.data), strict=True)}
    lines: dict[str, Ownership] = {}
    for parameter in parameters:
        where, group = parameter.place, groups[parameter.place.name]
        rate = plan.rates[group.rate]
        if where.name in muon:
            owners = tuple(sorted({fragment.rank for fragment in partition.fragments[place_of[where.name]]}))
            lead = partition.leads[place_of[where.name]]
            lines[where.name] = Ownership(where.name, where.whole, "muon", owners, lead, rate * muon[where.name].multiplier, plan.weight_decay)
        else:
            owners = tuple(sorted({*held[where], *(lines[where.name].owners if where.name in lines else ())}))
            lines[where.name] = Ownership(where.name, where.whole, "adamw", owners, None, rate, group.weight_decay)
    return list(lines.values())


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
            lines += _numbers("", {entry.name: getattr(value, entry.name) for entry in dataclasses.fields(value)}, plan.why)
        elif field.name == "layout":
            lines.append(f"  layout = data {value.data} x tensor {value.tensor} x pipeline {value.pipeline}")
        elif field.name in ("rates", "parameters"):
            lines += _numbers(f"{field.name}.", value, plan.why)
        elif field.name != "why":
            lines += _numbers("", {field.name: value}, plan.why)
    return "\n".join(lines)


def _numbers(prefix: str, values: Mapping[str, object], why: Mapping[str, str]) -> list[str]:
    def shown(value) -> str:
        return f"{value:,}" if isinstance(value, int) else f"{value:.6g}" if isinstance(value, float) else str(value)

    return [f"  {prefix}{name} = {shown(value)}" + (f"   [{why[prefix + name]}]" if prefix + name in why else "") for name, value in values.items()]


def describe_ownership(lines: list[Ownership]) -> str:
    """The manifest as a table, with a count by optimizer at the end."""
    rows = [("parameter", "shape", "optimizer", "state on data ranks", "lead", "lr", "decay")]
    for line in lines:
        shape = "x".join(map(str, line.shape))
        lead = "-" if line.lead is None else str(line.lead)
        rows.append((line.name, shape, line.optimizer, _ranges(line.owners), lead, f"{line.lr:.4g}", f"{line.decay:.4g}"))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    muon = sum(line.optimizer == "muon" for line in lines)
    return "\n".join(["parameters and their owners", *table, f"{muon} matrices on Muon, {len(lines) - muon} tensors on AdamW"])


def _ranges(ranks: tuple[int, ...]) -> str:
    """0,1,2,5 -> "0-2,5"."""
    parts: list[list[int]] = []
    for rank in ranks:
        if parts and rank == parts[-1][1] + 1:
            parts[-1][1] = rank
        else:
            parts.append([rank, rank])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)


def plan_values(plan: Plan) -> dict:
    """The plan as JSON values."""
    values = {field.name: getattr(plan, field.name) for field in dataclasses.fields(plan)}
    plain = {name: dict(value) if isinstance(value, Mapping) else value for name, value in values.items()}
    return plain | {"dims": dataclasses.asdict(plan.dims), "layout": dataclasses.asdict(plan.layout)}
