"""What each config key means: type, default, range and meaning from its declaration in settings.py, and the numbers of
the plan that it moves, measured by resolving plans. docs/configuration.md and `megachat explain` show these.
"""

import functools
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from megachat.config import Config, config_from_values, known_keys
from megachat.config_checks import hint
from megachat.errors import UserError
from megachat.planning.explain import plan_values
from megachat.planning.plan import Plan, resolve

MEMORY = "estimated memory"
MEMORY_SECTIONS = ("model", "lookup", "ngram", "batch", "optimizer", "precision", "parallel")  # what memory.py reads
_WORLD, _VOCABULARY = 8, 4096
# Small runs in which each key has its effect. Depth 4, because many rules are neutral at their reference depth 12.
_SMALL = {"depth": 4, "sequence_len": 512}
_RUNS: tuple[dict[str, dict[str, Any]], ...] = (
    {"model": _SMALL},
    {"model": _SMALL, "precision": {"fp8": "tensorwise"}, "parallel": {"pipeline": 2}},
    {
        "model": _SMALL | {"vocab_size": _VOCABULARY},
        "lookup": {"after_blocks": [1]},
        "ngram": {"blocks": [2]},
        "parallel": {"tensor": 2},
    },
)
_NUMBERS = (0, 1, 2, 3, 8, 64, 2**12, 2**20, 2**21, 10**16)
_LISTS: tuple[list[int], ...] = ([], [0], [1], [2], [2, 3, 4])


class KeyDescription(NamedTuple):
    """A config key in words. default: as JSON. allowed: the range, with the reason of an upper bound; may be empty."""

    key: str
    meaning: str
    kind: str
    default: str
    allowed: str


def describe_key(key: str) -> KeyDescription:
    """Returns the description of `section.key`. Raises UserError for an unknown key, with the nearest one."""
    schema = key_schema(key)
    kind, allowed = _words(schema)
    if reason := schema.get("reason"):
        allowed += f" ({reason})"
    return KeyDescription(key, schema["description"], kind, json.dumps(schema["default"]), allowed)


def moved_numbers(key: str, *, memory: bool = True) -> list[str]:
    """Returns the numbers of the plan that change in a small run when the key gets other values, and MEMORY.

    The names are those that `--dry-run` prints; several with the same prefix are shortened to `prefix.*`. memory: also
    compare the estimated memory, which imports torch. Raises UserError for an unknown key.
    """
    schema = key_schema(key)
    section, name = key.split(".")
    memory = memory and section in MEMORY_SECTIONS
    moved: set[str] = set()
    for number, run in enumerate(_RUNS):
        *_, before = _resolved(run)
        for value in other_values(schema, schema["default"]):
            values = run | {section: run.get(section, {}) | {name: value}}
            try:
                config, plan, after = _resolved(values)
            except UserError:  # this value does not fit this run
                continue
            moved |= {field for field in before.keys() | after.keys() if before.get(field) != after.get(field)}
            if memory and MEMORY not in moved and _memory(config, plan) != _unchanged_memory(number):
                moved.add(MEMORY)
    return _shortened(moved)


def key_schema(key: str) -> dict[str, Any]:
    """Returns the key's JSON schema with its default. Raises UserError for an unknown key."""
    sections = {name: type(section).model_fields for name, section in Config()}
    section, _, name = key.partition(".")
    if key not in known_keys():
        raise UserError(f"unknown key {key}; {hint([section, name] if name else [section], sections)}")
    return type(getattr(Config(), section)).model_json_schema()["properties"][name]


def _words(schema: dict[str, Any]) -> tuple[str, str]:
    """Returns the type and the range of a JSON schema in words."""
    if choices := schema.get("anyOf"):
        parts = [_words(choice) for choice in choices]
        return " or ".join(kind for kind, _ in parts), "; ".join(allowed for _, allowed in parts if allowed)
    if values := schema.get("enum"):
        return " or ".join(json.dumps(value) for value in values), ""
    if inner := schema.get("items", schema.get("additionalProperties")):
        kind, allowed = _words(inner)
        kind = kind.replace("number", "numbers").replace("text", "texts")
        return f"{'list' if 'items' in schema else 'object'} of {kind}", allowed
    kinds = {"integer": "whole number", "string": "text", "boolean": "true or false"}
    limits = {
        "minimum": "at least {}",
        "exclusiveMinimum": "above {}",
        "multipleOf": "a multiple of {}",
        "minLength": "at least {} long",
        "maxLength": "at most {} long",
        "pattern": "matches `{}`",
        "maximum": "at most {}",
    }
    ranges = [text.format(_number(schema[limit])) for limit, text in limits.items() if limit in schema]
    return kinds.get(schema["type"], schema["type"]), ", ".join(ranges)


def _number(value: Any) -> str:
    if not isinstance(value, (int, float)):
        return str(value)
    power = len(str(int(value))) - 1
    if value >= 10**6 and value == 10**power:
        return f"10^{power}"
    if value >= 2**20 and int(value + 1).bit_count() == 1:
        return f"2^{int(value).bit_length()} - 1"
    if value >= 2**20 and int(value).bit_count() == 1:
        return f"2^{int(value).bit_length() - 1}"
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def other_values(schema: dict[str, Any], known: Any) -> Iterator[Any]:
    """Yields values of the type that a JSON schema allows, and around the known one."""
    for choice in schema.get("anyOf", [schema]):
        kind = choice.get("type")
        if "enum" in choice:
            yield from choice["enum"]
        elif kind == "boolean":
            yield not known
        elif kind in ("integer", "number"):
            yield from _NUMBERS if known is None else (known * 2, known // 2 if kind == "integer" else known / 2)
            yield from () if known is None else (known + 1, 0)
        elif kind == "array":
            yield from _LISTS
        elif kind == "string":
            yield from ("L", "other")


def _resolved(values: dict[str, dict[str, Any]]) -> tuple[Config, Plan, dict[str, Any]]:
    """Returns the config, its plan, and the plan's numbers, flat. Raises UserError if the settings do not fit."""
    config = config_from_values(values, "a small run")
    plan = resolve(config, _WORLD, config.model.vocab_size or _VOCABULARY)
    flat = plan_values(plan)
    sizes, rates, _ = flat.pop("dims"), flat.pop("rates"), flat.pop("why")
    for name in ("lookup", "ngram"):
        flat |= {f"{name}.{key}": value for key, value in (sizes.pop(name) or {}).items()}
    return config, plan, flat | sizes | {f"rates.{name}": rate for name, rate in rates.items()}


def _memory(config: Config, plan: Plan) -> int:
    """Returns the estimated memory of the fullest rank in bytes."""
    import torch

    from megachat.device import DTYPES
    from megachat.planning.memory import memory_of_stages

    dtype = DTYPES.get(config.precision.compute, torch.bfloat16)
    return max(stage.total for stage in memory_of_stages(config, plan, dtype))


@functools.cache
def _unchanged_memory(run: int) -> int:
    config, plan, _ = _resolved(_RUNS[run])
    return _memory(config, plan)


def _shortened(names: set[str]) -> list[str]:
    prefixes = [name.partition(".")[0] for name in names if "." in name]
    return sorted({f"{p}.*" if prefixes.count(p := name.partition(".")[0]) > 2 else name for name in names})
