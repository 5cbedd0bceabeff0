"""Determines which numbers of a plan a setting moves, by changing it: no list of dependencies to keep up to date."""

from collections.abc import Callable, Mapping
from functools import lru_cache, partial

import torch
from pydantic import ValidationError

from megachat.config import Config, config_from_values, known_keys
from megachat.device import DTYPES
from megachat.errors import UserError
from megachat.planning.key_docs import key_schema, other_values
from megachat.planning.memory import memory_of_stages
from megachat.planning.numbers import memory_numbers, plan_numbers
from megachat.planning.plan import resolve_plan
from megachat.planning.time_numbers import Timing

Numbers = dict[str, object]


def numbers_of(config: Config, world: int, vocab_size: int, *, memory: bool, timing: Timing | None = None) -> Numbers:
    """Returns all numbers of the plan; memory: also those of the fullest rank on a GPU with bfloat16; timing: also
    the predicted ones.

    Raises UserError for settings that fit no plan.
    """
    plan = resolve_plan(config, world, config.model.vocab_size or vocab_size)
    numbers = plan_numbers(plan) | (timing.numbers(config, plan) if timing else {})
    if not memory:
        return numbers
    dtype = DTYPES.get(config.precision.compute, torch.bfloat16)
    return numbers | memory_numbers(memory_of_stages(config, plan, dtype))


def moved(before: Mapping[str, object], after: Mapping[str, object]) -> dict[str, tuple[object, object]]:
    """Returns name -> (before, after) of the numbers that differ; None where a plan does not have the number."""
    names = dict.fromkeys((*before, *after))
    return {name: (before.get(name), after.get(name)) for name in names if before.get(name) != after.get(name)}


def with_value(config: Config, key: str, value: object) -> Config:
    """Returns the config with another value of `section.key`. Raises UserError if it is not allowed."""
    section, _, name = key.partition(".")
    values = config.model_dump(mode="json", exclude_defaults=True)
    values.setdefault(section, {})[name] = value
    return config_from_values(values, key)


def influenced(config: Config, key: str, numbers: Callable[[Config], Numbers]) -> list[str]:
    """Returns the numbers that some other allowed value of `section.key` moves, in the order of the plan.

    numbers: of a config; raises UserError for one that does not fit.
    """
    section, _, name = key.partition(".")
    before, names = numbers(config), set[str]()
    after: Numbers = {}
    for value in other_values(key_schema(key), config.model_dump(mode="json")[section][name]):
        try:
            after = numbers(with_value(config, key, value))
        except (UserError, ValidationError):
            continue
        names |= moved(before, after).keys()
        before |= {name: before.get(name) for name in after}
    return [name for name in before if name in names]


def influencing(config: Config, number: str, world: int, vocab_size: int, timing: Timing | None = None) -> list[str]:
    """Returns the settings of which some other allowed value moves a number of the plan (none of memory)."""
    if timing:
        numbers = partial(numbers_of, world=world, vocab_size=vocab_size, memory=False, timing=timing)
        return [key for key in known_keys() if number in influenced(config, key, numbers)]
    moves = _moves(config.model_dump_json(exclude_defaults=True), world, vocab_size)
    return [key for key, names in moves.items() if number in names]


@lru_cache(maxsize=2)
def _moves(config_json: str, world: int, vocab_size: int) -> dict[str, list[str]]:
    """Returns the numbers of the plan that each setting moves."""
    config = Config.model_validate_json(config_json)
    numbers = partial(numbers_of, world=world, vocab_size=vocab_size, memory=False)
    return {key: influenced(config, key, numbers) for key in known_keys()}
