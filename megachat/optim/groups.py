"""Which optimizer takes which parameter, by name pattern; a parameter matched twice, or never, is an error."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from megachat.errors import UserError
from megachat.optim.matrix import Matrix
from megachat.place import place_of


@dataclass(frozen=True)
class Group:
    """Parameters that share an optimizer's settings. rate: key of Plan.rates. betas and decay are AdamW's; Muon's come from the schedule."""

    name: str
    optimizer: str  # "muon" or "adamw"
    patterns: tuple[str, ...]
    rate: str
    betas: tuple[float, float] = (0.0, 0.0)
    weight_decay: float = 0.0


# nanochat's settings (nanochat/gpt.py, setup_optimizer). The float32 scalars come first: every pipeline stage has some, and ZeRO takes its
# dtype from the first group.
GROUPS = (
    Group("resid", "adamw", ("resid_lambdas",), "resid", (0.8, 0.95), 0.05),
    Group("x0", "adamw", ("x0_lambdas",), "x0", (0.96, 0.95), 0.0),
    Group("smear", "adamw", ("smear_gate.weight", "smear_lambda", "backout_lambda"), "smear", (0.8, 0.95), 0.0),
    Group("unembedding", "adamw", ("lm_head.weight",), "unembedding", (0.8, 0.96), 0.01),
    Group("embedding", "adamw", ("transformer.wte.weight",), "embedding", (0.8, 0.995), 0.001),
    Group("value_embedding", "adamw", ("value_embeds.*.weight",), "value_embedding", (0.8, 0.995), 0.01),
    Group("matrix", "muon", ("transformer.h.*.attn.*.weight", "transformer.h.*.mlp.*.weight"), "matrix"),
)
ADAMW_EPSILON = 1e-10
MUON_BETA2 = 0.9


def group_of(name: str, groups: Iterable[Group] = GROUPS) -> Group:
    """The one group whose patterns match the parameter's name. Raises ValueError when none or several do."""
    found = [group for group in groups if any(fnmatchcase(name, pattern) for pattern in group.patterns)]
    if len(found) != 1:
        raise ValueError(
            f"parameter {name} is matched by {len(found)} optimizer groups ({', '.join(group.name for group in found) or 'none'}), not one"
        )
    return found[0]


def assign(places: Iterable, groups: Iterable[Group] = GROUPS) -> dict[str, Group]:
    """Parameter name -> group, for places with name, whole shape and cut (megachat.model.parameters.Place).

    Raises ValueError when a name is in no group or in two, or when a matrix that works on the stream (cut by column or row) is not Muon's.
    """
    assigned = {}
    for where in places:
        group = group_of(where.name, groups)
        if where.cut in ("column", "row") and group.optimizer != "muon":
            raise ValueError(
                f"matrix {where.name} should be on Muon but group {group.name} gives it to {group.optimizer}"
            )
        if group.optimizer == "muon" and len(where.whole) != 2:
            raise ValueError(f"{where.name} has shape {where.whole}: Muon takes matrices only")
        assigned[where.name] = group
    return assigned


def rate_multipliers(shapes: Mapping[str, tuple[int, int]], rule: str | Mapping[str, float]) -> dict[str, float]:
    """Muon's rate multiplier of each matrix.

    "rows_over_cols": sqrt(max(1, rows / columns)). "flipped": the same, but the MLP's two matrices trade theirs (nanochat pull request 492).
    A mapping of name patterns to numbers overrides rows_over_cols; raises UserError for a pattern without a match or a matrix with two.
    """
    multipliers = {}
    explicit = {} if isinstance(rule, str) else dict(rule)
    unused = set(explicit)
    for name, (rows, columns) in shapes.items():
        ratio = columns / rows if rule == "flipped" and ".mlp." in name else rows / columns
        matches = [pattern for pattern in explicit if fnmatchcase(name, pattern)]
        if len(matches) > 1:
            raise UserError(
                f"optimizer.muon_multiplier: {name} matches {' and '.join(repr(match) for match in matches)}; leave one pattern for it"
            )
        multipliers[name] = explicit[matches[0]] if matches else max(1.0, ratio) ** 0.5
        unused -= set(matches)
    if unused:
        raise UserError(
            f"optimizer.muon_multiplier: pattern {sorted(unused)[0]!r} matches no matrix; matrices are named as {next(iter(shapes))}"
        )
    return multipliers


def muon_matrices(places, groups: Mapping[str, Group], rule) -> list[Matrix]:
    """The Muon partition's description of the matrices among the places, in model order."""
    owned = [where for where in places if groups[where.name].optimizer == "muon"]
    multipliers = rate_multipliers({where.name: where.whole for where in owned}, rule)
    return [
        Matrix(
            where.name,
            where.whole,
            where.block,
            multipliers[where.name],
            where.cut if where.cut in ("column", "row") else "whole",
        )
        for where in owned
    ]


def adamw_groups(parameters: list[nn.Parameter], groups: Mapping[str, Group], rates: Mapping[str, float]) -> list[dict]:
    """torch.optim.AdamW's groups, in the order of GROUPS, without empty ones."""
    made = []
    for group in GROUPS:
        own = [parameter for parameter in parameters if groups[place_of(parameter).name] is group]
        if group.optimizer == "adamw" and own:
            settings = {
                "lr": rates[group.rate],
                "betas": group.betas,
                "weight_decay": group.weight_decay,
                "eps": ADAMW_EPSILON,
            }
            made.append({"name": group.name, "params": own} | settings)
    return made
