"""Sweeps with planted results: the optimum, verdicts with noise, early ends, continued and shared studies, mistakes."""

import json
import subprocess
import sys

import numpy as np
import pytest

from megachat.commands import main as cli
from megachat.errors import UserError
from megachat.studies.runs import load_run
from megachat.studies.space import grid, load_space
from tests.limits import limit_s
from tests.unit.studies.test_runs import make_run

pytest.importorskip("optuna", reason="optuna is not installed: pip install 'megachat[sweep]'")
from megachat.studies.sweep import Noise, fit_optimum, open_study, power_laws, run_trials, sweep_rows  # noqa: E402

KEY = "optimizer.matrix_lr"


def write_space(folder, **space):
    path = folder / "space.json"
    path.write_text(json.dumps({key.replace("__", "."): values for key, values in space.items()}))
    return path


def planted(folder, seen, noise=0.0):
    """A trainer whose runs end with bits per byte that are lowest at a rate of 0.02 / sqrt(depth / 2)."""

    def train(trial, watch=None):
        seen.append(trial.name)
        settings = dict(setting.split("=") for setting in trial.settings)
        run = folder / trial.name
        if not run.exists():
            best = 0.02 / (int(settings.get("model.depth", 2)) / 2) ** 0.5
            worse = 0.3 * np.log(float(settings.get(KEY, 0.02)) / best) ** 2
            worse += noise * np.random.default_rng(int(settings["run.seed"])).standard_normal()
            make_run(run)
            lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()[:-1]]
            text = (
                json.dumps(line | ({"val/bpb": line["val/bpb"] + worse} if "val/bpb" in line else {})) for line in lines
            )
            (run / "metrics.jsonl").write_text("\n".join(text) + "\n")
        record = load_run(run)
        if watch and watch(record):
            (run / "plan.json").write_text(json.dumps(dict(record.plan) | {"stop_step": 99}))
        return load_run(run)

    return train


def sweep(monkeypatch, capsys, folder, *words, noise=0.001):
    seen = []
    monkeypatch.setattr("megachat.studies.trials.trainer", lambda *_, **__: planted(folder / "out", seen, noise))
    cli.start("sweep", ["--config", "demo", "--out", str(folder / "out"), *map(str, words)], "megachat")
    return capsys.readouterr().out, seen, json.loads((folder / "out/sweep.json").read_text())


def test_a_grid_finds_the_planted_optimum_and_how_it_moves(tmp_path, monkeypatch, capsys):
    rates = [0.005, 0.01, 0.02, 0.04]
    space = write_space(tmp_path, optimizer__matrix_lr=rates, model__depth=[2, 4, 8])
    text, seen, result = sweep(monkeypatch, capsys, tmp_path, "--space", space, "--seeds", 2)
    assert len(result["trials"]) == 12 and len(seen) == 2 + 24 and seen[:2] == ["baseline_s42", "baseline_s43"]
    for fit in (fit for fit in result["optima"] if fit["key"] == KEY):
        assert fit["low"] < 0.02 / (fit["others"]["model.depth"] / 2) ** 0.5 < fit["high"]
    (law,) = (law for law in result["power_laws"] if law["key"] == KEY)
    assert law["exponent"] == pytest.approx(-0.5, abs=0.05) and "moves as model.depth^-0.5" in text
    verdicts = {row["verdict"] for row in result["trials"]}
    assert verdicts == {"cannot tell", "worse"} and set(result["importance"]) == {KEY, "model.depth"}
    best = json.loads((tmp_path / "out/best.json").read_text())
    assert best["optimizer"]["matrix_lr"] == result["trials"][0]["values"][KEY] and best["batch"]["tokens"] == 8192
    again, seen, _ = sweep(monkeypatch, capsys, tmp_path, "--space", space, "--seeds", 2)
    assert again == text and len(seen) == 2, "only the baseline is read again"
    other = write_space(tmp_path, optimizer__matrix_lr=rates)
    with pytest.raises(UserError, match="another space or config: give another --out"):
        sweep(monkeypatch, capsys, tmp_path, "--space", other)


def test_ranges_are_sampled_and_trials_that_are_behind_end_early(tmp_path, monkeypatch, capsys):
    space = write_space(tmp_path, optimizer__matrix_lr={"low": 0.002, "high": 0.2, "log": True})
    text, _, result = sweep(monkeypatch, capsys, tmp_path, "--space", space, "--trials", 12)
    assert len(result["trials"]) == 12 and any(row["verdict"] == "ended early" for row in result["trials"])
    assert all(0.002 <= row["values"][KEY] <= 0.2 for row in result["trials"]) and "ended early" in text


