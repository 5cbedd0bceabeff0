"""Descriptions of config keys."""

import pytest

from megachat.config import known_keys
from megachat.errors import UserError
from megachat.planning.key_docs import describe_key


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


def test_an_unknown_key_is_refused():
    with pytest.raises(UserError, match=r"unknown key batch\.micro_row; did you mean batch\.micro_rows\?"):
        describe_key("batch.micro_row")
    with pytest.raises(UserError, match="unknown key modle; did you mean model"):
        describe_key("modle")
