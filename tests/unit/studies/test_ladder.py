"""The ladder with planted curves: order, verdicts, where it ends, its table, and the compute multiplier."""

import dataclasses
import json
import math
from unittest.mock import Mock

import pytest

from megachat.commands import ladder as command
from megachat.commands import main as cli
from megachat.config import load_config
from megachat.errors import UserError
from megachat.installation import config_path
from megachat.programs.dry_run import Hardware, timed_plan
from megachat.studies.ladder import climb, compute_multiplier, ladder_rows
from megachat.studies.runs import load_run
from megachat.studies.trials import Diverged, first_seed
from tests.unit.studies.test_runs import make_run


def planted(folder, speeds, seen):
    """A trainer whose runs of a change learn `speeds[depth]` times as fast as the baseline's."""

    def train(trial, watch=None):
        seen.append(trial)
        settings = dict(setting.split("=") for setting in trial.settings)
        changed = "optimizer.warmdown_ratio" in settings
        run = folder / trial.name
        if not run.exists():
            depth = int(settings["model.depth"])
            make_run(run, speed=depth * (speeds[depth] if changed else 1.0), flops=1e9 * depth)
        return load_run(run)

    return train


def test_the_cheapest_rung_is_first_and_a_worse_one_is_the_last(tmp_path):
    seen, lines, change = [], [], ["optimizer.warmdown_ratio=0.85"]
    train = planted(tmp_path, {2: 1.4, 3: 1.2, 4: 0.7, 6: 2.0}, seen)
    rungs = climb(train, change, [4, 2, 6, 3], seeds=(42, 43), log=lines.append)
    assert [rung.depth for rung in rungs] == [2, 3, 4]
    assert [rung.verdict for rung in rungs] == ["better", "better", "worse"]
    assert [trial.name for trial in seen[:4]] == ["d2_base_s42", "d2_base_s43", "d2_change_s42", "d2_change_s43"]
    assert seen[0].settings == ("model.depth=2", "run.seed=42")
    assert seen[2].settings == ("model.depth=2", *change, "run.seed=42")
    assert lines[-1] == "the ladder ends here: --stop-at worse"
    rows = ladder_rows(rungs)
    assert rows[0]["gain"] > rows[1]["gain"] > 0 > rows[2]["gain"]
    assert rows[0]["steps"] == pytest.approx(1 / 1.4, rel=0.02)
    assert len(climb(train, change, [2, 4, 6], stop_at=(), log=lines.append)) == 3


def test_a_change_that_diverges_is_worse_and_the_ladder_goes_on_or_stops(tmp_path):
    seen, change = [], ["optimizer.warmdown_ratio=0.85"]
    trains = planted(tmp_path, {2: 1.4, 3: 1.2, 4: 1.1}, seen)

    def train(trial, watch=None):
        if trial.name == "d3_change_s43":
            raise Diverged("step 7: the loss is nan on rank 0", trains(trial))
        return trains(trial, watch)

    rungs = climb(train, change, [2, 3, 4], seeds=(42, 43), stop_at=(), log=lambda line: None)
    rows = ladder_rows(rungs)
    assert [row["verdict"].split(":")[0] for row in rows] == ["better", "worse (diverged)", "better"]
    assert rows[1]["change"] is None and rows[1]["gain"] is None and rows[1]["base"] > 0
    assert compute_multiplier(rungs)["rungs"] == 2
    result = {"rungs": rows, "compute_multiplier": None, "seeds": 2}
    assert any(
        line.split()[:4:3] == ["3", "-"] and line.endswith("worse (diverged)") for line in command._ladder_lines(result)
    )
    assert [rung.depth for rung in climb(train, change, [2, 3, 4], seeds=(42, 43), log=lambda line: None)] == [2, 3]


def test_the_compute_multiplier_of_planted_laws(tmp_path):
    """bits per byte = 3 FLOPs^-0.1 for the baseline; the change gets the value of 1.25 times its FLOPs."""

    def end(name, flops, factor):
        make_run(tmp_path / name)
        last = {"step": 40, "total_training_flops": flops, "total_training_time": 1.0}
        first = last | {"step": 2, "total_training_flops": flops / 10, "val/bpb": 9.0}
        lines = [first, last | {"val/bpb": 3 * (factor * flops) ** -0.1}]
        return dataclasses.replace(load_run(tmp_path / name), lines=lines)

    class Rung:
        def __init__(self, number):
            self.base = [end(f"base{number}", 10.0**number, 1.0)]
            self.change = [end(f"change{number}", 10.0**number, 1.25)]

    rungs = [Rung(number) for number in (9, 10, 11)]
    result = compute_multiplier(rungs)
    assert result["value"] == pytest.approx(1.25) and result["rungs"] == 3 and result["residual"] < 1e-12
    assert compute_multiplier(rungs[:1]) is None


