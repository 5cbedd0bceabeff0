"""The pages for contributors name files, functions and folders that exist."""

import re

import pytest

from tests.runs.job import ROOT

PAGES = ("docs/architecture.md", "docs/extending.md")
PATH = re.compile(r"`((?:[\w.]+/)*[\w.]+(?:\.py|\.md|\.sh|/))`")
NAME = re.compile(r"`([A-Za-z_]\w*(?:\.[a-z_]\w*)?)`")
NOT_CODE = {"auto", "grad", "inspect", "diff", "activity"}


@pytest.mark.parametrize("page", PAGES)
def test_paths_exist(page):
    paths = PATH.findall((ROOT / page).read_text(encoding="utf-8"))
    assert len(paths) > 20
    missing = [path for path in paths if not ((ROOT / path).exists() or (ROOT / "megachat" / path).exists())]
    assert missing == []


@pytest.mark.parametrize("page", PAGES)
def test_names_exist(page):
    sources = [*(ROOT / "megachat").rglob("*.py"), *(ROOT / "tools").rglob("*.py")]
    words = set(re.findall(r"\w+", "\n".join(path.read_text(encoding="utf-8") for path in sources)))
    names = [name for name in NAME.findall((ROOT / page).read_text(encoding="utf-8")) if name not in NOT_CODE]
    assert len(names) > 10
    assert [name for name in names if not set(name.split(".")) <= words] == []


@pytest.mark.parametrize("page", sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md")))
def test_links_exist(page):
    targets = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", (ROOT / page).read_text(encoding="utf-8"))
    assert [target for target in targets if not ((ROOT / page).parent / target).exists()] == []
