"""The check, at import, that the installed DeepSpeed is the version whose private names we rely on."""

from megachat.device import variable
from megachat.errors import UserError

OVERRIDE = "MEGACHAT_ANY_DEEPSPEED"  # environment variable: 1 accepts another version that has all private names


def missing_names(private_names: dict[type, list[str]]) -> list[str]:
    """Returns the listed names that the classes neither define nor use in a method, as "Class.name"."""
    missing = []
    for cls, names in private_names.items():
        functions = [value for base in cls.__mro__ for value in vars(base).values()]
        codes = [code for function in functions if (code := getattr(function, "__code__", None))]
        used = {name for code in codes for name in code.co_names}
        missing += [f"{cls.__name__}.{name}" for name in names if not hasattr(cls, name) and name not in used]
    return missing


def check_deepspeed(version: str, tested: str, private_names: dict[type, list[str]]) -> None:
    """Raises UserError unless `version` is the tested one or the user accepts another, and all private names exist."""
    install = f"pip install deepspeed=={tested}"
    if version != tested and variable(OVERRIDE) != "1":
        raise UserError(
            f"DeepSpeed {version} is installed, but megachat relies on private names of {tested}: {install}, "
            f"or set {OVERRIDE}=1 to try this version"
        )
    if missing := missing_names(private_names):
        raise UserError(f"DeepSpeed {version} has no {', '.join(missing)}, which megachat uses: {install}")
