"""How a layout is named on a command line: dp=2,tp=2,pp=2."""

import re

from megachat.errors import UserError

_AXES = {"dp": "data", "tp": "tensor", "pp": "pipeline"}


def parse_layout(text: str) -> dict[str, int]:
    """Returns "tp=2,pp=2" as {"data": 1, "tensor": 2, "pipeline": 2}. Raises UserError."""
    sizes: dict[str, int] = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*(dp|tp|pp)\s*=\s*([1-9][0-9]{0,5})\s*", part)
        if not match:
            raise UserError(f"layout {text}: {part!r} is not an axis and its size; give them as tp=2,pp=2,dp=2")
        if _AXES[match[1]] in sizes:
            raise UserError(f"layout {text}: {match[1]} is given twice; keep one")
        sizes[_AXES[match[1]]] = int(match[2])
    return dict.fromkeys(_AXES.values(), 1) | sizes
