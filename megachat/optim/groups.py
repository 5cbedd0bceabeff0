"""Assigns parameters to optimizers by name pattern. A parameter that matches no group or several is an error."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from torch import nn

from megachat.errors import UserError
from megachat.optim.matrix import Matrix
from megachat.place import Place, place_of
from megachat.settings import OptimizerConfig


@dataclass(frozen=True)
class Group:
    """Parameters that share optimizer settings.

    optimizer: "muon", "adamw" or "rows" (tables divided by rows, see optim/row_tables.py). rate: key of Plan.rates.
    betas: key of the config's optimizer section, of AdamW and of rows. weight_decay: of both; Muon's follows the
    schedule.
    """

    name: str
    optimizer: str
    patterns: tuple[str, ...]
    rate: str
    betas: str = ""
    weight_decay: float = 0.0


# nanochat's settings (nanochat/gpt.py, setup_optimizer). The float32 scalars come first: every pipeline stage has some,
# and ZeRO takes its dtype from the first group.
GROUPS = (
    Group("resid", "adamw", ("resid_lambdas",), "resid", "resid_betas", 0.05),
    Group("x0", "adamw", ("x0_lambdas",), "x0", "x0_betas", 0.0),
    Group("smear", "adamw", ("smear_gate.weight", "smear_lambda", "backout_lambda"), "smear", "smear_betas", 0.0),
    Group("norm_scale", "adamw", ("*_scale",), "norm_scale", "resid_betas", 0.0),
    Group("unembedding", "adamw", ("lm_head.weight",), "unembedding", "unembedding_betas", 0.01),
    Group("embedding", "adamw", ("transformer.wte.weight",), "embedding", "embedding_betas", 0.001),
    Group("value_embedding", "adamw", ("value_embeds.*.weight",), "value_embedding", "embedding_betas", 0.01),
    Group("lookup", "adamw", ("lookup.*.keys.weight", "lookup.*.values.weight"), "embedding", "embedding_betas", 0.0),
    Group(
        "matrix",
        "muon",
        ("transformer.h.*.attn.*.weight", "transformer.h.*.mlp.*.weight", "lookup.*.w_*.weight", "ngram.*.up.weight"),
        "matrix",
    ),
    Group("ngram", "rows", ("ngram.*.[2-8].weight",), "value_embedding", "embedding_betas", 0.0),
)
RATE_OF_GROUP = {group.name: group.rate for group in GROUPS}


def betas_of(group: Group, config: OptimizerConfig) -> tuple[float, float]:
    """Returns the configured betas of a group on AdamW or rows."""
    return getattr(config, group.betas)


def group_of(name: str, groups: Iterable[Group] = GROUPS) -> Group:
    """Returns the one group whose patterns match the parameter's name. Raises ValueError if none or several match."""
    matches = [group for group in groups if any(fnmatchcase(name, pattern) for pattern in group.patterns)]
    if len(matches) != 1:
        names = ", ".join(group.name for group in matches) or "none"
        raise ValueError(f"parameter {name} is matched by {len(matches)} optimizer groups ({names}), not one")
    return matches[0]


def assign_groups(places: Iterable[Place], groups: Iterable[Group] = GROUPS) -> dict[str, Group]:
    """Returns the group of each parameter name.

    Raises ValueError for a name in no group or in several. It also does so for a matrix of the blocks (cut by column or
    row) that is not on Muon, and for a parameter on Muon that is not a matrix.
    """
    assigned = {}
    for place in places:
        group = group_of(place.name, groups)
        if place.cut in ("column", "row") and group.optimizer != "muon":
            raise ValueError(f"matrix {place.name} should be on Muon, but group {group.name} is on {group.optimizer}")
        if group.optimizer == "muon" and len(place.whole) != 2:
            raise ValueError(f"{place.name} has shape {place.whole}, but Muon takes matrices only")
        assigned[place.name] = group
    return assigned


def rate_multipliers(shapes: Mapping[str, tuple[int, int]], rule: str | Mapping[str, float]) -> dict[str, float]:
    """Returns the factor on Muon's learning rate for each matrix.

    rule: "rows_over_cols" is sqrt(max(1, rows / columns)). "flipped" exchanges the factors of the MLP's two matrices
    (nanochat pull request 492). A mapping of name patterns to numbers overrides rows_over_cols.
    Raises UserError for a matrix that matches two patterns.
    """
    multipliers = {}
    explicit = {} if isinstance(rule, str) else dict(rule)
    for name, (rows, columns) in shapes.items():
        ratio = columns / rows if rule == "flipped" and ".mlp." in name else rows / columns
        matches = [pattern for pattern in explicit if fnmatchcase(name, pattern)]
        if len(matches) > 1:
            patterns = " and ".join(repr(match) for match in matches)
            raise UserError(f"optimizer.muon_multiplier: {name} matches {patterns}; keep only one of these patterns")
        multipliers[name] = explicit[matches[0]] if matches else max(1.0, ratio) ** 0.5
    return multipliers


def require_used_patterns(rule: str | Mapping[str, float], places: Iterable[Place]) -> None:
    """Raises UserError for a pattern of the rule (see rate_multipliers) that matches no matrix on Muon.

    places: of the whole model, because a pattern may match the matrices of one pipeline stage only.
    """
    names = [place.name for place in places if group_of(place.name).optimizer == "muon"]
    for pattern in () if isinstance(rule, str) else rule:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UserError(
                f"optimizer.muon_multiplier: pattern {pattern!r} matches no matrix; an example name: {names[0]}"
            )


def muon_matrices(
    places: Iterable[Place], groups: Mapping[str, Group], rule: str | Mapping[str, float]
) -> list[Matrix]:
    """Returns the matrices on Muon, in model order. rule: see rate_multipliers."""
    matrices = {}
    for place in places:
        if groups[place.name].optimizer == "muon":
            rows, columns = place.whole
            cut = place.cut if place.cut == "column" or place.cut == "row" else "whole"
            matrices[place.name] = Matrix(place.name, (rows, columns), place.block, cut=cut)
    multipliers = rate_multipliers({name: matrix.shape for name, matrix in matrices.items()}, rule)
    return [replace(matrix, multiplier=multipliers[name]) for name, matrix in matrices.items()]


def adamw_members(
    parameters: list[nn.Parameter], groups: Mapping[str, Group]
) -> Iterator[tuple[Group, list[nn.Parameter]]]:
    """Yields the groups on AdamW with their parameters, in the order of GROUPS, without empty ones. groups: of each
    parameter name."""
    for group in GROUPS:
        members = [parameter for parameter in parameters if groups[place_of(parameter).name] is group]
        if group.optimizer == "adamw" and members:
            yield group, members


def adamw_groups(
    parameters: list[nn.Parameter], groups: Mapping[str, Group], rates: Mapping[str, float], config: OptimizerConfig
) -> list[dict]:
    """Returns the parameter groups for torch.optim.AdamW. groups: see adamw_members. rates: Plan.rates."""
    return [
        {
            "name": group.name,
            "params": members,
            "lr": rates[group.rate],
            "weight_decay": group.weight_decay,
            "betas": betas_of(group, config),
            "eps": config.adamw_epsilon,
        }
        for group, members in adamw_members(parameters, groups)
    ]
