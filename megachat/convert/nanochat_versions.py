"""The versions of nanochat's GPT. Which tensors a checkpoint has shows which of them trained it.

Dates are those of the commits in https://github.com/karpathy/nanochat that changed the model: aa530cd (lambdas),
e85db6b (value embeddings), 6ed7d1d (constants, gates of 12 channels) and a825e63 (smear and backout).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

from megachat.convert.architecture import Shape
from megachat.errors import UserError
from megachat.planning.dimensions import WINDOW_TILE, Dimensions, up_to_multiple

_SMEAR = ("smear_gate.weight", "smear_lambda", "backout_lambda")
_CONSTANTS = ("rotary_base", "qk_scale", "norm_epsilon", "value_embeddings")


@dataclass(frozen=True)
class Version:
    """A version of nanochat's GPT.

    dates: of its first and last commit. absent: the tensors of the current version that it lacks; neutral values of
    them compute the same. constants: our sizes that differ from the current version's. short_window: row length -> the
    window that its letter S means.
    """

    dates: str
    absent: tuple[str, ...] = ()
    constants: Mapping[str, object] = field(default_factory=dict)
    short_window: Callable[[int], int] = lambda length: up_to_multiple(-(-length // 4), WINDOW_TILE)

    @property
    def is_current(self) -> bool:
        """True for the version whose optimizer and settings are known."""
        return not self.absent


CURRENT = Version("from 2026-03-14")
_FIRST = Version(
    "before 2026-01-11",
    ("resid_lambdas", "x0_lambdas", *_SMEAR),
    {"rotary_base": 10_000.0, "qk_scale": 1.0, "value_embeddings": False, "lambdas": "neutral"},
)
_LAMBDAS = Version(
    "from 2026-01-11 to 2026-01-16",
    _SMEAR,
    {"rotary_base": 10_000.0, "qk_scale": 1.0, "value_embeddings": False},
    lambda length: length // 2,
)
_VALUE_EMBEDDINGS = Version(
    "from 2026-03-09 to 2026-03-14",
    _SMEAR,
    {"qk_scale": 1.15},
    lambda length: up_to_multiple(-(-length // 3), WINDOW_TILE),
)
VERSIONS = (CURRENT, _VALUE_EMBEDDINGS, _LAMBDAS, _FIRST)


def version_of_tensors(shapes: Mapping[str, Shape], path: Path) -> Version:
    """Returns the version that has these tensors. Raises UserError for one that megachat's model does not compute."""
    if any("v0_lambdas" in name for name in shapes):
        raise UserError(_refusal(path, "of 2026-01-16", "has value embeddings with lambdas"))
    if any(name.endswith("ve_gate.weight") and shape[-1:] == (32,) for name, shape in shapes.items()):
        raise UserError(_refusal(path, "from 2026-01-16 to 2026-03-09", "has gates of 32 channels"))
    if any(name in shapes for name in _SMEAR):
        return CURRENT
    if any(name.startswith("value_embeds.") for name in shapes):
        return _VALUE_EMBEDDINGS
    return _LAMBDAS if "resid_lambdas" in shapes else _FIRST


def check_windows(version: Version, dims: Dimensions, pattern: str, path: Path) -> None:
    """Raises UserError if the letter S means another window in this version than in megachat's model."""
    short = version.short_window(dims.sequence_len)
    windows = [short if pattern[block % len(pattern)] == "S" else dims.sequence_len for block in range(dims.depth - 1)]
    if tuple(windows) != dims.windows[:-1]:
        raise UserError(_refusal(path, version.dates, f"has short windows of {short} tokens"))


def _refusal(path: Path, dates: str, what: str) -> str:
    return f"{path} is of a nanochat {dates}, which {what}: megachat's model cannot compute it, so it is not converted"


def version_of_model(dims: Dimensions) -> Version:
    """Returns the version that computes this model. Raises UserError if none does."""
    if dims.ngram or dims.lookup:
        what = "n-gram values" if dims.ngram else "lookup layers"
        raise UserError(f"the model has {what}, which nanochat does not have: convert it to safetensors instead")
    defaults = {each.name: each.default for each in fields(Dimensions)}
    for version in reversed(VERSIONS):  # the first has neutral lambdas, which the next ones could have too
        wanted = {name: defaults[name] for name in _CONSTANTS} | dict(version.constants)
        if all(getattr(dims, name) == value for name, value in wanted.items()):
            return version
    for name in _CONSTANTS:
        if (value := getattr(dims, name)) != defaults[name]:
            raise UserError(
                f"the model has {name} {value}, and nanochat computes {defaults[name]}: it cannot be converted"
            )
    raise AssertionError("a model with the current version's constants is of the current version")
