"""Layouts as text: on a command line, dp=2,tp=2,pp=2, and in logs."""

import re
from collections.abc import Mapping

from megachat.errors import UserError

_AXES = {"dp": "data", "tp": "tensor", "pp": "pipeline"}


def parse_layout(text: str) -> dict[str, int]:
    """Returns "tp=2,pp=2" as {"data": 1, "tensor": 2, "pipeline": 2}. Raises UserError."""
    sizes: dict[str, int] = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*(dp|tp|pp)\s*=\s*([1-9][0-9]{0,5})\s*", part)
        if not match:
            raise UserError(
                f"layout {text}: {part!r} is not an axis and its size of at least 1; give them as tp=2,pp=2,dp=2"
            )
        if _AXES[match[1]] in sizes:
            raise UserError(f"layout {text}: {match[1]} is given twice; keep one")
        sizes[_AXES[match[1]]] = int(match[2])
    return dict.fromkeys(_AXES.values(), 1) | sizes


def layout_name(sizes: Mapping[str, int]) -> str:
    """Returns {"data": 2, "tensor": 1, "pipeline": 1} as on a command line: "dp=2,tp=1,pp=1"."""
    return ",".join(f"{short}={sizes[axis]}" for short, axis in _AXES.items())


def describe_layout(sizes: Mapping[str, int]) -> str:
    """Returns the same as in logs: "data 2 x tensor 1 x pipeline 1"."""
    return " x ".join(f"{axis} {sizes[axis]}" for axis in _AXES.values())
