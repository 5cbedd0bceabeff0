"""megachat pretrains nanochat's GPT on a laptop's CPU or on many hosts, with equal results on every layout.

The names in __all__ are the Python API, see docs/python_api.md. They are imported when they are first used, so that
`import megachat` loads neither torch nor DeepSpeed.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megachat.api.model import Model, evaluate_core, load
    from megachat.api.runs import pretrain, resolve
    from megachat.errors import UserError
    from megachat.studies.metrics import read_metrics

__version__ = "0.1.0"
_MODULES = {
    "load": "megachat.api.model",
    "Model": "megachat.api.model",
    "evaluate_core": "megachat.api.model",
    "pretrain": "megachat.api.runs",
    "read_metrics": "megachat.studies.metrics",
    "resolve": "megachat.api.runs",
    "UserError": "megachat.errors",
}
__all__ = ["Model", "UserError", "evaluate_core", "load", "pretrain", "read_metrics", "resolve"]


def __getattr__(name: str):
    """Imports a name of the API."""
    if name not in _MODULES:
        raise AttributeError(f"module 'megachat' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_MODULES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
