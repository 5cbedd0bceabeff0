"""The built-in corpus: source text of this machine's Python standard library, so that a run needs no download."""

import ast
import re
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from megachat.errors import UserError

_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "idlelib", "site-packages", "dist-packages", "__pycache__"}
# Tables and parsers that were written by a program have this in their first lines.
_GENERATED = re.compile(r"generated (by|from|and used)|auto-?generated|automatically generated", re.IGNORECASE)
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufffd]")
_DIGIT = re.compile(r"\d")
_MAX_LINE = 300
_TABLE_DOCUMENTS = 4  # one assignment longer than this many documents is a table


def read_standard_library(document_bytes: int, folder: Path | None = None) -> Iterator[str]:
    """Yields documents of at most about `document_bytes`, without duplicates, from modules in the order of their paths.

    A document is a module's docstring, classes and functions, as many neighbors as fit. folder: None for the running
    Python's library. Raises UserError if there is no source.
    """
    folder = folder or Path(sysconfig.get_path("stdlib"))
    seen: set[str] = set()
    for path in sorted(folder.rglob("*.py")):
        if _SKIPPED_FOLDERS.isdisjoint(path.relative_to(folder).parts):
            for document in cut_module(_read_module(path), document_bytes):
                if document not in seen:
                    seen.add(document)
                    yield document
    if not seen:
        raise UserError(
            f"this Python has no source of its standard library at {folder}: use --source text with some text files"
        )


def _read_module(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError):
        return ""
    return "" if _GENERATED.search(text[:500]) else text


def cut_module(text: str, document_bytes: int) -> list[str]:
    """Cuts a module between definitions, joining neighbors up to `document_bytes`. A module with errors gives none."""
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
        first, last = _lines_of(statement)
        if isinstance(statement, ast.Assign) and sum(map(len, lines[first:last])) > _TABLE_DOCUMENTS * document_bytes:
            lines[first:last] = [""] * (last - first)
    documents, current = [], ""
    cuts = [0, *_cuts(tree.body, document_bytes, lines), len(lines)]
    for start, end in zip(cuts, cuts[1:], strict=False):
        piece = "".join(filter(_is_prose, lines[start:end]))
        if current and len((current + piece).encode()) > document_bytes:
            documents.append(current)
            current = ""
        current += piece
    return [document.strip("\n") for document in (*documents, current) if document.strip()]


def _cuts(body: list[ast.stmt], document_bytes: int, lines: list[str]) -> Iterator[int]:
    """Yields the lines at which to cut: after each statement, also after those inside a class that is too long."""
    for statement in body:
        first, last = _lines_of(statement)
        if isinstance(statement, ast.ClassDef) and sum(map(len, lines[first:last])) > document_bytes:
            yield from _cuts(statement.body[:-1], document_bytes, lines)
        yield last


def _lines_of(statement: ast.stmt) -> tuple[int, int]:
    """Returns (first line, end) of a statement, counted from 0."""
    assert statement.end_lineno is not None  # the parser sets it
    return statement.lineno - 1, statement.end_lineno


def _is_prose(line: str) -> bool:
    """Returns False for lines of tables or escaped bytes and for very long lines."""
    if len(line) > _MAX_LINE or _UNPRINTABLE.search(line) or line.count("\\x") + line.count("\\u") > 4:
        return False
    return len(line) < 40 or not _DIGIT.search(line) or 4 * sum(map(str.isalpha, line)) >= len(line)