def test_two_processes_share_a_study(tmp_path):
    program = """
import sys
from pathlib import Path
from megachat.studies.space import load_space
from megachat.studies.sweep import open_study, run_trials
from tests.unit.studies.test_sweep import planted
folder, seen = Path(sys.argv[1]), []
space = load_space(folder / "space.json")
study = open_study(f"sqlite:///{folder}/study.db", "shared", space, {}, seed=1)
run_trials(study, space, planted(folder, seen), 12, seeds=1, log=lambda line: None)
print(len(seen))
"""
    space = load_space(write_space(tmp_path, optimizer__matrix_lr=[0.001 * number for number in range(1, 13)]))
    open_study(f"sqlite:///{tmp_path}/study.db", "shared", space, {}, seed=1)
    line = [sys.executable, "-c", program, str(tmp_path)]
    both = [subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    done = [process.communicate(timeout=limit_s()) for process in both]
    assert [process.returncode for process in both] == [0, 0], done
    study = open_study(f"sqlite:///{tmp_path}/study.db", "shared", space, {}, seed=1)
    values = [row["values"][KEY] for row in sweep_rows(study, Noise(0, 0, 2))]
    assert set(values) == set(space[0].values), "each combination was tried"


def test_a_failed_training_ends_the_sweep_and_is_tried_again(tmp_path):
    space = load_space(write_space(tmp_path, optimizer__matrix_lr=[0.01, 0.02]))
    study = open_study(f"sqlite:///{tmp_path}/study.db", "failing", space, {}, seed=1)

    def fail(trial, watch=None):
        raise UserError("the training failed")

    with pytest.raises(UserError, match="the training failed"):
        run_trials(study, space, fail, 2, seeds=1, log=lambda line: None)
    run_trials(study, space, planted(tmp_path, []), 2, seeds=1, log=lambda line: None)
    assert {row["values"][KEY] for row in sweep_rows(study, Noise(0, 0, 2))} == {0.01, 0.02}


def test_the_fitted_optimum_and_its_interval():
    rates = np.geomspace(0.005, 0.08, 5)
    exact = fit_optimum(rates, 1 + 0.1 * np.log(rates / 0.03) ** 2)
    assert exact.value == pytest.approx(0.03) and exact.low == pytest.approx(0.03) == exact.high
    covered = 0
    for seed in range(200):
        noisy = 1 + 0.1 * np.log(rates / 0.03) ** 2 + 0.004 * np.random.default_rng(seed).standard_normal(5)
        fit = fit_optimum(rates, noisy)
        covered += fit is not None and fit.low is not None and fit.low <= 0.03 <= fit.high
    assert 170 <= covered
    assert fit_optimum(rates, -(np.log(rates) ** 2)) is None and fit_optimum(rates[:3], rates[:3]) is None
    assert power_laws([{"key": "a", "others": {"b": 2}, "value": 1.0}]) == []


@pytest.mark.parametrize(
    "space, problem",
    [
        ({}, "is empty"),
        ({"optimizer__matrix_rl": [1]}, "unknown key optimizer.matrix_rl; did you mean optimizer.matrix_lr"),
        ({"optimizer__matrix_lr": []}, "give a list of different values"),
        ({"optimizer__matrix_lr": [0.1, 0.1]}, "give a list of different values"),
        ({"optimizer__matrix_lr": {"low": 1, "high": 1}}, "low must be below high"),
        ({"optimizer__matrix_lr": {"low": 0, "high": 1, "log": True}}, "a log range needs a low above 0"),
        ({"optimizer__matrix_lr": {"low": "a", "high": 1}}, "low, high and step are numbers"),
        ({"optimizer__matrix_lr": {"from": 0, "to": 1}}, "a range with low, high, log and step"),
        ({"optimizer__matrix_lr": [-1]}, "optimizer.matrix_lr is -1"),
    ],
)
def test_an_impossible_space_is_refused_before_anything_starts(space, problem, tmp_path):
    words = ["--config", "demo", "--space", str(write_space(tmp_path, **space)), "--out", str(tmp_path / "out")]
    with pytest.raises(UserError, match=problem):
        cli.start("sweep", words, "megachat")
    assert not (tmp_path / "out").exists()


def test_a_space_of_ranges_is_no_grid_and_a_database_is_needed(tmp_path):
    whole = load_space(write_space(tmp_path, model__depth={"low": 2, "high": 4}))
    assert grid(whole) is None and whole[0].whole
    with pytest.raises(UserError, match="cannot be opened"):
        open_study("sqlite:////nowhere/at/all.db", "name", whole, {}, seed=1)
