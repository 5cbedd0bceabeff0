"""The space of a sweep: which settings vary and between which values, from a JSON file."""

import difflib
import json
import math
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple, get_args

from megachat.config import Config, known_keys
from megachat.errors import UserError
from megachat.files import refuse_damaged
from megachat.studies.trials import as_settings, refuse_fixed

_RANGE_KEYS = {"low", "high", "log", "step"}


class Dimension(NamedTuple):
    """A setting that varies. values: of a list, JSON values; empty for a range from low to high, both included."""

    key: str
    values: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    step: float | None = None

    @property
    def whole(self) -> bool:
        """Whether the setting takes whole numbers only."""
        section, _, name = self.key.partition(".")
        kind = type(getattr(Config(), section)).model_fields[name].annotation
        kinds = {kind, *get_args(kind)}
        return int in kinds and float not in kinds


def load_space(path: Path) -> tuple[Dimension, ...]:
    """Reads {"section.key": [values] or {"low": a, "high": b, "log": true}}.

    A range of a setting of whole numbers has whole numbers; "step" makes equal steps. Raises UserError for unknown
    keys, those that a sweep sets itself, and empty or impossible lists or ranges.
    """
    if not path.exists():
        raise UserError(f"--space {path} does not exist: give a JSON file of section.key -> list or range")
    fix = "give a JSON object of section.key -> list or range"
    with refuse_damaged(path, f"is no space ({{}}): {fix}"):
        space = json.loads(path.read_bytes())
    if not isinstance(space, dict):
        raise UserError(f"{path} is no JSON object: {fix}")
    if not space:
        raise UserError(f"{path} is empty: {fix}")
    return tuple(_dimension(path, key, values) for key, values in space.items())


def _dimension(path: Path, key: str, values: Any) -> Dimension:
    if key not in known_keys():
        near = difflib.get_close_matches(key, known_keys(), n=1)
        raise UserError(f"{path}: unknown key {key}{f'; did you mean {near[0]}?' if near else ''}")
    refuse_fixed([key], ["run"], str(path))
    if isinstance(values, list):
        if not values or len({json.dumps(value) for value in values}) < len(values):
            raise UserError(f"{path}: {key} has {json.dumps(values)}: give a list of different values")
        return Dimension(key, tuple(values))
    if not isinstance(values, dict) or not {"low", "high"} <= values.keys() <= _RANGE_KEYS:
        raise UserError(f"{path}: {key} is {json.dumps(values)}: give a list, or a range with low, high, log and step")
    dimension = Dimension(key, **values)
    numbers = [values[name] for name in ("low", "high", "step") if values.get(name) is not None]
    if not all(is_number(number) and math.isfinite(number) for number in numbers):
        raise UserError(f"{path}: {key} is {json.dumps(values)}: low, high and step are numbers")
    if dimension.whole and not all(isinstance(number, int) for number in numbers):
        raise UserError(f"{path}: {key} is {json.dumps(values)}: {key} takes whole numbers, so give whole ones")
    if not isinstance(dimension.log, bool) or (dimension.step is not None and dimension.step <= 0):
        raise UserError(f"{path}: {key} is {json.dumps(values)}: log is true or false, and step is above 0")
    if not dimension.low < dimension.high or (dimension.log and not (dimension.low > 0 and dimension.step is None)):
        raise UserError(
            f"{path}: {key} is {json.dumps(values)}: low must be below high, and a log range needs a low above 0 and "
            "no step"
        )
    return dimension


def grid(space: Sequence[Dimension]) -> list[dict[str, Any]] | None:
    """Returns all combinations, first key slowest; None if a setting has a range."""
    if not all(dimension.values for dimension in space):
        return None
    keys = [dimension.key for dimension in space]
    return [dict(zip(keys, values, strict=True)) for values in product(*(dimension.values for dimension in space))]


def points_to_check(space: Sequence[Dimension]) -> list[tuple[str, ...]]:
    """Returns the settings to load at the start, so that impossible ones are refused: all points of a grid, else each
    value and end of a range alone; and those of the baselines."""
    alone = [
        {dimension.key: value} for dimension in space for value in (dimension.values or (dimension.low, dimension.high))
    ]
    return [as_settings(point) for point in (*(grid(space) or alone), *contexts(space))]


def is_number(value: Any) -> bool:
    """Returns whether a JSON value is a number; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


_SIZE_SECTIONS = ("model", "data", "batch", "horizon")  # sections of settings that move the result by themselves


def contexts(space: Sequence[Dimension]) -> list[dict[str, Any]]:
    """Returns the combinations of the listed sizes in a space that has other settings, too: a rate at depth 4 is
    compared with the config at depth 4. [{}] where there are none.
    """
    sizes = [dimension for dimension in space if dimension.values and dimension.key.split(".")[0] in _SIZE_SECTIONS]
    return (grid(sizes) or [{}]) if 0 < len(sizes) < len(space) else [{}]
