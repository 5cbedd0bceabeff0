"""Sweeps with planted results: the optimum, verdicts with noise, early ends, continued and shared studies, mistakes."""

import importlib.util
import json
import multiprocessing
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

from megachat.commands import main as cli
from megachat.errors import UserError
from megachat.studies.runs import load_run
from megachat.studies.space import grid, load_space
from megachat.studies.trials import Diverged
from tests.limits import limit_s
from tests.unit.studies.test_runs import make_run

optuna = pytest.importorskip("optuna", reason="optuna is not installed: pip install 'megachat[sweep]'")
from megachat.studies.fits import fit_optimum, power_laws  # noqa: E402
from megachat.studies.sweep import Noise, open_study, run_trials, sweep_rows  # noqa: E402

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
    assert len(result["trials"]) == 12 and len(seen) == 6 + 24
    assert seen[:3] == ["baseline_0_s42", "baseline_0_s43", "baseline_1_s42"], "at each depth"
    for base, depth in zip(result["baselines"], (2, 4, 8), strict=True):
        (same,) = [row for row in result["trials"] if row["values"] == {KEY: 0.02, "model.depth": depth}]
        assert base["context"] == {"model.depth": depth} and base["mean"] == pytest.approx(same["bpb"])
        assert same["verdict"] == "cannot tell", "the config as it is"
        assert [row["against_best"] for row in result["trials"] if row["values"]["model.depth"] == depth][0] == "best"
    assert len(result["optima"]) == 3, "sizes have none"
    for fit in result["optima"]:
        assert fit["low"] < 0.02 / (fit["others"]["model.depth"] / 2) ** 0.5 < fit["high"]
    (law,) = result["power_laws"]
    assert law["exponent"] == pytest.approx(-0.5, abs=0.05) and "moves as model.depth^-0.5" in text
    assert law["low"] < -0.5 < law["high"]
    verdicts = {row["verdict"] for row in result["trials"]}
    assert verdicts == {"better", "cannot tell", "worse"} and set(result["importance"]) == {KEY, "model.depth"}
    best = json.loads((tmp_path / "out/best.json").read_text())
    assert best["optimizer"]["matrix_lr"] == result["trials"][0]["values"][KEY] and best["batch"]["tokens"] == 8192
    again, seen, _ = sweep(monkeypatch, capsys, tmp_path, "--space", space, "--seeds", 2)
    assert again == text and len(seen) == 6, "only the baseline is read again"
    if importlib.util.find_spec("matplotlib"):
        picture = (tmp_path / "out/sweep.svg").read_text()
        assert "bits per byte" in picture and "exponent -0.5" in picture and len(picture) < 300_000
    other = write_space(tmp_path, optimizer__matrix_lr=rates)
    with pytest.raises(UserError, match="another space or config: give another --out"):
        sweep(monkeypatch, capsys, tmp_path, "--space", other)


def test_ranges_are_sampled_and_trials_that_are_behind_end_early(tmp_path, monkeypatch, capsys):
    space = write_space(tmp_path, optimizer__matrix_lr={"low": 0.002, "high": 0.2, "log": True})
    text, _, result = sweep(monkeypatch, capsys, tmp_path, "--space", space, "--trials", 12)
    assert len(result["trials"]) == 12 and any(row["verdict"] == "ended early" for row in result["trials"])
    assert all(0.002 <= row["values"][KEY] <= 0.2 for row in result["trials"]) and "ended early" in text


