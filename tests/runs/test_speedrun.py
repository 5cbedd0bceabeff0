"""The speedrun in one command on a CPU: killed in the middle of its training, continued, and recorded."""

import json
import os
import re
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megachat.commands import main as cli
from megachat.errors import UserError
from megachat.evals.core_bundle import CORE_TASKS
from megachat.files import is_locked
from megachat.programs.speedrun import describe_speedrun, run_speedrun, stages
from megachat.programs.speedrun_checks import made_by_stages, obstacles, unfit_questions
from megachat.programs.speedrun_recipe import RECIPES, Speedrun, settings_of_depth
from megachat.studies.metrics import read_metrics
from megachat.studies.runs import resumed_with
from tests.runs.forked import environment, run_forked
from tests.runs.job import begin, finish, metrics, until
from tests.runs.network import two_hosts, why_not
from tests.runs.pause import Pause
from tests.runs.warm import Launcher
from tests.unit.evals.bundle import THREE, write_bundle
from tests.unit.prepare.test_download import Mirror, mirror  # noqa: F401
from tools.prepare_data import main as prepare

STEPS, SAVED = 30, 10
REASON = why_not()
WORDS = "the old river carried small boats past seven quiet towns while people on its banks sang about rain".split()
SIZES = {
    "model": {"aspect_ratio": 16, "head_size": 16, "sequence_len": 64, "vocab_size": 300},
    "batch": {"tokens": 1024, "micro_rows": 8},
    "horizon": {"steps": STEPS},
    "evaluate": {"every": 0, "tokens": 1024, "prompts": []},
    "checkpoint": {"every": SAVED},
    "data": {"streams": 2},
    "ngram": {"rows": 300},
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """A folder with the data and the bundle of a small speedrun."""
    folder = tmp_path_factory.mktemp("speedrun")
    (folder / "texts").mkdir()
    for number in range(120):
        text = " ".join(WORDS[(number * word + word) % len(WORDS)] for word in range(3, 60))
        (folder / "texts" / f"{number}.txt").write_text(text)
    prepare(["--source", "text", "--input", f"{folder}/texts", "--shards", "2", "--out", f"{folder}/data"])
    write_bundle(folder / "bundle", dict.fromkeys(CORE_TASKS, THREE["lambada_openai"]))
    return folder


@pytest.fixture
def options(prepared, tmp_path) -> list[str]:
    """The options of a small speedrun. Runs and tokenizer are the test's alone: a finished run changes what follows."""
    chosen = {f"{section}.{key}": value for section, keys in SIZES.items() for key, value in keys.items()}
    settings = [word for key, value in chosen.items() for word in ("--set", f"{key}={json.dumps(value)}")]
    places = ["--data", f"{prepared}/data", "--tokenizer", f"{tmp_path}/tokenizer", "--bundle", f"{prepared}/bundle"]
    return ["--depth", "3", "--ranks", "1", *places, *settings, "--set", f"run.folder={tmp_path}/runs"]


@pytest.fixture
def apart(monkeypatch, tmp_path):
    """The checkout's data and runs do not count, nor does its commit, which may change, and is None if git is slow."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("megachat.programs.speedrun_checks.git", lambda *words: "c" * 40)


@pytest.fixture
def runs(options):
    """The folder of the runs."""
    return Path(options[-1].partition("=")[2])


@pytest.mark.slow
def test_the_script_continues_after_a_kill_and_ends_with_a_record(options, runs, capfd, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", environment()["PATH"])  # one commit for the script and for this process
    run, pause = runs / "speedrun-megachat-d3-1", Pause(tmp_path / "pause", SAVED + 2)
    process = Launcher([sys.executable, "-m", "megachat", "speedrun", *options], pause.variables)
    first = run / "checkpoints" / f"step_{SAVED:06d}" / "checkpoint.json"
    until(lambda: process.poll() is not None or pause.ranks == 1 and first.exists(), "first checkpoint")
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    until(lambda: not is_locked(run), "end of the killed ranks")
    done = finish(begin(["bash", "launch/speedrun.sh", *options]))
    assert done.status == 0, done.out + done.err
    assert re.search("== data: .*2 train shards", done.out) and "/tokenizer exists" in done.out
    steps = [line["step"] for line in metrics(run) if "train/loss" in line]
    assert steps == list(range(STEPS)) and "resumed from " in done.out
    record = (runs / "speedrun-megachat-d3.record.md").read_text()
    assert record in done.out and "| against GPT-2's 0.256525 | below; 0 of 1 runs above |" in record
    assert json.loads((run / "environment.json").read_text())[0]["tokenizer"]["origin"]["vocab_size"] == 300
    assert resumed_with(run) == "the same `megachat speedrun` command"
    before = {path: path.stat().st_mtime for path in run.rglob("*")}
    assert cli._run(["speedrun", *options]) == 0, "nothing is left to do"
    out = capfd.readouterr().out
    assert out.count("== ") == 6 and "all 30 steps are done" in out and ": megachat" not in out
    assert {path: path.stat().st_mtime for path in run.rglob("*")} == before
    assert len(read_metrics(run)) and cli._run(["speedrun", *options, "--dry-run"]) == 0
    assert "training speedrun-megachat-d3-1: done" in capfd.readouterr().out
    for setting, words in {
        "optimizer.matrix_lr=0.5": f"{run} was trained with optimizer.matrix_lr=its default, not 0.5",
        "model.vocab_size=400": "/tokenizer has 300 tokens, not 400",
        "evaluate.core_bundle=no-bundle": "--bundle and --set evaluate.core_bundle say the same",
    }.items():
        with pytest.raises(UserError, match=words):
            cli._run(["speedrun", *options, "--set", setting])
    check_draft(options, run)


def check_draft(options: list[str], run: Path):
    """The trained run is evaluated on a part of CORE: by its own stage, which is skipped the next time."""
    shutil.rmtree(run / "evaluations")
    bundle = write_bundle(run.parent.parent / "three", THREE)
    small = speedrun(options, recipe="megachat", draft=True, max_per_task=4, bundle=bundle)
    started = []

    def on_a_rank(arguments: list[str]) -> int:
        started.append(arguments)
        return run_forked(["launch/evaluate.py", *arguments[1:]]).status

    file = run.parent / "speedrun-megachat-d3.draft.md"
    for _ in range(2):
        assert run_speedrun(small, start_here, on_a_rank) == 0
        text = file.read_text()
    assert started == [["evaluate", "--checkpoint", str(run), "--core", str(bundle), "--max-per-task", "4"]]
    assert text.startswith("## NOT A RECORD, a draft of speedrun-megachat-d3: 1 run\n\nA record refuses these runs:")
    assert "step_000030.json has not all 22 tasks of CORE" in text and "not judged" in text and "GPT-2" not in text


@pytest.mark.slow
@pytest.mark.skipif(REASON is not None, reason=str(REASON))
def test_two_hosts_train_and_the_first_evaluates(options, tmp_path):
    with two_hosts(tmp_path) as network:
        both = network.hostfile("both", "host-a slots=1\nhost-b slots=1\n")
        more = ["--hostfile", both, "--set", f"run.folder={tmp_path}/runs", "--set", 'model.norm_scales=["mlp"]']
        done = finish(network.warm("host-a", [sys.executable, "-m", "megachat", "speedrun", *options, *more]))
        assert done.status == 0 and network.processes("pretrain.py") == [], done.out + done.err
    run = tmp_path / "runs" / "speedrun-megachat-d3-1"
    record = (tmp_path / "runs" / "speedrun-megachat-d3.record.md").read_text()
    assert len(metrics(run)) and "| hardware | 2 ranks on 2 nodes, " in record and '"mlp"' in record


def speedrun(options: list[str], *settings: str, recipe="public-2026", bundle=None, **more) -> Speedrun:
    parsed = cli.build_parser("speedrun", "speedrun").parse_args(options)
    places = [f"data.folder={parsed.data}", f"data.tokenizer={parsed.tokenizer}"]
    places.append(f"evaluate.core_bundle={bundle or parsed.bundle}")
    return Speedrun(
        recipe,
        (*settings_of_depth(recipe, 3, parsed.set), *places, *parsed.set, *settings),
        **({"shards": None} | more),
    )


def start_here(arguments: list[str]) -> int:
    return cli.start(arguments[0], arguments[1:], "megachat")


@pytest.mark.usefixtures("apart")
def test_a_failed_stage_ends_the_call_with_its_status(options, capsys, monkeypatch, tmp_path):
    options, started = [*options, "--tokenizer", str(tmp_path / "tokenizer")], []
    monkeypatch.setattr("megachat.job.local_job.run_with_deepspeed", lambda *line: started.append(line) or 137)
    assert cli._run(["speedrun", *options]) == 137
    ((words, ranks),) = started
    assert words[0] == "pretrain" and words[-2:] == ["--started-by", "speedrun"] and ranks == 1
    assert cli.build_parser("pretrain", "").parse_args(words[1:]).started_by == "speedrun"
    out = capsys.readouterr().out
    assert "megachat-d3-1 ended with status 137: the same `megachat speedrun` command continues here" in out
    shown = next(line for line in out.splitlines() if " pretrain --config " in line)
    assert "--started-by" not in shown and shown.count("horizon.steps=") == 1, "each setting once"
    listed = describe_speedrun(speedrun(options, runs=2)).splitlines()
    assert [line.partition(":")[0] for line in listed if "-d3-2" in line] == [
        f"{name} speedrun-public-2026-d3-2" for name in ("training", "CORE of", "report of")
    ]
    assert any("run.seed=43" in line for line in listed) and "(on all ranks)" in listed[2]


@pytest.mark.usefixtures("apart")
def test_recipes_at_other_depths():
    assert set(RECIPES) == set(cli.build_parser("speedrun", "")._option_string_actions["--recipe"].choices)
    for recipe in RECIPES:
        small = Speedrun(recipe, tuple(settings_of_depth(recipe, 3))).config
        assert (small.model.depth, small.precision.fp8, small.model.sequence_len) == (3, "off", 256)
        assert bool(small.ngram.blocks) == (recipe == "megachat") and max(small.ngram.blocks, default=0) < 3
        large = Speedrun(recipe, tuple(settings_of_depth(recipe, 12))).config
        assert (large.model.depth, large.precision.fp8, large.model.sequence_len) == (12, "tensorwise", 2048)
    assert Speedrun("public-2026").name == "speedrun-public-2026"
    planned = Speedrun("public-2026", ("data.folder=none", "data.tokenizer=none"), runs=3)
    several = describe_speedrun(planned, price=2.5).splitlines()
    assert several[-3].startswith("download: 171 shards of climbmix, about 17.1 GB ")
    assert several[-2].endswith("; 3 runs take 3 times that") and "--price, 2.5 per GPU-hour" in several[-1]
    first, second = list(stages(Speedrun("public-2026", ("data.tokenizer=none",))))[:2]
    assert first.arguments[:5] == ["data", "--source", "climbmix", "--shards", "170"]
    assert second.arguments[3:7] == ["--vocab-size", "49152", "--shards", "0-7"] and not second.done


@pytest.mark.usefixtures("apart")
def test_the_shards_are_downloaded_once(options, mirror, tmp_path, capsys):  # noqa: F811
    """Data and tokenizer of a call, from an HTTP server on this machine that has one shard later than the others."""
    mirror.files["shard_06542.parquet"] = mirror.files["shard_00009.parquet"]
    mirror.faults["shard_00001.parquet"] = ["404"]
    places = f"data.folder={tmp_path / 'climbmix'}", f"data.tokenizer={tmp_path / 'tokenizer'}"
    small = speedrun(options, *places, shards=2, base_url=mirror.source.base_url)
    assert "download: 3 shards of climbmix" in describe_speedrun(small)
    assert made_by_stages(small).keys() == {"data folder", "tokenizer", "CORE bundle"}
    with pytest.raises(UserError, match="shard_00001.parquet answers HTTP 404: check --base-url and --shards"):
        run_speedrun(small, start_here, pytest.fail)
    for _ in range(2):
        assert run_speedrun(small, start_here, lambda arguments: 137) == 137
    assert mirror.requests["shard_00001.parquet"] == 2 and max(mirror.requests.values()) == 2
    origin = json.loads((tmp_path / "tokenizer" / "tokenizer.json").read_text())["origin"]
    assert list(origin["shards"]) == ["shard_00000.parquet", "shard_00001.parquet"], "the last one is for validation"
    assert "training speedrun-public-2026-d3-1 ended with status 137" in capsys.readouterr().out
    assert "download: 0 shards" in describe_speedrun(small) and "tokenizer" not in made_by_stages(small)


def started_run(small: Speedrun, **start) -> None:
    """Writes what a run has that was started and not finished."""
    folder = small.folder_of(0)
    folder.mkdir(parents=True)
    (folder / "environment.json").write_text(json.dumps([start]))


REFUSED = {
    "a part of CORE": (
        "three",
        {},
        "three: 19 of CORE's 22 tasks are missing .hellaswag_zeroshot, jeopardy, .*, and a record needs all",
    ),
    "some examples": ("", {"max_per_task": 4}, "--max-per-task is 4, but a record has all examples"),
    "cropped prompts": ("evaluate.core_crop=true", {}, "evaluate.core_crop is true"),
    "another commit": ("commit", {}, "-d3-1 was trained with commit aaaaaaaaaaaa, now it is "),
    "other ranks": ("world", {"ranks": 1}, "-d3-1 was trained on 4 ranks, now on 1"),
}


@pytest.mark.parametrize("change, more, problem", REFUSED.values(), ids=REFUSED)
@pytest.mark.usefixtures("apart")
def test_what_a_record_will_refuse_is_reported_first(change, more, problem, options, tmp_path, capsys):
    settings = [f"run.folder={tmp_path}/runs", f"data.tokenizer={tmp_path}/tokenizer"]
    bundle = write_bundle(tmp_path / "three", THREE) if change == "three" else None
    small = speedrun(options, *settings, *([change] if "=" in change else []), bundle=bundle, **more)
    if change in ("commit", "world"):
        started_run(small, **({"commit": "a" * 40} if change == "commit" else {"launch": {"world_size": 4}}))
    (reason,) = obstacles(small)
    assert re.search(problem, reason), reason
    with pytest.raises(UserError, match=f"no record can come of this: .*{problem}(.|\n)*with --draft it trains anyway"):
        run_speedrun(small, pytest.fail, pytest.fail)
    listed = describe_speedrun(small, obstacles(small))
    assert f"no record can come of this: {reason}\nso nothing would be started" in listed and "record: " not in listed
    draft = replace(small, draft=True)
    assert f"\ndraft: {tmp_path}/runs/speedrun-public-2026-d3.draft.md" in describe_speedrun(draft, obstacles(draft))
    assert run_speedrun(draft, start_here, lambda arguments: 137) == 137
    assert f"== no record can come of this: {reason}\n== data" in capsys.readouterr().out


@pytest.mark.usefixtures("apart")
def test_questions_that_do_not_fit_are_counted_before_the_training(options, tmp_path, capsys):
    settings = [f"run.folder={tmp_path}/runs", f"data.tokenizer={tmp_path}/tokenizer", "model.sequence_len=16"]
    settings += ["batch.tokens=256", "evaluate.tokens=256"]
    bundle = write_bundle(tmp_path / "all", dict.fromkeys(CORE_TASKS, THREE["lambada_openai"]))
    file = bundle / "eval_data/language_modeling/squad.jsonl"
    file.write_text(file.read_text() + json.dumps({"context": "rain " * 90, "continuation": "bread"}) + "\n")
    small = speedrun(options, *settings, bundle=bundle)
    with pytest.raises(UserError, match="[0-9] questions of CORE do not fit the model's 160 tokens .squad "):
        run_speedrun(small, start_here, pytest.fail)
    assert (tmp_path / "tokenizer").exists() and obstacles(small) == unfit_questions(small)
    capsys.readouterr()
    assert run_speedrun(replace(small, draft=True), start_here, lambda arguments: 137) == 137
    assert capsys.readouterr().out.count("do not fit the model's") == 1
    with pytest.raises(UserError, match="squad has [0-9]+ tokens, .* set evaluate.core_unfit=leave_out"):
        obstacles(speedrun(options, *settings, "evaluate.core_unfit=refuse", bundle=bundle))


@pytest.mark.usefixtures("apart")
def test_a_dry_run_has_no_problem_that_a_stage_solves(options, tmp_path, capsys):
    words = ["speedrun", *options, "--tokenizer", str(tmp_path / "none"), "--dry-run"]
    assert cli._run(words) == 0
    out = capsys.readouterr().out
    assert "; no problem on this machine" in out and f"ok      tokenizer: {tmp_path}/none, trained by the stage" in out
    assert "ok      CORE bundle: 22 tasks, 132 examples" in out
    assert (
        "time and price: not predicted, because the speed of 1 rank on this machine is not known; `megachat pro" in out
    )
    assert cli._run([*words, "--max-per-task", "4"]) == 2, "nothing would be started"
    assert "no record can come of this: --max-per-task is 4" in capsys.readouterr().out
    assert cli._run([*words, "--max-per-task", "4", "--draft"]) == 0


@pytest.mark.usefixtures("apart")
def test_a_tokenizer_of_other_data_is_beside_it(options, capsys):
    folder = options[options.index("--data") + 1]
    cli._run(["speedrun", "--depth", "3", "--data", folder, "--dry-run"])
    out = capsys.readouterr().out
    assert f"tokenizer: megachat tokenizer --data {folder} --vocab-size 4096 --out {folder}_tokenizer4096\n" in out
    assert "layout = data 2 x tensor 1 x pipeline 1; 240 steps of 8,192 tokens" in out
    assert "record: runs/speedrun-megachat-d3.record.md\n" in out


@pytest.mark.usefixtures("apart")
def test_the_plan_is_of_the_hosts(tmp_path, monkeypatch, capsys):
    planned, hosts = [], tmp_path / "hosts"

    def plan(path, settings, machine, price):
        planned.append((machine.name, price))
        return "", True

    monkeypatch.setattr("megachat.programs.plan.describe_printed_plan", plan)
    line = ["speedrun", "--dry-run", "--hostfile", str(hosts), "--set", "data.tokenizer=none"]
    hosts.write_text("a slots=4\nb slots=4\n")
    for more in ([], ["--gpus", "4xH100"], ["--depth", "3", "--set", "batch.micro_rows=4"]):
        options = cli.build_parser("speedrun", "").parse_args([*line[1:], *more])
        assert cli._module("speedrun").run(options) == 0
    assert (
        planned == [("2x4xH100", 3.0), ("4xH100", 3.0)]
        and "layout = data 8 x tensor 1 x pipeline 1; " in capsys.readouterr().out
    )
    for text, problem in {"a slots=4\nb slots=2\n": "different slots", "a slot=4": "line 1: .*NAME slots=N"}.items():
        hosts.write_text(text)
        with pytest.raises(UserError, match=problem):
            cli._module("speedrun").run(cli.build_parser("speedrun", "").parse_args(line[1:]))


@pytest.mark.usefixtures("apart")
def test_bad_input(options, tmp_path):
    with pytest.raises(UserError, match="none does not exist"):
        cli._run(["speedrun", "--data", str(tmp_path / "none")])
    data, gap = Path(options[options.index("--data") + 1]), tmp_path / "gap"
    gap.mkdir()
    for number in (0, 2, 9):
        (gap / f"shard_{number:05d}.parquet").symlink_to(data / "shard_00000.parquet")
    with pytest.raises(
        UserError, match="gap: 3 of its shards have no hash .*\n.*gap: shard_00001.parquet is missing in"
    ):
        cli._run(["speedrun", "--depth", "3", "--data", str(gap)])
    unfit = [*options, "--tokenizer", str(tmp_path / "other"), "--set", "parallel.tensor=2"]
    with pytest.raises(UserError, match="parallel.tensor 2 x parallel.pipeline 1 does not divide the 1 rank "):
        cli._run(["speedrun", *unfit])
    assert not (tmp_path / "other").exists(), "refused before the tokenizer is trained"
    with pytest.raises(UserError, match="--runs is 0"):
        cli._run(["speedrun", "--runs", "0"])
    for words, problem in {
        "--data here --shards 3": "--shards are downloaded, but --data gives a folder that exists",
        "--data here --base-url http://mirror": "--base-url is for a download, but --data gives a folder that exists",
        "--hostfile nowhere": "the hostfile nowhere cannot be read .*see launch/hostfile.example",
        "--gpus 8xH100": "--gpus is for a plan only: add --dry-run",
        "--price 2": "--price is for a plan only",
        "--price 2 --dry-run --depth 3": "depth 3 is planned for this CPU: give --gpus, too",
        "--dry-run --set model.vocab_size=100": "a vocabulary of 100 tokens is too small",
        "--dry-run --set model.vocab_size=null": "model.vocab_size is null, but the tokenizer needs a size",
        "--dry-run --set horizon.steps=11": "this recipe has 11 steps, and the clock counts those after the first 11",
        "--draft --set horizon.stop_step=20": "horizon.stop_step is 20, before the last of [0-9]+ steps",
    }.items():
        with pytest.raises(UserError, match=problem):
            cli._run(["speedrun", *words.split()])
    with pytest.raises(UserError, match="the text in .*data has about [0-9,]+ bytes, too few for .* 16,000,000 tokens"):
        words = [*options, "--set", "model.vocab_size=16000000", "--tokenizer", str(tmp_path / "other"), "--dry-run"]
        cli._run(["speedrun", *words])
    with pytest.raises(
        UserError, match="vocabulary of [0-9]+ tokens, not 20000.*of a speedrun: --set model.vocab_size="
    ):
        words = [*options, "--set", "model.vocab_size=20000", "--tokenizer", str(tmp_path / "other")]
        cli._run(["speedrun", *words])
