"""checkpoint.json: what a checkpoint is, of which files, with their hashes; versions and how older ones are read."""

import hashlib
import json
from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from megachat.errors import UserError
from megachat.files import file_sha256, write_json

FACTS_NAME = "checkpoint.json"
FORMAT_VERSION = 2
ARCHITECTURE_VERSION = 1  # of the model's parameters: their names, shapes and meaning
HASH_THREADS = 4  # hashlib releases the interpreter lock


def checkpoint_name(step: int) -> str:
    """Folder name of a step's checkpoint; names sort as steps do, up to a million."""
    return f"step_{step:06d}"


def checkpoint_step(path: Path) -> int | None:
    """The step that a checkpoint folder's name tells; None for other names."""
    digits = path.name.removeprefix("step_")
    return int(digits) if path.name.startswith("step_") and digits.isdecimal() else None


def write_facts(checkpoint: Path, facts: dict) -> None:
    """Write checkpoint.json with its versions and its own hash; `facts` has "step" and "files", name -> {"bytes", "sha256"}."""
    facts = {"format_version": FORMAT_VERSION, "architecture_version": ARCHITECTURE_VERSION} | facts
    write_json(checkpoint / FACTS_NAME, facts | {"sha256": _own_hash(facts)})


def read_facts(checkpoint: Path) -> dict:
    """The facts of a complete checkpoint, in this version's form whatever wrote them; its files are there with their sizes.

    Raises UserError when it is none, is cut short, was changed, or is of a newer format or architecture.
    """
    path = checkpoint / FACTS_NAME
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        version, architecture = int(facts["format_version"]), int(facts.get("architecture_version", 1))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{checkpoint} is not a complete checkpoint: it has no {FACTS_NAME}; give another step's folder"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} cannot be read ({type(error).__name__}: {error}); give another step's folder"
        ) from None
    if version > FORMAT_VERSION:
        raise UserError(
            f"{checkpoint} has format {version}, newer than this version's {FORMAT_VERSION}: update megachat"
        )
    if architecture > ARCHITECTURE_VERSION:
        raise UserError(
            f"{checkpoint} is of architecture {architecture}, newer than this version's {ARCHITECTURE_VERSION}: update megachat"
        )
    try:
        if version >= 2 and facts.pop("sha256") != _own_hash(facts):
            raise UserError(
                f"{path} is not as it was saved (SHA-256): it was changed or damaged; give another step's folder"
            )
        while version < FORMAT_VERSION:
            facts = _UPGRADES[version](facts)
            version += 1
        missing = find_size_problems(checkpoint, facts)
        int(facts["step"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} cannot be read ({type(error).__name__}: {error}); give another step's folder"
        ) from None
    if missing:
        raise UserError(
            f"{checkpoint} is cut short: {missing[0]}; give another step's folder, or --resume auto for the newest complete one"
        )
    return facts


def find_size_problems(checkpoint: Path, facts: dict, names=None) -> list[str]:
    """Which of the checkpoint's files (or of those named) are missing or of another size, in words."""
    problems = []
    for name, entry in facts["files"].items():
        if names is not None and name not in names:
            continue
        path = checkpoint / name
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif path.stat().st_size != entry["bytes"]:
            problems.append(f"{name} has {path.stat().st_size} bytes, not {entry['bytes']}")
    return problems


def hash_files(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Name -> SHA-256 of files in the folder. Raises OSError."""
    names = list(names)
    with ThreadPoolExecutor(HASH_THREADS) as pool:
        return dict(zip(names, pool.map(lambda name: file_sha256(folder / name), names), strict=True))


def find_file_problems(folder: Path, facts: dict, names: Collection[str] | None = None) -> list[str]:
    """What is wrong with the checkpoint's files (or those named), in words, one a file: missing, of another size, of other content.

    facts: from `read_facts`. A file saved without a hash, by format 1, is compared by size alone.
    """
    problems = find_size_problems(folder, facts, names)
    wrong = {problem.split()[0] for problem in problems}
    wanted = {
        name: entry["sha256"]
        for name, entry in facts["files"].items()
        if (names is None or name in names) and entry["sha256"] is not None and name not in wrong
    }

    def found(name: str) -> str:
        try:
            return (
                ""
                if file_sha256(folder / name) == wanted[name]
                else f"{name} is not as it was saved (SHA-256): it was changed or damaged"
            )
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"

    with ThreadPoolExecutor(HASH_THREADS) as pool:
        return problems + [problem for problem in pool.map(found, wanted) if problem]


def files_of_rank(facts: dict, rank: int, ranks: int) -> set[str]:
    """The files that rank `rank` of `ranks` checks, so that all are checked once and each rank reads about as many bytes."""
    loads, mine = [0] * ranks, set()
    for name, entry in sorted(facts["files"].items(), key=lambda item: (-item[1]["bytes"], item[0])):
        least = loads.index(min(loads))
        loads[least] += entry["bytes"]
        if least == rank:
            mine.add(name)
    return mine


def _from_format_1(facts: dict) -> dict:
    """Format 1 had sizes without hashes, no ledger and no architecture version; its architecture is the first."""
    files = {name: {"bytes": size, "sha256": None} for name, size in facts["files"].items()}
    return facts | {"format_version": 2, "architecture_version": 1, "files": files, "ledger": None}


_UPGRADES = {1: _from_format_1}  # version -> to the next one


def _own_hash(facts: dict) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