@pytest.fixture(scope="module")
def postgresql():
    """The URL of a PostgreSQL server of its own, reached by a socket in its folder; root may not run one."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not programs:
        pytest.skip("no PostgreSQL: apt install postgresql")
    pytest.importorskip("psycopg", reason="psycopg is not installed: pip install 'megachat[postgresql]'")
    try:
        user = pwd.getpwnam("postgres" if os.getuid() == 0 else pwd.getpwuid(os.getuid()).pw_name)
    except KeyError:
        pytest.skip("root may not run PostgreSQL, and there is no user postgres")
    folder = tempfile.mkdtemp(prefix="pg")  # a socket's path has at most 107 bytes
    os.chown(folder, user.pw_uid, user.pw_gid)
    how = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []} if os.getuid() == 0 else {}
    data, log = f"{folder}/data", f"{folder}/log"
    subprocess.run([programs[-1], "-D", data, "-A", "trust", "-U", "studies", "-N"], check=True, **how)
    control = [programs[-1].with_name("pg_ctl"), "-D", data, "-l", log, "-w", "-t", str(limit_s())]
    control += ["-o", f"-c listen_addresses= -c unix_socket_directories={folder} -c fsync=off"]
    subprocess.run([*control, "start"], check=True, stdout=subprocess.DEVNULL, **how)
    yield f"postgresql+psycopg://studies@/postgres?host={folder}"
    subprocess.run([*control, "-m", "immediate", "stop"], check=True, **how)
    shutil.rmtree(folder)


def _work_on_it(storage, folder):
    space, seen = load_space(folder / "space.json"), []
    study = open_study(storage, "shared", space, {}, seed=os.getpid())
    run_trials(study, space, planted(folder, seen), 12, seeds=[42], log=lambda line: None)
    (folder / f"seen_{os.getpid()}.json").write_text(json.dumps(seen))


@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
def test_two_processes_share_a_study(database, tmp_path, request):
    url = f"sqlite:///{tmp_path}/study.db" if database == "sqlite" else request.getfixturevalue(database)
    space = load_space(write_space(tmp_path, optimizer__matrix_lr=[0.001 * number for number in range(1, 13)]))
    fork = multiprocessing.get_context("fork")
    both = [fork.Process(target=_work_on_it, args=(url, tmp_path)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(limit_s())
    assert [process.exitcode for process in both] == [0, 0]
    rows = sweep_rows(open_study(url, "shared", space, {}, seed=1), [Noise(0, 0, 2)])
    assert {row["values"][KEY] for row in rows} == set(space[0].values), "each combination was tried"
    seen = [name for path in tmp_path.glob("seen_*") for name in json.loads(path.read_text())]
    assert len(seen) == len(set(seen)), "no trial was taken twice"


def test_a_failed_training_ends_the_sweep_and_is_tried_again(tmp_path):
    space = load_space(write_space(tmp_path, optimizer__matrix_lr=[0.01, 0.02]))
    study = open_study(f"sqlite:///{tmp_path}/study.db", "failing", space, {}, seed=1)

    def fail(trial, watch=None):
        raise UserError("the training failed")

    with pytest.raises(UserError, match="the training failed"):
        run_trials(study, space, fail, 2, seeds=[42], log=lambda line: None)
    run_trials(study, space, planted(tmp_path, []), 2, seeds=[42], log=lambda line: None)
    assert {row["values"][KEY] for row in sweep_rows(study, [Noise(0, 0, 2)])} == {0.01, 0.02}


def test_a_diverged_trial_is_a_result(tmp_path):
    space = load_space(write_space(tmp_path, optimizer__matrix_lr=[0.01, 0.02]))
    study, trains = open_study(f"sqlite:///{tmp_path}/study.db", "diverging", space, {}, seed=1), planted(tmp_path, [])

    def train(trial, watch=None):
        if f"{KEY}=0.02" in trial.settings:
            raise Diverged("step 3: the loss is nan on rank 0", trains(trial))
        return trains(trial, watch)

    run_trials(study, space, train, 2, seeds=[42], log=lambda line: None)
    rows = sweep_rows(study, [Noise(0, 0, 2)])
    assert [(row["values"][KEY], row["verdict"]) for row in rows] == [(0.01, "worse"), (0.02, "diverged")]


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
        ({"optimizer__matrix_lr": [-1]}, r"space.json, at optimizer.matrix_lr=-1: optimizer.matrix_lr is -1"),
        ({"run__seed": [1, 2]}, "space.json has run.seed, which this study sets for each of its runs: leave it out"),
        ({"optimizer__matrix_lr": {"low": 0.1, "high": 1, "log": "no"}}, "log is true or false"),
        ({"optimizer__matrix_lr": {"low": 0.1, "high": 1, "step": 0}}, "step is above 0"),
        ({"model__depth": {"low": 2, "high": 8, "step": 1.5}}, "model.depth takes whole numbers"),
        ({"model__depth": {"low": 2.0, "high": 8}}, "model.depth takes whole numbers"),
        ({"model__depth": {"low": True, "high": 8}}, "low, high and step are numbers"),
        (
            {"optimizer__warmdown_shape": ["linear", "step"], "optimizer__final_lr_fraction": [0.1, 0]},
            r"space.json, at optimizer.warmdown_shape=.step. optimizer.final_lr_fraction=0: ",
        ),
    ],
)
def test_an_impossible_space_is_refused_before_anything_starts(space, problem, tmp_path):
    words = ["--config", "demo", "--space", str(write_space(tmp_path, **space)), "--out", str(tmp_path / "out")]
    with pytest.raises(UserError, match=problem):
        cli.start("sweep", words, "megachat")
    assert not (tmp_path / "out").exists()


def test_a_space_that_is_a_list_is_refused_with_one_sentence(tmp_path):
    (tmp_path / "space.json").write_text('["optimizer.matrix_lr"]')
    with pytest.raises(
        UserError, match=r"space.json is no JSON object: give a JSON object of section.key -> list or r"
    ):
        load_space(tmp_path / "space.json")


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "out").touch()
    for name, words in {
        "sweep": ["--space", str(write_space(tmp_path, optimizer__matrix_lr=[0.1, 0.2]))],
        "ladder": ["--set", "optimizer.matrix_lr=0.1", "--depths", "2", "--both", "model.vocab_size=4096"],
    }.items():
        with pytest.raises(UserError, match="out/.*.json cannot be written .*: give another file with --out"):
            cli.start(name, ["--config", "demo", *words, "--out", str(tmp_path / "out")], "megachat")
    with pytest.raises(UserError, match="optimizer.matrix_lr=0.02 is what the config has already: give a change"):
        cli.start("ladder", ["--config", "demo", "--set", "optimizer.matrix_lr=0.02", "--depths", "2"], "megachat")


def test_a_space_of_ranges_is_no_grid_and_a_database_is_needed(tmp_path):
    whole = load_space(write_space(tmp_path, model__depth={"low": 2, "high": 4}))
    assert grid(whole) is None and whole[0].whole
    rate = {"low": 1, "high": 2}
    assert not load_space(write_space(tmp_path, optimizer__matrix_lr=rate))[0].whole, "by the setting, not the numbers"
    url = f"sqlite:///{tmp_path}/other.db"
    optuna.create_study(storage=url, study_name="mine").optimize(lambda trial: trial.suggest_float("x", 0, 1), 1)
    with pytest.raises(UserError, match="the study mine in .* is none of megachat's: give another --out or --storage"):
        open_study(url, "mine", whole, {}, seed=1)
    with pytest.raises(UserError, match="cannot be opened"):
        open_study("sqlite:////nowhere/at/all.db", "name", whole, {}, seed=1)


def test_without_optuna_or_matplotlib_one_sentence_says_what_to_install(tmp_path, monkeypatch, capsys):
    space = write_space(tmp_path, optimizer__matrix_lr=[0.01, 0.02])
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    _, seen, _ = sweep(monkeypatch, capsys, tmp_path, "--space", space, "--set", "run.seed=7")
    assert seen[:2] == ["baseline_s7", "baseline_s8"]
    assert not (tmp_path / "out/sweep.svg").exists() and (tmp_path / "out/sweep.json").exists()
    question = tmp_path / "out/question.json"
    question.write_text(json.dumps(json.loads(question.read_text()) | {"study": "ladder"}))
    with pytest.raises(UserError, match="out has the runs of ladder, not of sweep: give another --out"):
        sweep(monkeypatch, capsys, tmp_path, "--space", space)
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UserError, match="sweeps need optuna, which is not installed: pip install 'megachat.sweep.'"):
        sweep(monkeypatch, capsys, tmp_path, "--space", space)
