"""What changed between the checkpoint of a resumed run and the run: its config and the plan that follows from it."""

import json
from collections.abc import Iterator

from pydantic import ValidationError

from megachat.config import Config
from megachat.errors import UserError
from megachat.planning.dimensions import saved_dimensions
from megachat.planning.plan import Layout, Plan, resolve_plan

_REPORTED_SECTIONS = ("batch", "horizon", "optimizer")
_UNREPORTED = {"horizon.stop_step"}  # where a job pauses changes no step
_OF_ALLOCATION = ("allocation", "allocation_file", "sample_tokens", "max_rows_per_token")
_DERIVED = ("tokens_per_step", "steps", "weight_decay")


def saved_settings(facts: dict) -> tuple[Config, Plan] | None:
    """Returns the config and plan that a checkpoint was saved under, None if this version cannot derive them."""
    try:
        config = Config.model_validate_json(json.dumps(facts["config"]))
        lookup = saved_dimensions(facts["model"]).lookup
        return config, resolve_plan(config, Layout(**facts["layout"]).world, facts["tokenizer"]["vocab_size"], lookup)
    except (ValidationError, UserError, KeyError, TypeError):
        return None


def saved_flops(facts: dict, plan: Plan) -> int:
    """Returns the training FLOPs until a checkpoint that did not count them: its steps times a step of its config."""
    saved = saved_settings(facts)
    tokens = saved[1].tokens_per_step if saved else plan.tokens_per_step
    return plan.flops_per_token * tokens * facts["step"]


def describe_changes(facts: dict, config: Config, plan: Plan) -> list[str]:
    """Returns one line for each rate, schedule, horizon or batch setting, and each number derived from them, that
    differs from the checkpoint's.
    """
    saved = saved_settings(facts)
    if saved is None:
        return []
    before, now = saved[0].lookup, config.lookup
    kept = [key for key in _OF_ALLOCATION if getattr(before, key) != getattr(now, key)]
    notes = [f"lookup.{key} has changed; the allocation of the checkpoint stays" for key in kept if now.after_blocks]
    pairs = [*zip(_reported_settings(saved[0]), _reported_settings(config), strict=True)]
    pairs += zip(_derived(saved[1]), _derived(plan), strict=True)
    return notes + [
        f"changed since the checkpoint: {name} was {before} and is {now}"
        for (name, before), (_, now) in pairs
        if before != now
    ]


def _reported_settings(config: Config) -> Iterator[tuple[str, object]]:
    for section in _REPORTED_SECTIONS:
        for key, value in getattr(config, section):
            if f"{section}.{key}" not in _UNREPORTED:
                yield f"{section}.{key}", value


def _derived(plan: Plan) -> Iterator[tuple[str, object]]:
    for name in _DERIVED:
        yield f"{name} (derived)", getattr(plan, name)
    for name, rate in plan.rates.items():
        yield f"{name} rate (derived)", rate
