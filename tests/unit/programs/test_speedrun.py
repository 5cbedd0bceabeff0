"""What `megachat speedrun` says before it starts anything, and the status with which it ends."""

import os
import re
import signal
from types import SimpleNamespace

import pytest

from megachat.commands import main as cli
from megachat.config import load_config
from megachat.errors import UserError
from megachat.job import local_job
from megachat.planning.explain import setting_warnings
from megachat.planning.plan import resolve_plan
from megachat.programs import speedrun as program
from megachat.programs.dry_run import Hardware, describe_job, hours_text
from megachat.programs.speedrun import describe_speedrun, run_speedrun
from megachat.programs.speedrun_recipe import Speedrun, settings_of_depth

DRY = ["speedrun", "--dry-run", "--recipe", "nanochat-run6", "--set", "parallel.tensor=2"]


@pytest.fixture(autouse=True)
def apart(monkeypatch, tmp_path):
    """The checkout's data, runs and commit do not count."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("megachat.programs.speedrun_checks.git", lambda *words: "c" * 40)


def verdict(out: str) -> tuple[str, str, str]:
    """Returns gigabytes, time and price of the head."""
    return re.search(r"fits[^:]*: ([0-9.]+ GB).*\ntime: ([0-9.]+ h) .*\nprice: ([0-9.]+)", out).groups()


def test_the_plan_is_of_the_printed_command_and_a_better_layout_is_a_hint(capsys):
    cli._run(DRY)
    out = capsys.readouterr().out
    printed = re.findall(r"--set (\S+)", next(line for line in out.splitlines() if " pretrain " in line))
    config = load_config(Speedrun("nanochat-run6").config_file, printed)
    assert verdict(out) == verdict(describe_job(config, 8, Hardware(memory_gb=80, gpu="H100", price=3.0)))
    hint = re.search(r"hint: with (.*) the prediction is ([0-9.]+ h) and ([0-9.]+ GB)", out)
    assert "--set parallel.sequence=true" in hint[1] and "the layout\n" in out
    cli._run([*DRY, *hint[1].split()])
    better = capsys.readouterr().out
    assert verdict(better)[:2] == (hint[3], hint[2]) and "hint" not in better


def test_a_printed_layout_that_does_not_fit_has_a_hint_of_one_that_does(capsys):
    assert cli._run(["speedrun", "--dry-run", "--recipe", "megachat", "--gpus", "8xL40S"]) == 1
    out = capsys.readouterr().out
    assert re.search(r"does not fit 8xL40S: [0-9.]+ GB per GPU", out) and "least hardware" not in out
    assert re.search(r"hint: with --set batch.micro_rows=[0-9]+ the prediction is ", out)


def test_a_machine_or_layout_that_cannot_be_is_reported_before_the_stages(capsys):
    for words, problem in {"--gpus lots": "known are A100", "--set parallel.tensor=5": "does not divide"}.items():
        with pytest.raises(UserError, match=problem):
            cli._run([*DRY[:4], *words.split()])
        assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "words, instead",
    [
        ("--set run.name=x", "use --set run.folder=FOLDER"),
        ("--tokenizer bar --set data.tokenizer=foo", "--tokenizer and --set data.tokenizer say the same"),
        ("--depth 3 --set model.depth=4", "--depth and --set model.depth"),
        ("--depth 3 --set evaluate.core_max_per_task=20", "for the CORE after it give --max-per-task N"),
        ('--set evaluate.core_every=0 --set evaluate.core_tasks=["copa"]', "give --bundle BUNDLE"),
    ],
)
def test_a_setting_that_would_be_dropped_is_refused(words, instead):
    with pytest.raises(UserError, match=instead):
        cli._run(["speedrun", "--dry-run", *words.split()])


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (None, 1)])
def test_a_launcher_that_a_signal_ended_has_its_status(number, status, monkeypatch):
    class Launcher:
        sent = []
        send_signal = sent.append

        def wait(self):
            if number:
                os.kill(os.getpid(), number)
            return 1

    monkeypatch.setattr(local_job.subprocess, "Popen", lambda line, env: Launcher())
    assert local_job.run_launcher([]) == status
    assert Launcher.sent == ([number] if number == signal.SIGTERM else [])


@pytest.mark.parametrize("status, state, ends", [(130, "stopped", 75), (143, "crashed", 143), (1, "stopped", 1)])
def test_a_training_that_saved_after_a_signal_ends_with_75(status, state, ends, monkeypatch, tmp_path, capsys):
    training = program.Stage("training", "", ["pretrain"], ranks=True, run=tmp_path)
    monkeypatch.setattr(program, "stages", lambda speedrun: [training])
    monkeypatch.setattr(program, "obstacles", lambda speedrun: [])
    monkeypatch.setattr(program, "unfit_questions", lambda speedrun: [])
    monkeypatch.setattr(program, "is_run", lambda folder: True)
    monkeypatch.setattr(program, "load_run", lambda folder: SimpleNamespace(state=state))
    assert run_speedrun(Speedrun("megachat"), pytest.fail, lambda arguments: status) == ends
    assert f"ended with status {ends}: the same" in capsys.readouterr().out


def test_passes_over_the_text_and_a_report_that_is_left_out(monkeypatch):
    monkeypatch.setattr(program.importlib.util, "find_spec", lambda name: None)
    few, enough = (describe_speedrun(Speedrun("nanochat-run6", shards=shards)) for shards in (3, 170))
    assert "\ntext: 3 shards have about 0.2 billion tokens, and the plan takes 5.8: at least 37.4 passes" in few
    assert "passes" not in enough
    assert "report of speedrun-nanochat-run6-1: left out, it needs plotly" in few


def test_the_warm_up_of_a_small_depth_fits_its_steps():
    for steps, warmup in {"60": 9, "240": 10}.items():
        chosen = [f"horizon.steps={steps}"]
        config = Speedrun("public-2026", (*settings_of_depth("public-2026", 3, chosen), *chosen)).config
        assert config.optimizer.warmup_steps == warmup
        assert setting_warnings(config, resolve_plan(config, 1, 4096)) == []


def test_short_times_have_a_small_unit():
    assert [hours_text(hours) for hours in (1234.5, 0.1, 0.05, 0.001)] == ["1,234.50 h", "0.10 h", "3.0 min", "3.6 s"]
