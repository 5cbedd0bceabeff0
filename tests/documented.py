"""The commands of the pages: every line of a code block that a reader may type."""

import re
import shlex
from typing import NamedTuple

from tests.runs.job import ROOT

PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    "configs/README.md",
    *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))),
)
SHELLS = {"", "bash", "console", "sh"}  # languages of fenced blocks with commands


class Line(NamedTuple):
    """A command line as it stands in a page."""

    page: str
    number: int
    text: str

    @property
    def words(self) -> list[str]:
        return shlex.split(self.text, comments=True)


def documented_lines() -> list[Line]:
    """Returns the lines of all code blocks, without comments and with continued lines joined."""
    lines = []
    for page in PAGES:
        fence, code, joined = None, False, ""
        before = ""
        for number, line in enumerate((ROOT / page).read_text(encoding="utf-8").splitlines(), 1):
            if mark := re.match(r" *```(\w*)", line):
                fence = mark[1] if fence is None else None
            code = line.startswith("    ") and (code or not before.strip())  # indented after an empty line
            if not mark and (fence in SHELLS if fence is not None else code):
                joined += line.strip().removeprefix("$ ")
                if joined.endswith("\\"):
                    joined = joined[:-1]
                elif joined and not joined.startswith("#"):
                    lines.append(Line(page, number, joined))
                    joined = ""
                else:
                    joined = ""
            before = line
    return lines
