"""The names that `megachat explain` knows. Imports no torch, so that a wrong name ends the command at once."""

import difflib

from megachat.config import known_keys
from megachat.errors import UserError
from megachat.planning.numbers import NUMBERS
from megachat.planning.time_numbers import TIME_NUMBERS


def explained_as(name: str) -> tuple[str | None, str | None]:
    """Returns the setting and the number of the plan that a name means. Raises UserError if it means neither."""
    key, number = _settings_named(name), _number_named(name)
    if key is None and number is None:
        raise UserError(_unknown(name))
    return key, number


def _settings_named(name: str) -> str | None:
    """Returns the setting of this name, or the only one whose key is this; None if there is none, or a number is."""
    keys = known_keys()
    same = [key for key in keys if key.partition(".")[2] == name]
    return name if name in keys else same[0] if len(same) == 1 and name not in NUMBERS else None


def _number_named(name: str) -> str | None:
    known = NUMBERS | TIME_NUMBERS
    same = [number for number in NUMBERS if number.rpartition(".")[2] == name]
    return name if name in known else same[0] if len(same) == 1 and not _settings_named(name) else None


def _unknown(name: str) -> str:
    names = [*known_keys(), *NUMBERS, *TIME_NUMBERS]
    last = name.rpartition(".")[2]
    near = [one for one in names if one.rpartition(".")[2] == last]
    near = near or difflib.get_close_matches(name, names, 4, 0.6)
    near += [one for one in names if difflib.get_close_matches(last, [one.rpartition(".")[2]], 1, 0.8)]
    listed = ", ".join(list(dict.fromkeys(near))[:5])
    hint = f"did you mean {listed}?" if near else "`megachat explain` without a name lists all of them"
    return f"{name} is neither a setting nor a number of the plan: {hint}"


def describe_names() -> str:
    """Returns all names that can be explained."""
    settings, numbers = ([f"  {name}" for name in names] for names in (known_keys(), NUMBERS | TIME_NUMBERS))
    return "\n".join(["settings", *settings, "numbers of the plan", *numbers])
