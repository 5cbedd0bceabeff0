"""What the comparison of two checkpoints finds, on any layout."""

import math

import numpy as np
import pytest
import torch

from megachat.convert.differences import compare_checkpoints, compare_tensors
from megachat.convert.formats import open_checkpoint
from megachat.convert.megachat import _with_validation
from megachat.errors import UserError
from tests.unit.convert.checkpoints import differences_between, make_run, step_folder, tool


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("left") / "run")


def test_another_layout_with_equal_tensors_is_equal(run, tmp_path, monkeypatch, capsys):
    other = make_run(tmp_path / "run", parts=3)
    differences = differences_between(run, step_folder(other))
    assert [entry.kind for entry in differences] and not any(entry.counts for entry in differences)
    assert {entry.name for entry in differences if not entry.name.startswith("config.")} == {"layout.data"}
    status, out, _ = tool(monkeypatch, capsys, "diff", run, other)
    assert status == 0 and out.startswith("equal\n") and "  3 notes, which do not count: config.run" in out
    assert "layout.data: 1 and 3" not in out
    _, out, _ = tool(monkeypatch, capsys, "diff", run, other, "--verbose")
    assert out.startswith("equal\n") and "\nnote   layout.data: 1 and 3\n" in out


def test_a_checkpoint_from_before_a_part_of_the_model_is_equal_to_one_without_it(run):
    new = open_checkpoint(run)
    assert new.facts["model"]["norm_scales"] == []
    model = {name: value for name, value in new.facts["model"].items() if name != "norm_scales"}
    old = new.select(new.entries, facts=new.facts | {"model": model})
    assert compare_checkpoints(old, new) == [] and old.dims == new.dims


def test_changed_tensors_have_their_norms(run, tmp_path, monkeypatch, capsys):
    def change(tensors):
        tensors["model/lm_head.weight"] *= 1.5
        tensors["muon/transformer.h.1.mlp.c_fc.weight/momentum"][3, 2] += 0.25

    other = make_run(tmp_path / "run", parts=2, change=change)
    differences = {entry.name: entry for entry in differences_between(run, other) if entry.counts}
    assert differences.keys() == {"model/lm_head.weight", "muon/transformer.h.1.mlp.c_fc.weight/momentum"}
    assert differences["model/lm_head.weight"].relative == pytest.approx(0.5, rel=1e-6)
    one = differences["muon/transformer.h.1.mlp.c_fc.weight/momentum"]
    assert (one.elements, one.max_abs) == (1, pytest.approx(0.25, rel=1e-6))
    status, out, _ = tool(monkeypatch, capsys, "diff", run, other)
    most = "2 tensors with other values: most in model/lm_head.weight: relative 5.000e-01"
    assert status == 1 and out.startswith(f"2 differences\n  {most}") and "momentum" not in out


def test_facts_loader_and_tensors_of_one_alone(run, tmp_path):
    def change(tensors):
        tensors["model/new"] = torch.ones(2)
        del tensors["adamw/lm_head.weight/exp_avg"]

    other = make_run(
        tmp_path / "run",
        change=change,
        facts={"adamw_steps": 8, "loop": {"step": 7, "training_s": 99.0, "val_bpb": 2.5}},
    )
    path = step_folder(other) / "loader" / "stream_00001.npz"
    with np.load(path) as saved:
        arrays = {name: saved[name] for name in saved.files}
    np.savez(path, **(arrays | {"counters": arrays["counters"] + 1}))
    differences = {(entry.kind, entry.name) for entry in differences_between(run, other) if entry.counts}
    moved = ("loader", "loader/stream_00001.npz: counters")
    lacking = {("fact", "loop.skipped_steps"), ("fact", "loop.min_val_bpb")}
    assert (
        differences
        == {("only", "model/new"), ("only", "adamw/lm_head.weight/exp_avg"), ("fact", "adamw_steps"), moved} | lacking
    )


@pytest.mark.parametrize(
    ("left", "right", "relative", "max_abs", "elements"),
    [
        ([0.0, 3.0, 4.0], [0.0, 3.0, 4.5], 0.1, 0.5, 1),
        ([0.0, 1.0], [-0.0, 1.0], 0.0, 0.0, 0),  # other bits of equal value
        ([math.nan, 1.0], [math.nan, 2.0], math.nan, 1.0, 1),
        ([1.0, 1.0], [1.0, math.nan], math.inf, math.inf, 1),
        ([math.inf, 1.0], [math.inf, 2.0], 0.0, 1.0, 1),
        ([0.0, 0.0], [0.0, 1.0], math.inf, 1.0, 1),
    ],
)
def test_one_tensor(left, right, relative, max_abs, elements):
    difference = compare_tensors("x", torch.tensor(left), torch.tensor(right))
    assert (difference.max_abs, difference.elements) == (max_abs, elements)
    assert difference.relative == pytest.approx(relative) or math.isnan(relative)


def test_equal_tensors_are_no_difference():
    odd = torch.tensor([math.nan, -0.0, math.inf, 1.0])
    assert compare_tensors("x", odd, odd.clone()) is None
    assert compare_tensors("x", torch.tensor([0.5, 1.5]), torch.tensor([0.5, 1.5], dtype=torch.bfloat16)) is None
    assert compare_tensors("x", torch.tensor([0.1]), torch.tensor([0.1], dtype=torch.bfloat16)) is not None


def test_what_is_no_checkpoint(run, tmp_path):
    for path, words in ((tmp_path / "nowhere", "is not a folder"), (tmp_path, "is not a complete checkpoint")):
        with pytest.raises(UserError, match=words):
            differences_between(run, path)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match="holds no complete checkpoint yet"):
        differences_between(tmp_path / "run", run)


def test_a_checkpoint_is_converted_with_the_validation_that_followed_it(tmp_path):
    """The step is saved before its validation, whose result is in the run's metrics."""
    loop = {"step": 7, "val_bpb": 2.5, "min_val_bpb": 2.0, "pending": ["validation", "core"]}
    step = tmp_path / "checkpoints" / "step_000007"
    assert _with_validation(loop, step) == loop
    (tmp_path / "metrics.jsonl").write_text('{"step": 7, "train/loss": 1.0}\n{"step": 7, "val/bpb": 1.75}\n')
    assert _with_validation(loop, step) == loop | {"val_bpb": 1.75, "min_val_bpb": 1.75}
    assert _with_validation(loop | {"pending": []}, step)["val_bpb"] == 2.5
