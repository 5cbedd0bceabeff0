"""The allocation of lookup rows: made once, kept in the run folder and by a resumed run, read from a file."""

import dataclasses
import json
from pathlib import Path

import pytest

from megachat.config import Config
from megachat.data.tokenizer import load_tokenizer
from megachat.errors import UserError
from megachat.parallel.mesh import Axis
from megachat.planning.dimensions import saved_dimensions
from megachat.planning.plan import resolve_without_text
from megachat.planning.sizes import resolve_dimensions
from megachat.prepare.lookup_allocation import allocate, save_allocation
from megachat.train.changes import describe_changes
from megachat.train.lookup_rows import ALLOCATION_NAME, allocated_lookup, planned_lookup

FIXTURES = Path(__file__).resolve().parents[2] / "fixtures"
ALONE = Axis("world", 1, 0, None, (0,))
TOKENIZER = load_tokenizer(FIXTURES / "tokenizer")


def config_of(folder, data=FIXTURES / "data", **lookup) -> Config:
    values = {
        "run": {"name": "run", "folder": str(folder)},
        "model": {"depth": 3, "aspect_ratio": 16, "head_size": 16},
        "data": {"folder": str(data), "tokenizer": str(FIXTURES / "tokenizer")},
        "lookup": {"after_blocks": (1,), "max_rows_per_token": 40, "sample_tokens": 5000} | lookup,
    }
    (folder / "run").mkdir(exist_ok=True)
    return Config.model_validate(values)


def allocated(config, folder, facts=None):
    lookup = resolve_dimensions(config, TOKENIZER.vocab_size).lookup
    return allocated_lookup(config, lookup, TOKENIZER, folder / "run", facts, ALONE)


def test_a_new_run_allocates_and_a_resumed_one_keeps(tmp_path):
    config = config_of(tmp_path)
    before = resolve_dimensions(config, TOKENIZER.vocab_size).lookup
    assert not before.rows_per_token and before.mean_rows == 40  # the most that a token may have
    assert planned_lookup(config, TOKENIZER.vocab_size) is None
    lookup = allocated(config, tmp_path)
    rows = [int(count) for count in lookup.rows_per_token.split()]
    assert sum(rows) == lookup.rows == 4 * TOKENIZER.vocab_size and 1 <= min(rows) <= max(rows) <= 40
    saved = json.loads((tmp_path / "run" / ALLOCATION_NAME).read_text())
    assert saved["rows_per_token"] == rows and 1 < lookup.mean_rows <= 40
    assert planned_lookup(config, TOKENIZER.vocab_size) == lookup  # --dry-run finds it
    assert allocated(config, tmp_path) == lookup  # again, from the same text
    dims = dataclasses.replace(resolve_dimensions(config, TOKENIZER.vocab_size), lookup=lookup)
    facts = json.loads(json.dumps({"model": dataclasses.asdict(dims)}))
    other = config_of(tmp_path, data=tmp_path / "no data", allocation="uniform")
    assert allocated(other, tmp_path, facts) == lookup


def test_a_file_is_used_if_it_fits(tmp_path):
    path = tmp_path / "lookup.json"
    allocation = allocate("frequency", [[1, 2, 3, 3]], TOKENIZER, 4 * TOKENIZER.vocab_size, 40)
    save_allocation(allocation, path)
    lookup = allocated(config_of(tmp_path, allocation_file=str(path)), tmp_path)
    assert [int(count) for count in lookup.rows_per_token.split()] == allocation.rows_per_token.tolist()
    with pytest.raises(UserError, match=r"at most 40 to a token, but .* lookup.max_rows_per_token 8"):
        allocated(config_of(tmp_path, allocation_file=str(path), max_rows_per_token=8), tmp_path)
    with pytest.raises(UserError, match="there is no lookup allocation"):
        allocated(config_of(tmp_path, allocation_file=str(tmp_path / "none")), tmp_path)
    save_allocation(dataclasses.replace(allocation, tokenizer="0" * 64), path)
    with pytest.raises(UserError, match="another tokenizer"):
        allocated(config_of(tmp_path, allocation_file=str(path)), tmp_path)


@pytest.mark.parametrize(
    ("lookup", "message"),
    [
        ({"after_blocks": (3,)}, r"lookup.after_blocks has 3, but the 3 blocks are numbered 0 to 2"),
        ({"rows": 7}, r"lookup.rows is 7, but .* tokens with 1 to 40 rows each"),
        ({"rows": 10**6, "max_rows_per_token": 2}, r"lookup.rows is 1,000,000, but .* 1 to 2 rows each"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(tmp_path, lookup, message):
    with pytest.raises(UserError, match=message):
        resolve_dimensions(config_of(tmp_path, **lookup), TOKENIZER.vocab_size)


def test_an_allocation_that_does_not_fit_its_table_is_no_checkpoint(tmp_path):
    config = config_of(tmp_path)
    dims = dataclasses.replace(resolve_dimensions(config, TOKENIZER.vocab_size), lookup=allocated(config, tmp_path))
    model = json.loads(json.dumps(dataclasses.asdict(dims)))
    assert saved_dimensions(model) == dims
    for rows in ("", "1 2 3", model["lookup"]["rows_per_token"].replace("1", "0", 1), "many"):
        with pytest.raises(UserError, match="use another checkpoint"):
            saved_dimensions(model | {"lookup": model["lookup"] | {"rows_per_token": rows}})


def test_a_changed_allocation_setting_is_said_to_have_no_effect(tmp_path):
    config = config_of(tmp_path)
    plan = resolve_without_text(config, 1, TOKENIZER.vocab_size)
    facts = {
        "model": dataclasses.asdict(plan.dims),
        "config": config.model_dump(mode="json"),
        "layout": {"data": 1, "tensor": 1, "pipeline": 1},
        "tokenizer": {"vocab_size": TOKENIZER.vocab_size},
    }
    assert describe_changes(facts, config, plan) == []
    (line,) = describe_changes(facts, config_of(tmp_path, allocation="uniform"), plan)
    assert "lookup.allocation" in line and "stays" in line
