"""The learning-rate range test with planted losses: its ramp, where it stops, what it suggests, and its mistakes."""

import importlib.util
import json
import math

import pytest

from megachat.commands import main as cli
from megachat.config import load_config, save_config
from megachat.errors import UserError
from megachat.installation import config_path
from megachat.schedule import scheduled_values
from megachat.settings import OptimizerConfig
from megachat.studies.runs import load_run
from megachat.studies.trials import Diverged
from tests.unit.studies.test_runs import make_run

STEPS = 200


def test_the_ramp_multiplies_the_named_rates_only():
    settings = OptimizerConfig(ramp=(0.01, 100), ramp_rates=["matrix"], warmup_steps=0, warmdown_ratio=0)
    at = [scheduled_values(settings, step, 5) for step in range(5)]
    assert [values.multiplier("matrix") for values in at] == pytest.approx([0.01, 0.1, 1, 10, 100])
    assert [values.multiplier("embedding") for values in at] == [1.0] * 5
    everything = scheduled_values(OptimizerConfig(ramp=(0.01, 100), warmup_steps=0), 0, 5)
    assert everything.multiplier("embedding") == pytest.approx(0.01)
    off = scheduled_values(OptimizerConfig(warmup_steps=7), 2, 5)
    assert off.multiplier("matrix") == off.rate, "to the bit"


def planted(folder, seen, nan=False):
    """A trainer whose loss falls fastest at a factor of 1 and bursts at 10; at the same place each time."""

    def train(trial, watch=None):
        seen.append(trial)
        run = folder / trial.name
        if not run.exists():
            make_run(run)
            save_config(load_config(config_path("demo"), trial.settings), run / "config.json")
        plan = json.loads((run / "plan.json").read_text()) | {"steps": STEPS, "rates": {"matrix": 1, "x0": 1}}
        (run / "plan.json").write_text(json.dumps(plan))
        lines = []
        for step in range(STEPS):
            place = math.log10(0.01) + 4 * step / (STEPS - 1)
            loss = 7 - 3 / (1 + math.exp(-4 * place)) + max(0.0, 9 * (place - 1))
            lines.append(json.dumps({"step": step, "train/loss": loss}))
            (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
            if nan and place > 1.01:
                raise Diverged("step 1: the loss is nan", load_run(run))
            if step % 10 == 9 and watch(load_run(run)):
                break
        return load_run(run)

    return train


@pytest.mark.parametrize("nan", [False, True])
def test_it_stops_at_divergence_and_suggests_the_steepest_fall(nan, tmp_path, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr("megachat.studies.trials.trainer", lambda *_, **__: planted(tmp_path / "out", seen, nan))
    (tmp_path / "out").mkdir()
    swept = {"key": "optimizer.matrix_lr", "value": 0.03, "others": {"model.depth": 4}}
    (tmp_path / "out/sweep.json").write_text(json.dumps({"optima": [swept]}))
    words = ["--config", "demo", "--lr-range-test", "matrix", "--out", str(tmp_path / "out")]
    cli.start("sweep", words, "megachat")
    text = capsys.readouterr().out
    assert "optimizer.matrix_lr: 0.0" in text and "the sweep's optimum is 0.03 at model.depth=4" in text
    assert f"in {tmp_path / 'out/range_test.json'}" in text
    assert "unreliable for transformers" in text and len(seen) == 1
    assert {"optimizer.ramp=[0.01, 100.0]", 'optimizer.ramp_rates=["matrix"]'} < set(seen[0].settings)
    result = json.loads((tmp_path / "out/range_test.json").read_text())
    assert result["steepest"] == pytest.approx(1, rel=0.2) and 5 < result["lowest"] < 12
    assert 10 < result["diverged"] < 20
    assert result["suggested"] == {"optimizer.matrix_lr": pytest.approx(0.02 * result["steepest"])}
    assert len(result["points"]) < STEPS
    if importlib.util.find_spec("matplotlib"):
        assert "factor of the rates" in (tmp_path / "out/range_test.svg").read_text()
    if not nan:
        cli.start("sweep", [*words, "--json"], "megachat")
        assert json.loads(capsys.readouterr().out)["range_test"] == result and len(seen) == 1, "read, not trained"
    before = (tmp_path / "out/range_test.json").read_bytes()
    for other, key in (
        (["--ramp", "0.1,10"], r"optimizer.ramp is \[0.01, 100.0\]"),
        (["--set", "optimizer.matrix_lr=0.5"], "optimizer.matrix_lr is the default"),
    ):
        with pytest.raises(UserError, match=f"range_test_matrix has a range test of other settings .{key}.: give anot"):
            cli.start("sweep", [*words, *other], "megachat")
    assert len(seen) == 1 and (tmp_path / "out/range_test.json").read_bytes() == before


@pytest.mark.parametrize(
    "words, problem",
    [
        ([], "give --space FILE with the settings that vary, or --lr-range-test"),
        (["--lr-range-test", "--ramp", "1,0.1"], "--ramp is '1,0.1'"),
        (["--lr-range-test", "--ramp", "x"], "--ramp is 'x'"),
        (["--lr-range-test", "--ramp", "1,1e9"], "optimizer.ramp"),
        (["--lr-range-test", "matrix,matrx"], "optimizer.ramp_rates has matrx, which is none of matrix, "),
    ],
)
def test_mistakes_come_before_any_training(words, problem, tmp_path):
    with pytest.raises(UserError, match=problem):
        cli.start("sweep", ["--config", "demo", "--out", str(tmp_path / "out"), *words], "megachat")
    assert not (tmp_path / "out").exists()
