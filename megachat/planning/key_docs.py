"""What each config key means: type, default, range and meaning, from its declaration in settings/."""

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from megachat.config import Config, known_keys
from megachat.config_checks import hint
from megachat.errors import UserError

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
    kind, allowed = _schema_words(schema)
    if reason := schema.get("reason"):
        allowed += f" ({reason})"
    return KeyDescription(key, schema["description"], kind, json.dumps(schema["default"]), allowed)


def key_schema(key: str) -> dict[str, Any]:
    """Returns the key's JSON schema with its default. Raises UserError for an unknown key."""
    sections = {name: type(section).model_fields for name, section in Config()}
    section, _, name = key.partition(".")
    if key not in known_keys():
        raise UserError(f"unknown key {key}; {hint([section, name] if name else [section], sections)}")
    return type(getattr(Config(), section)).model_json_schema()["properties"][name]


def _schema_words(schema: dict[str, Any]) -> tuple[str, str]:
    """Returns the type and the range of a JSON schema in words."""
    if choices := schema.get("anyOf"):
        parts = [_schema_words(choice) for choice in choices]
        return " or ".join(kind for kind, _ in parts), "; ".join(allowed for _, allowed in parts if allowed)
    if values := schema.get("enum"):
        return " or ".join(json.dumps(value) for value in values), ""
    if inner := schema.get("items", schema.get("additionalProperties")):
        kind, allowed = _schema_words(inner)
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
    ranges = [text.format(_limit_text(schema[limit])) for limit, text in limits.items() if limit in schema]
    return kinds.get(schema["type"], schema["type"]), ", ".join(ranges)


def _limit_text(value: Any) -> str:
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
            names = choice.get("items", {}).get("enum")
            yield from [[name] for name in names] if names else _LISTS
        elif kind == "string":
            yield from ("L", "other")
