"""Descriptions of config keys, and the numbers of the plan that they move."""

import re

import pytest

from megachat.config import known_keys
from megachat.errors import UserError
from megachat.planning import key_docs
from megachat.planning.key_docs import MEMORY, describe_key, moved_numbers
from tests.runs.job import ROOT


def test_every_key_is_described():
    for key in known_keys():
        description = describe_key(key)
        assert description.key == key and description.kind and description.default
        assert len(description.meaning.split()) > 2 or key in ("model.head_size", "model.sequence_len"), key


@pytest.mark.parametrize(
    ("key", "kind", "default", "allowed"),
    [
        ("model.kv_heads", "whole number or null", "null", "at least 1, at most 2^24 (such a model fits no device)"),
        ("model.window_pattern", "text", '"SSSL"', "matches `^[SL]+$`"),
        ("precision.fp8", '"off" or "tensorwise" or "blockwise"', '"off"', ""),
        ("ngram.orders", "list of whole numbers", "[2, 3]", "at least 2, at most 8"),
        ("run.seed", "whole number", "42", "at least 0, at most 2^63 - 1 (torch's generators take 63 bits)"),
        ("data.shuffle", "true or false", "false", ""),
        ("optimizer.matrix_lr", "number", "0.02", None),
    ],
)
def test_a_description(key, kind, default, allowed):
    description = describe_key(key)
    assert (description.kind, description.default) == (kind, default)
    assert allowed is None or description.allowed == allowed


@pytest.mark.parametrize(
    ("key", "numbers"),
    [
        ("optimizer.embedding_lr", ["rates.embedding", "rates.value_embedding"]),
        ("horizon.steps", ["steps", "stop_step", "total_flops", "total_tokens"]),
        ("batch.recompute", [MEMORY]),
        ("parallel.sequence", [MEMORY]),
        ("ngram.storage", [MEMORY]),
        ("lookup.score_scale", ["lookup.score_scale"]),
        ("parallel.tensor", ["accumulation", MEMORY, "layout", "micro_rows"]),
        ("checkpoint.every", []),
    ],
)
def test_moved_numbers(key, numbers):
    assert moved_numbers(key) == numbers
    assert moved_numbers(key, memory=False) == [number for number in numbers if number != MEMORY]


def test_an_unknown_key_is_refused():
    for function in (describe_key, moved_numbers):
        with pytest.raises(UserError, match=r"unknown key batch\.micro_row; did you mean batch\.micro_rows\?"):
            function("batch.micro_row")
    with pytest.raises(UserError, match="unknown key modle; did you mean model"):
        describe_key("modle")


def test_memory_depends_on_no_other_section():
    sections = set()
    for name in ("memory.py", "manifest.py", "row_tables.py"):
        text = (ROOT / "megachat/planning" / name).read_text(encoding="utf-8")
        sections |= set(re.findall(r"\bconfig\.([a-z0-9]+)\b", text))
    assert len(sections) > 3 and sections <= set(key_docs.MEMORY_SECTIONS)
