"""The pages as a site: each is in the navigation, links work, nothing comes from another host, search works offline."""

import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.limits import limit_s
from tests.runs.job import ROOT

pytest.importorskip("mkdocs", reason="mkdocs-material is not installed: bash launch/setup.sh docs")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PAGES = [path.stem for path in sorted((ROOT / "docs").glob("*.md"))]
LOADED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "object": "data"}


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The built site. --strict refuses a broken link or a page that mkdocs.yml lacks, but not together with --quiet."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=limit_s(),
    )
    assert done.returncode == 0, done.stderr
    return folder


class Loaded(HTMLParser):
    """Collects what a browser loads with a page, and whether a page of the navigation is linked."""

    def __init__(self, page: Path):
        super().__init__()
        self.loaded, self.links = set[str](), set[str]()
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        if tag == "a" and "md-nav__link" in (values.get("class") or ""):
            self.links.add(values["href"])
        if tag == "link" and values.get("rel") != "canonical":
            self.loaded.add(values["href"])
        if tag in LOADED and values.get(LOADED[tag]):
            self.loaded.add(values[LOADED[tag]])


def test_every_page_is_in_the_navigation(site):
    links = Loaded(site / "index.html").links
    assert {f"{page}.html" for page in [*PAGES, "configs", "contributing", "changelog", "log"]} <= links
    assert (site / "index.html").read_text(encoding="utf-8").count("pictures/step.svg") == 1, "the README is the home"


def test_nothing_is_loaded_from_another_host(site):
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > len(PAGES)
    for page in pages:
        loaded = Loaded(page).loaded
        assert loaded and not [place for place in loaded if re.match(r"\w+:|//", place)], page
        assert 'class="mermaid"' not in page.read_text(encoding="utf-8"), "material loads mermaid from another host"
    for sheet in site.rglob("*.css"):
        text = sheet.read_text(encoding="utf-8")
        assert not re.search(r"""(?:url\(|@import)\s*["']?(?:https?:)?//""", text), sheet


def test_lists_and_emphasis_are_rendered(site):
    """Markdown that this renderer reads in another way than GitHub leaves its signs in the text."""
    for page in sorted(site.rglob("*.html")):
        text = re.sub(r"<(pre|code)\b.*?</\1>", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        if page.name != "log.html":  # old entries stay as they are
            for paragraph in re.findall(r"<p>(.*?)</p>", text, re.DOTALL):
                assert not re.search(r"^\s*(- |\d+\. |\|)|\*\*|\]\(", paragraph, re.MULTILINE), (
                    f"{page.name}: {paragraph}"
                )


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium (Debian: apt-get install chromium)")
def test_search_works_in_a_page_that_is_opened_as_a_file(site, tmp_path):
    line = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}"]
    line += ["--host-resolver-rules=MAP * ~NOTFOUND", "--virtual-time-budget=20000", "--dump-dom"]
    done = subprocess.run(
        [*line, f"{(site / 'index.html').as_uri()}?q=momentum"], capture_output=True, text=True, timeout=limit_s()
    )
    assert re.search(r"\d+ matching documents", done.stdout), done.stderr
