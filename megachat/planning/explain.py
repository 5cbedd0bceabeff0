"""Config and plan in words: every setting, every derived number with its formula, every pipeline stage; and the plan as
JSON.
"""

import dataclasses
from collections.abc import Mapping

from megachat.config import Config
from megachat.planning.dimensions import Dimensions, layer_costs
from megachat.planning.plan import Plan
from megachat.schedule import warmup_length

REPLAY_SHARE = 0.01  # of a training's passes, above which replays are worth a warning


def describe_config(config: Config) -> str:
    """Returns every setting, one per line; those that differ from the default are marked."""
    changed = config.model_dump(exclude_defaults=True)
    lines = ["config (* differs from the default)"]
    for section, settings in config.model_dump().items():
        for key, value in settings.items():
            mark = "*" if key in changed.get(section, {}) else " "
            lines.append(f"{mark} {section}.{key} = {value!r}")
    return "\n".join(lines)


def describe_plan(plan: Plan) -> str:
    """Returns every derived number with its formula, one per line."""
    lines = ["plan"]
    for name, value in vars(plan).items():
        if name == "dims":
            sizes = _sizes(value)
            lookup, ngram = sizes.pop("lookup"), sizes.pop("ngram")
            lines += _number_lines("", sizes, plan.why) + _number_lines("lookup.", lookup or {}, plan.why)
            lines += _number_lines("ngram.", ngram or {}, plan.why)
        elif name == "layout":
            lines.append(f"  layout = data {value.data} x tensor {value.tensor} x pipeline {value.pipeline}")
        elif name == "stages":
            lines.append(f"  stages = {describe_stages(plan)}   [{plan.why['stages']}]")
        elif name in ("rates", "parameters"):
            lines += _number_lines(f"{name}.", value, plan.why)
        elif name != "why":
            lines += _number_lines("", {name: value}, plan.why)
    return "\n".join(lines)


def describe_stages(plan: Plan) -> str:
    """Returns each pipeline stage's layers with their shares of parameters and FLOPs, on one line."""
    costs = layer_costs(plan.dims, plan.layout.data * plan.layout.tensor)

    def share(kind: int, first: int, last: int) -> float:
        return sum(cost[kind] for cost in costs[first:last]) / sum(cost[kind] for cost in costs)

    return ", ".join(
        f"layers {a}-{b - 1} ({share(0, a, b):.0%} of parameters, {share(1, a, b):.0%} of FLOPs)"
        for a, b in plan.stages
    )


def setting_warnings(config: Config, plan: Plan) -> list[str]:
    """Returns a warning for each pair of settings that is allowed and has an effect that is seldom wanted."""
    warmup, keep = warmup_length(config.optimizer, plan.steps), config.checkpoint
    constant = plan.steps - round(config.optimizer.warmdown_ratio * plan.steps)
    lines = []
    if warmup > constant:
        what = f"is longer than the training ({plan.steps} steps)"
        if warmup <= plan.steps:
            what = f"runs into the warm-down, which begins after step {constant}"
        key = "warmup_steps" if config.optimizer.warmup_ratio is None else "warmup_ratio"
        lines.append(
            f"WARNING: optimizer.{key} ({warmup} steps) {what}: the rates never stay at their full values; lower "
            f"optimizer.{key} or optimizer.warmdown_ratio"
        )
    if keep.keep_every and not keep.keep_last:
        lines.append(
            f"WARNING: checkpoint.keep_every ({keep.keep_every}) has no effect without checkpoint.keep_last: all "
            "checkpoints are kept"
        )
    return lines + _reliability_warnings(config, plan)


def _reliability_warnings(config: Config, plan: Plan) -> list[str]:
    settings, stages, lines = config.reliability, plan.layout.pipeline, list[str]()
    every = settings.replay_every
    if every and (share := 2 * stages / (every * (plan.accumulation + stages - 1))) > REPLAY_SHARE:
        lines.append(
            f"WARNING: reliability.replay_every ({every}) makes the training about {share:.0%} longer: two more "
            f"micro-batches per {every} steps of {plan.accumulation}"
        )
    if settings.replay_tolerance and not every:
        lines.append(
            f"WARNING: reliability.replay_tolerance ({settings.replay_tolerance:g}) has no effect without "
            "reliability.replay_every: nothing is replayed"
        )
    if settings.hash_every and plan.layout.world == 1:
        lines.append(
            f"WARNING: reliability.hash_every ({settings.hash_every}) compares only weights with their masters on one "
            "rank, which has no copies of other ranks"
        )
    if settings.on_nonfinite == "rewind" and not config.checkpoint.every:
        lines.append(
            "WARNING: reliability.on_nonfinite=rewind has nothing to go back to with checkpoint.every=0, unless the "
            "run is resumed: set checkpoint.every"
        )
    return lines


def plan_values(plan: Plan) -> dict:
    """Returns the plan as JSON values."""
    values = {name: dict(value) if isinstance(value, Mapping) else value for name, value in vars(plan).items()}
    return values | {"dims": _sizes(plan.dims), "layout": dataclasses.asdict(plan.layout)}


def _sizes(dims: Dimensions) -> dict:
    """Returns the dimensions without the allocation of lookup rows, which has a number for each token."""
    sizes = dataclasses.asdict(dims)
    if sizes["lookup"]:
        del sizes["lookup"]["rows_per_token"]
    return sizes


def _number_lines(prefix: str, values: Mapping[str, object], why: Mapping[str, str]) -> list[str]:
    lines = []
    for name, value in values.items():
        text = f"{value:,}" if type(value) is int else f"{value:.6g}" if isinstance(value, float) else str(value)
        formula = why.get(prefix + name)
        lines.append(f"  {prefix}{name} = {text}" + (f"   [{formula}]" if formula else ""))
    return lines
