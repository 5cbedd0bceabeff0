"""The embedded corpus: the source text of this machine's own Python standard library, so that a run needs no download anywhere."""

import ast
import re
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from megachat.errors import UserError

_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "idlelib", "site-packages", "dist-packages", "__pycache__"}
# Tables and parsers that a program wrote: their first lines say so.
_GENERATED = re.compile(r"generated (by|from|and used)|auto-?generated|automatically generated", re.IGNORECASE)
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufffd]")
_DIGIT = re.compile(r"\d")
_LONGEST_LINE = 300
# One assignment that fills so many documents is a table.
_TABLE_DOCUMENTS = 4


def read_standard_library(document_bytes: int, folder: Path | None = None) -> Iterator[str]:
    """Documents of at most about `document_bytes`: the docstring, classes and functions of each module, neighbours together, no text twice.

    folder: None for this Python's. Files in the order of paths. Raises UserError when there is no source.
    """
    folder = folder or Path(sysconfig.get_path("stdlib"))
    seen: set[str] = set()
    for path in sorted(folder.rglob("*.py")):
        if _SKIPPED_FOLDERS.isdisjoint(path.relative_to(folder).parts):
            for document in cut_module(_read(path), document_bytes):
                if document not in seen:
                    seen.add(document)
                    yield document
    if not seen:
        raise UserError(
            f"this Python has no source of its standard library at {folder}: use --source text with some text files"
        )


def _read(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError):
        return ""
    return "" if _GENERATED.search(text[:500]) else text


def cut_module(text: str, document_bytes: int) -> list[str]:
    """A module's documents: pieces between definitions, joined while they stay within `document_bytes`. What cannot be parsed gives none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError):
        return []
    lines = [
        line + "\n" for line in text.split("\n")
    ]  # as the parser counts them; splitlines() also cuts at form feeds
    for statement in tree.body:
        first, last = statement.lineno - 1, statement.end_lineno
        if isinstance(statement, ast.Assign) and sum(map(len, lines[first:last])) > _TABLE_DOCUMENTS * document_bytes:
            lines[first:last] = [""] * (last - first)
    documents, current = [], ""
    cuts = [0, *_cuts(tree.body, document_bytes, lines), len(lines)]
    for start, end in zip(cuts, cuts[1:], strict=False):
        piece = "".join(filter(_is_text, lines[start:end]))
        if current and len((current + piece).encode()) > document_bytes:
            documents.append(current)
            current = ""
        current += piece
    return [document.strip("\n") for document in (*documents, current) if document.strip()]


def _cuts(body: list[ast.stmt], document_bytes: int, lines: list[str]) -> Iterator[int]:
    """Lines at which the text may be cut: after each statement, and after each one inside a class that is too long."""
    for statement in body:
        first, last = statement.lineno - 1, statement.end_lineno
        if isinstance(statement, ast.ClassDef) and sum(map(len, lines[first:last])) > document_bytes:
            yield from _cuts(statement.body[:-1], document_bytes, lines)
        yield last


def _is_text(line: str) -> bool:
    """False for lines of tables and of escaped bytes, and for very long ones."""
    if len(line) > _LONGEST_LINE or _UNPRINTABLE.search(line) or line.count("\\x") + line.count("\\u") > 4:
        return False
    return len(line) < 40 or not _DIGIT.search(line) or 4 * sum(map(str.isalpha, line)) >= len(line)
