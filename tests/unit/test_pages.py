"""What README and docs quote is in the code: error texts, config keys, nanochat's arguments; links lead somewhere."""

import ast
import re
from pathlib import Path

import pytest

from megachat.config import Config, known_keys
from megachat.convert.nanochat_settings import SETTINGS

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "configs" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SECTIONS = "|".join(name for name, _ in Config())
KEY = re.compile(rf"(?<![\w/.])((?:{SECTIONS})\.[a-z_]\w*)(?![\w/(.-])")
FILES = {"md", "json", "sh", "py", "jsonl"}  # suffixes: data.md is a page
GAP = "\0"  # stands for what a message fills in
BASE_TRAIN = """
    run device-type fp8 fp8-recipe depth aspect-ratio head-dim max-seq-len window-pattern num-iterations target-flops
    target-param-data-ratio device-batch-size total-batch-size embedding-lr unembedding-lr weight-decay matrix-lr
    scalar-lr warmup-steps warmdown-ratio final-lr-frac resume-from-step eval-every eval-tokens core-metric-every
    core-metric-max-per-task sample-every save-every model-tag
""".split()  # the arguments of nanochat's scripts/base_train.py at 92d63d4


def messages() -> set[str]:
    """All string literals of the package, with GAP for the values in f-strings."""
    texts = set()
    for path in (ROOT / "megachat").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else GAP for part in node.values)
                texts.add("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.add(node.value)
    return texts


def test_error_texts_are_those_of_the_code():
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    quotes = re.findall(r"^> `(.+)`$", page, re.M)
    assert len(quotes) >= 15
    texts = messages()
    patterns = {quote: "(?s)" + ".*".join(re.escape(part.strip()) for part in quote.split("...")) for quote in quotes}
    assert [quote for quote, pattern in patterns.items() if not any(re.search(pattern, text) for text in texts)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_config_keys_exist(page):
    known = set(known_keys())
    code = re.findall(r"`([^`\n]+)`", page.read_text(encoding="utf-8"))
    keys = {key for text in code for key in KEY.findall(text) if key.rpartition(".")[2] not in FILES}
    if page.name == "python_api.md":
        keys = {key for key in keys if not key.startswith("model.")}  # attributes of a loaded model
    assert keys <= known


def test_every_argument_of_nanochat_has_a_row():
    page = (ROOT / "docs" / "coming_from_nanochat.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `--([a-z0-9-]+)` \| ([^|]+) \|", page, re.M))
    assert set(rows) == set(BASE_TRAIN)
    for theirs, ours in SETTINGS.items():
        assert f"`{ours}`" in rows[theirs.replace("_", "-")], theirs


def test_the_readme_is_short_and_its_links_lead_somewhere():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(readme.splitlines()) <= 90
    targets = [target for target in re.findall(r"\]\(([^)#]+)", readme) if not target.startswith("http")]
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_every_page_is_linked():
    text = "\n".join(path.read_text(encoding="utf-8") for path in PAGES)
    linked = {target.rpartition("/")[2] for target in re.findall(r"\]\(([^)#:]+)", text)}
    assert {path.name for path in (ROOT / "docs").glob("*.md")} - {"index.md"} <= linked


def test_anchors_exist():
    anchors = {}
    for path in PAGES:
        heads = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.M)
        anchors[path.resolve()] = {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}
    for path in PAGES:
        for target, anchor in re.findall(r"\]\(([\w./]*\.md)#([^)]+)\)", path.read_text(encoding="utf-8")):
            assert anchor in anchors[(path.parent / target).resolve()], f"{path.name}: {target}#{anchor}"
