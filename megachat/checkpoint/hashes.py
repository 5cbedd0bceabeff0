"""SHA-256 of files, several at once: hashlib lets other threads run."""

import hashlib
from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from megachat.checkpoint.facts import size_problems

_CHUNK_BYTES = 4 << 20
THREADS = 4


def file_hash(path: Path) -> str:
    """SHA-256 of a file's content, hex. Raises OSError."""
    digest, buffer = hashlib.sha256(), bytearray(_CHUNK_BYTES)
    view = memoryview(buffer)
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(view):
            digest.update(view[:count])
    return digest.hexdigest()


def hash_files(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Name -> SHA-256 of files in the folder. Raises OSError."""
    names = list(names)
    with ThreadPoolExecutor(THREADS) as pool:
        return dict(zip(names, pool.map(lambda name: file_hash(folder / name), names), strict=True))


def check_files(folder: Path, facts: dict, names: Collection[str] | None = None) -> list[str]:
    """What is wrong with the checkpoint's files (or those named), in words, one a file: missing, of another size, of other content.

    facts: from `read_facts`. A file saved without a hash, by format 1, is compared by size alone.
    """
    problems = size_problems(folder, facts, names)
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
                if file_hash(folder / name) == wanted[name]
                else f"{name} is not as it was saved (SHA-256): it was changed or damaged"
            )
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"

    with ThreadPoolExecutor(THREADS) as pool:
        return problems + [problem for problem in pool.map(found, wanted) if problem]


def share(facts: dict, rank: int, ranks: int) -> set[str]:
    """The files that rank `rank` of `ranks` checks, so that all are checked once and each rank reads about as many bytes."""
    loads, mine = [0] * ranks, set()
    for name, entry in sorted(facts["files"].items(), key=lambda item: (-item[1]["bytes"], item[0])):
        least = loads.index(min(loads))
        loads[least] += entry["bytes"]
        if least == rank:
            mine.add(name)
    return mine
