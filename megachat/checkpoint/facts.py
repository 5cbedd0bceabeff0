"""checkpoint.json: what a checkpoint holds, its files with sizes and hashes, and how older format versions are read."""

import hashlib
import json
from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from megachat.errors import UserError, raise_if_unreadable
from megachat.files import file_sha256, lfs_problem, path_kind, refuse_damaged, write_json

FACTS_NAME = "checkpoint.json"
FORMAT_VERSION = 2
ARCHITECTURE_VERSION = 2  # of the model's parameters: their names, shapes and meaning
HASH_THREADS = 4  # hashlib releases the interpreter lock


def checkpoint_name(step: int) -> str:
    """Returns the folder name of a step's checkpoint. Names sort like steps, up to step 999,999."""
    return f"step_{step:06d}"


def checkpoint_step(path: Path) -> int | None:
    """Returns the step in a checkpoint folder's name, None for other names."""
    digits = path.name.removeprefix("step_")
    return int(digits) if path.name.startswith("step_") and digits.isdecimal() else None


def require_checkpoint_folder(path: Path) -> None:
    """Raises UserError if the path cannot be a checkpoint of any format or a run, because it is no folder."""
    if path_kind(path) != "folder":
        raise UserError(
            f"{path} is not a folder: give a checkpoint's step folder, a run folder, or a folder of another format"
        )


def write_facts(checkpoint: Path, facts: dict) -> None:
    """Writes checkpoint.json with the versions and a hash of its content.

    facts: must have "step" and "files", a dict of name -> {"bytes", "sha256"}.
    """
    facts = {"format_version": FORMAT_VERSION, "architecture_version": ARCHITECTURE_VERSION} | facts
    write_json(checkpoint / FACTS_NAME, facts | {"sha256": _hash_of_facts(facts)})


def read_facts(checkpoint: Path) -> dict:
    """Reads checkpoint.json, upgraded to the current format, and checks that all files exist with their sizes.

    Raises UserError when the checkpoint is incomplete, was changed, or has a newer format or architecture, and
    UnreadableError when the system refuses to read it.
    """
    path = checkpoint / FACTS_NAME
    if not path_kind(path):
        raise UserError(
            f"{checkpoint} is not a complete checkpoint: it has no {FACTS_NAME}; use another step's checkpoint"
        )
    with refuse_damaged(path, "cannot be read ({}); use another step's checkpoint"):
        facts = json.loads(path.read_text(encoding="utf-8"))
        version, architecture = int(facts["format_version"]), int(facts.get("architecture_version", 1))
        for name, saved, supported in (
            ("format", version, FORMAT_VERSION),
            ("architecture", architecture, ARCHITECTURE_VERSION),
        ):
            if saved > supported:
                raise UserError(
                    f"{checkpoint} has {name} version {saved}, newer than this program's {supported}: update megachat"
                )
        if version >= 2 and facts.pop("sha256") != _hash_of_facts(facts):
            raise UserError(
                f"{path} does not match its SHA-256: it was changed or damaged; use another step's checkpoint"
            )
        for old_version in range(version, FORMAT_VERSION):
            facts = _UPGRADES[old_version](facts)
        facts = upgrade_architecture(facts, architecture)
        problems = find_file_problems(checkpoint, facts, sizes_only=True)
        int(facts["step"])
    if problems:
        raise UserError(
            f"{checkpoint} is incomplete: {problems[0]}; use another step's checkpoint, "
            "or --resume auto for the newest complete one"
        )
    return facts


def hash_files(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Returns name -> SHA-256 of the named files in the folder. Raises OSError."""
    names = list(names)
    with ThreadPoolExecutor(HASH_THREADS) as pool:
        return dict(zip(names, pool.map(lambda name: file_sha256(folder / name), names), strict=True))


def find_file_problems(
    folder: Path, facts: dict, names: Collection[str] | None = None, *, sizes_only: bool = False
) -> list[str]:
    """Returns one sentence for each of the checkpoint's files that is missing or has another size or content.

    facts: from `read_facts`. names: the files to check, None for all. Files saved by format 1 have no hash; only their
    sizes are compared. Raises UnreadableError if the system refuses to read a file.
    """

    def find_problem(name: str) -> str | None:
        path, saved = folder / name, facts["files"][name]
        try:
            if path_kind(path) != "file":
                return f"{name} is missing"
            if (size := path.stat().st_size) != saved["bytes"]:
                if pointer := lfs_problem(path):
                    return f"{name} {pointer}"
                return f"{name} has {size} bytes, not {saved['bytes']}"
            if sizes_only or saved["sha256"] is None or file_sha256(path) == saved["sha256"]:
                return None
        except OSError as error:
            raise_if_unreadable(path, error)
            return f"{name} cannot be read ({error.strerror})"
        return f"{name} does not match its SHA-256: it was changed or damaged"

    with ThreadPoolExecutor(HASH_THREADS) as pool:
        problems = pool.map(find_problem, [name for name in facts["files"] if names is None or name in names])
        return [problem for problem in problems if problem]


def files_of_rank(facts: dict, rank: int, ranks: int) -> set[str]:
    """Returns the files that a rank checks: each file is checked by one rank, and the bytes per rank are balanced."""
    bytes_of_rank, names = [0] * ranks, set()
    for name, entry in sorted(facts["files"].items(), key=lambda item: (-item[1]["bytes"], item[0])):
        least_loaded = bytes_of_rank.index(min(bytes_of_rank))
        bytes_of_rank[least_loaded] += entry["bytes"]
        if least_loaded == rank:
            names.add(name)
    return names


def _upgrade_format_1(facts: dict) -> dict:
    """Format 1 had sizes without hashes, no ledger, and the first architecture without a version number."""
    files = {name: {"bytes": size, "sha256": None} for name, size in facts["files"].items()}
    return facts | {"format_version": 2, "architecture_version": 1, "files": files, "ledger": None}


def upgrade_architecture(facts: dict, version: int) -> dict:
    """Returns the facts of a checkpoint of an architecture version as those of the current one."""
    if version < 2:  # no lookup layers
        model = {"lookup": None} | facts.get("model", {})
        facts = facts | {"architecture_version": 2} | ({"model": model} if "model" in facts else {})
    return facts


_UPGRADES = {1: _upgrade_format_1}  # version -> upgrade to the next version


def _hash_of_facts(facts: dict) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
