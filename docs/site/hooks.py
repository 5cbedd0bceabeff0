"""Hooks of mkdocs: pages that are outside of docs/ get a place in the site, and links follow."""

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[2]
# File of the repository outside of docs/ -> its page
OUTSIDE = {
    "README.md": "index.md",
    "configs/README.md": "configs.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "LOG.md": "log.md",
}
_SOURCE = {page: path for path, page in OUTSIDE.items()}
_LINK = re.compile(r"(!?)\[((?:[^][]|\[[^][]*\])*)\]\(([^)\s#:]+)(#[^)\s]*)?\)")


def on_files(files, config):
    """Adds the pages outside of docs/."""
    for path, page in OUTSIDE.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Returns the text with links that work in the site; a link to a file without a page becomes its text."""
    source = _SOURCE.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def link(match: re.Match) -> str:
        image, text, target, anchor = match[1], match[2], match[3], match[4] or ""
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        goal = OUTSIDE.get(path, path.removeprefix("docs/") if path.startswith("docs/") else None)
        if goal is None and (ROOT / path).exists():
            return f"`{path}`" if text.strip("`") in (path, target) else f"{text} (`{path}`)"
        return f"{image}[{text}]({goal or target}{anchor})"

    return _four_spaces(_LINK.sub(link, markdown))


def _four_spaces(text: str) -> str:
    """Returns the text with four spaces per level of a list and an empty line before it, which this renderer needs.

    GitHub takes two or three spaces, and no empty line.
    """
    lines, levels, code, in_item = [], [], False, False
    for line in text.split("\n"):
        while line.strip() and levels and len(line) - len(line.lstrip()) < levels[-1]:
            levels.pop()  # the column where an item's text begins
        start, depth = (levels[-1], len(levels)) if levels else (0, 0)
        code ^= line.lstrip().startswith("```")
        item = None if code else re.match(r"(?:[-*]|\d+\.) +", line[start:])
        if item and not in_item and lines and lines[-1].strip():
            lines.append("")
        if item:
            levels.append(start + item.end())
        in_item = bool(item) or in_item and bool(line.strip())
        lines.append(" " * 4 * depth + line[start:])
    return "\n".join(lines)