def test_the_command_prints_and_keeps_the_table_and_refuses_another_question(tmp_path, monkeypatch, capsys):
    out, seen = tmp_path / "ladder", []
    monkeypatch.setattr("megachat.studies.trials.trainer", lambda *_, **__: planted(out, {2: 1.4, 3: 1.2}, seen))
    words = ["--config", "demo", "--set", "optimizer.warmdown_ratio=0.85", "--both", "model.vocab_size=4096"]
    words += ["--depths", "3,2", "--out", str(out)]
    cli.start("ladder", words, "megachat")
    shown = capsys.readouterr()
    assert "rung 1 of 2, depth 2: d2_base_s42" in shown.err
    assert "compute multiplier over 2 rungs" in shown.out and "a guess" in shown.out and "one run per side" in shown.out
    saved = json.loads((out / "ladder.json").read_text())
    assert [row["depth"] for row in saved["rungs"]] == [2, 3] and math.isfinite(saved["compute_multiplier"]["value"])
    assert "depth  runs " in shown.err and "hours are not known before the first run" in shown.err
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("megachat.studies.ladder.compare_curves", Mock(side_effect=KeyboardInterrupt))
        cli.start("ladder", words, "megachat")
    assert "interrupted: the same command continues from here" in capsys.readouterr().err
    other = [*words[:3], "optimizer.warmdown_ratio=0.5", *words[4:]]
    with pytest.raises(UserError, match="has the ladder of .*warmdown_ratio=0.85: give another --out"):
        cli.start("ladder", other, "megachat")
    folders = []
    monkeypatch.setattr(
        "megachat.studies.trials.trainer",
        lambda _, folder, *__, **___: folders.append(folder) or planted(out, {2: 1.4, 3: 1.2}, seen),
    )
    other[-1] = str(tmp_path / "second")
    seeded = [*words[:-1], str(tmp_path / "seeded"), "--seeds", "2", "--both", "run.seed=7"]
    cli.start("ladder", seeded, "megachat")
    assert [trial.name for trial in seen[-4:]] == ["d3_base_s7", "d3_base_s8", "d3_change_s7", "d3_change_s8"]
    assert first_seed(9, out) == 42 and first_seed(9, tmp_path / "none") == 9, "a folder that was begun at 42"
    cli.start("ladder", [*other, "--base", str(out)], "megachat")
    assert folders[-2:] == [tmp_path / "second", out], "the change and the baseline"
    with pytest.raises(UserError, match="has the ladder of another config or --both: leave --base out"):
        cli.start("ladder", [*other, "--base", str(out), "--both", "batch.tokens=4096"], "megachat")
    (out / "question.json").write_text(json.dumps({"study": "fp8-check", "steps": 9}))
    with pytest.raises(UserError, match="has the runs of fp8-check, not of ladder: give another --out"):
        cli.start("ladder", words, "megachat")
    with pytest.raises(
        UserError, match="--base .* has the runs of fp8-check, not of ladder: give the --out of a ladder"
    ):
        cli.start("ladder", [*other, "--base", str(out)], "megachat")


def test_hours_and_price_of_each_rung_are_planned(tmp_path, monkeypatch, capsys):
    """The same numbers as the planner's of each run, and nothing starts."""
    monkeypatch.chdir(tmp_path)
    words = ["--config", "d12", "--set", "optimizer.warmdown_ratio=0.85", "--depths", "12,20", "--seeds", "2"]
    words += ["--both", "model.vocab_size=32768", "--gpu", "H100", "--price", "2.5", "--dry-run"]
    cli.start("ladder", words, "megachat")
    text = capsys.readouterr().out
    cli.start("ladder", [*words, "--json"], "megachat")
    rungs = json.loads(capsys.readouterr().out)["plan"]
    assert "a plan, not measured: hours by the data sheet of H100" in text and list(tmp_path.iterdir()) == []
    for rung in rungs:
        config = load_config(config_path("d12"), [words[9], f"model.depth={rung['depth']}"])
        plan, one = timed_plan(config, 1, Hardware(gpu="H100", price=2.5))
        assert rung["runs"] == 4 and rung["hours"] == pytest.approx(4 * one["wall_hours"])
        assert rung["price"] == pytest.approx(2.5 * rung["hours"]) and rung["flops"] == pytest.approx(
            4 * plan.total_flops
        )


@pytest.mark.parametrize(
    "words, problem",
    [
        (["--depths", "2"], "give the change with --set"),
        (["--depths", "2,x", "--set", "optimizer.warmup_steps=1"], "--depths is '2,x'"),
        (["--depths", "0", "--set", "optimizer.warmup_steps=1"], "--depths is '0'"),
        (["--depths", "2", "--set", "optimizer.warmup_steps=1", "--stop-at", "bad"], "'bad' is none of worse"),
        (["--depths", "2", "--set", "optimizer.warmup_steps=1", "--seeds", "0"], "--seeds is 0"),
        (["--depths", "2", "--set", "optimizer.lr=1"], "unknown key optimizer.lr"),
        (["--depths", "2", "--set", "run.seed=7"], "--set has run.seed, which this study sets for each of its runs"),
        (["--depths", "2", "--set", "model.depth=3"], "--set has model.depth, which this study sets"),
        (
            ["--depths", "2", "--set", "optimizer.warmup_steps=1", "--both", "run.folder=x"],
            "--both has run.folder, which this study sets",
        ),
        (["--depths", "2", "--set", "optimizer.warmup_steps=1", "--price", "2"], "--price needs a time"),
        (["--depths", "2", "--set", "optimizer.warmup_steps=1", "--price", "-2"], "--price is -2"),
        (["--depths", "2", "--set", "optimizer.warmup_steps=1", "--base", "nowhere"], "--base nowhere has no ladder"),
    ],
)
def test_mistakes_come_before_any_training(words, problem, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=problem):
        cli.start("ladder", ["--config", "demo", "--both", "model.vocab_size=4096", *words], "megachat")
    assert not list(tmp_path.rglob("d2_*")) and command.run
