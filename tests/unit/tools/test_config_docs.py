"""docs/configuration.md and configs/schema.json say what the settings declare."""

import json
import re

import pytest

from megachat.config import known_keys, load_config
from megachat.errors import UserError
from tests.runs.job import ROOT
from tools.config_docs import (
    MEMORY,
    MEMORY_SECTIONS,
    PAGE,
    SCHEMA,
    config_schema,
    configuration_page,
    main,
    moved_numbers,
)

CONFIGS = sorted((ROOT / "configs").glob("d*.json"))
UPDATE = "run python tools/config_docs.py and commit the result"


def test_the_page_is_what_the_code_declares():
    """All but the estimated memory, which takes longer and is tested below."""
    page = PAGE.read_text(encoding="utf-8")
    entries = dict(re.findall(r"^### (.*)\n((?:(?!#).*\n)*)", page, re.MULTILINE))
    assert list(entries) == known_keys()
    with_memory = {key for key, entry in entries.items() if MEMORY in entry}
    assert len(with_memory) > 20

    def moved(key: str) -> list[str]:
        return sorted([*moved_numbers(key, memory=False), *([MEMORY] if key in with_memory else [])])

    assert page == configuration_page(moved), UPDATE


def test_the_schema_is_what_the_code_declares():
    assert json.loads(SCHEMA.read_text(encoding="utf-8")) == config_schema(), UPDATE


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_a_config_names_the_schema_and_has_its_keys(path):
    values = json.loads(path.read_text(encoding="utf-8"))
    assert (path.parent / values.pop("$schema")) == SCHEMA
    schema = config_schema()
    for section, keys in values.items():
        definition = schema["properties"][section]["$ref"].rpartition("/")[2]
        assert keys.keys() <= schema["$defs"][definition]["properties"].keys()


def test_the_schema_is_no_setting(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"$schema": "anywhere", "model": {"depth": 3}}')
    assert load_config(path).model_dump(exclude_defaults=True) == {"model": {"depth": 3}}
    path.write_text('{"model": {"$schema": "anywhere"}}')
    with pytest.raises(UserError, match=r"unknown key model\.\$schema"):
        load_config(path)


def test_main_writes_both(tmp_path, monkeypatch):
    monkeypatch.setattr("tools.config_docs.PAGE", tmp_path / "page.md")
    monkeypatch.setattr("tools.config_docs.SCHEMA", tmp_path / "schema.json")
    monkeypatch.setattr("tools.config_docs.configuration_page", lambda: "page")
    main([])
    assert (tmp_path / "page.md").read_text() == "page"
    assert json.loads((tmp_path / "schema.json").read_text()) == config_schema()


@pytest.mark.parametrize(
    ("key", "numbers"),
    [
        ("optimizer.embedding_lr", ["rates.embedding", "rates.value_embedding"]),
        ("horizon.steps", ["steps", "stop_step", "total_flops", "total_tokens"]),
        ("batch.recompute", [MEMORY]),
        ("parallel.sequence", [MEMORY]),
        ("ngram.storage", [MEMORY]),
        ("lookup.score_scale", ["lookup.score_scale"]),
        ("parallel.tensor", ["accumulation", MEMORY, "layout.data", "layout.tensor", "micro_rows"]),
        ("checkpoint.every", []),
    ],
)
def test_moved_numbers(key, numbers):
    assert moved_numbers(key) == numbers
    assert moved_numbers(key, memory=False) == [number for number in numbers if number != MEMORY]


def test_memory_depends_on_no_other_section():
    sections = set()
    for name in ("memory.py", "manifest.py", "row_tables.py"):
        text = (ROOT / "megachat/planning" / name).read_text(encoding="utf-8")
        sections |= set(re.findall(r"\bconfig\.([a-z0-9]+)\b", text))
    assert len(sections) > 3 and sections <= set(MEMORY_SECTIONS)
