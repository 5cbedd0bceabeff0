"""The speedrun in one command on a CPU: killed in the middle of its training, continued, and recorded."""

import json
import os
import re
import signal
import sys
from pathlib import Path

import pytest

from megachat.commands import main as cli
from megachat.errors import UserError
from megachat.evals.core_bundle import CORE_TASKS
from megachat.files import is_locked
from megachat.programs.speedrun import RECIPES, Speedrun, describe_speedrun, run_speedrun, settings_of_depth, stages
from megachat.studies.metrics import read_metrics
from tests.runs.job import begin, finish, metrics, until
from tests.runs.network import two_hosts, why_not
from tests.runs.warm import Launcher
from tests.unit.evals.bundle import THREE, write_bundle
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
def options(tmp_path_factory) -> list[str]:
    """The options of a small speedrun, with its data and its bundle."""
    folder = tmp_path_factory.mktemp("speedrun")
    (folder / "texts").mkdir()
    for number in range(120):
        text = " ".join(WORDS[(number * word + word) % len(WORDS)] for word in range(3, 60))
        (folder / "texts" / f"{number}.txt").write_text(text)
    prepare(["--source", "text", "--input", f"{folder}/texts", "--shards", "2", "--out", f"{folder}/data"])
    write_bundle(folder / "bundle", dict.fromkeys(CORE_TASKS, THREE["lambada_openai"]))
    chosen = {f"{section}.{key}": value for section, keys in SIZES.items() for key, value in keys.items()}
    settings = [word for key, value in chosen.items() for word in ("--set", f"{key}={json.dumps(value)}")]
    places = ["--data", f"{folder}/data", "--tokenizer", f"{folder}/tokenizer", "--bundle", f"{folder}/bundle"]
    return ["--depth", "3", "--ranks", "1", *places, *settings, "--set", f"run.folder={folder}/runs"]


@pytest.fixture
def runs(options):
    """The folder of the runs."""
    return Path(options[-1].partition("=")[2])


@pytest.mark.slow
def test_the_script_continues_after_a_kill_and_ends_with_a_record(options, runs, capfd):
    run = runs / "speedrun-megachat-d3-1"
    process = Launcher([sys.executable, "-m", "megachat", "speedrun", *options])
    until(lambda: (run / "checkpoints" / f"step_{SAVED:06d}" / "checkpoint.json").exists(), "first checkpoint")
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    until(lambda: not is_locked(run), "end of the killed ranks")
    assert not (run / "evaluations").exists(), "killed too late"
    done = finish(begin(["bash", "launch/speedrun.sh", *options]))
    assert done.status == 0, done.out + done.err
    assert re.search("== data: .*2 train shards", done.out) and "/tokenizer exists" in done.out
    steps = [line["step"] for line in metrics(run) if "train/loss" in line]
    assert steps == list(range(STEPS)) and "resumed from " in done.out
    record = (runs / "speedrun-megachat-d3.record.md").read_text()
    assert record in done.out and "| against GPT-2's 0.256525 | below; 0 of 1 runs above |" in record
    assert json.loads((run / "environment.json").read_text())[0]["tokenizer"]["origin"]["vocab_size"] == 300
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
        "evaluate.core_bundle=no-bundle": "no-bundle",
    }.items():
        with pytest.raises(UserError, match=words):
            cli._run(["speedrun", *options, "--set", setting])


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


def speedrun(options: list[str], **more) -> Speedrun:
    parsed = cli.build_parser("speedrun", "speedrun").parse_args(options)
    places = [f"data.folder={parsed.data}", f"data.tokenizer={parsed.tokenizer}"]
    return Speedrun("public-2026", (*settings_of_depth("public-2026", 3), *places, *parsed.set), shards=None, **more)


def test_a_failed_stage_ends_the_call_with_its_status(options, capsys):
    started = []

    def start(arguments: list[str], status: int = 0) -> int:
        started.append(arguments[0])
        return status

    small = speedrun(options)
    assert run_speedrun(small, start, lambda arguments: start(arguments, 137)) == 137
    assert "pretrain" == started[-1] and "training speedrun-public-2026-d3-1 ended with status 137" in (
        capsys.readouterr().out
    )
    listed = describe_speedrun(speedrun(options, runs=2)).splitlines()
    assert [line.partition(":")[0] for line in listed if "-d3-2" in line] == [
        f"{name} speedrun-public-2026-d3-2" for name in ("training", "CORE of", "report of")
    ]
    assert any("run.seed=43" in line for line in listed) and "(on all ranks)" in listed[2]


def test_recipes_at_other_depths():
    assert set(RECIPES) == set(cli.build_parser("speedrun", "")._option_string_actions["--recipe"].choices)
    for recipe in RECIPES:
        small = Speedrun(recipe, tuple(settings_of_depth(recipe, 3))).config
        assert (small.model.depth, small.precision.fp8, small.model.sequence_len) == (3, "off", 256)
        assert bool(small.ngram.blocks) == (recipe == "megachat") and max(small.ngram.blocks, default=0) < 3
        large = Speedrun(recipe, tuple(settings_of_depth(recipe, 12))).config
        assert (large.model.depth, large.precision.fp8, large.model.sequence_len) == (12, "tensorwise", 2048)
    assert Speedrun("public-2026").name == "speedrun-public-2026"
    several = describe_speedrun(
        Speedrun("public-2026", ("data.folder=none", "data.tokenizer=none"), runs=3), 2.5
    ).splitlines()
    assert several[-3].startswith("download: 171 shards of climbmix, about 17.1 GB ")
    assert several[-2].endswith("; 3 runs take 3 times that") and "--price, 2.5 per GPU-hour" in several[-1]
    first, second = list(stages(Speedrun("public-2026", ("data.tokenizer=none",))))[:2]
    assert first.arguments[:5] == ["data", "--source", "climbmix", "--shards", "170"]
    assert second.arguments[3:7] == ["--vocab-size", "49152", "--shards", "0-7"] and not second.done


def test_a_tokenizer_of_other_data_is_beside_it(options, capsys):
    folder = options[options.index("--data") + 1]
    cli._run(["speedrun", "--depth", "3", "--data", folder, "--dry-run"])
    out = capsys.readouterr().out
    assert f"tokenizer: megachat tokenizer --data {folder} --vocab-size 4096 --out {folder}_tokenizer4096\n" in out
    assert "layout = data 2 x tensor 1 x pipeline 1; 240 steps of 8,192 tokens" in out
    assert "record: runs/speedrun-megachat-d3.record.md\n" in out


def test_the_plan_is_of_the_hosts(tmp_path, monkeypatch, capsys):
    planned, hosts = [], tmp_path / "hosts"
    monkeypatch.setattr(cli, "start", lambda name, arguments, prog: planned.append(arguments) or 0)
    line = ["speedrun", "--dry-run", "--hostfile", str(hosts), "--set", "data.tokenizer=none"]
    hosts.write_text("a slots=4\nb slots=4\n")
    for more in ([], ["--gpus", "4xH100"], ["--depth", "3"]):
        options = cli.build_parser("speedrun", "").parse_args([*line[1:], *more])
        assert cli._module("speedrun").run(options) == 0
    assert [words[-4:] for words in planned[:2]] == [
        ["--gpus", machine, "--price", "3.0"] for machine in ("2x4xH100", "4xH100")
    ]
    assert planned[2][-2:] == ["--world", "8"]
    for text, problem in {"a slots=4\nb slots=2\n": "different slots", "a slot=4": "line 1: .*NAME slots=N"}.items():
        hosts.write_text(text)
        with pytest.raises(UserError, match=problem):
            cli._module("speedrun").run(cli.build_parser("speedrun", "").parse_args(line[1:]))


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
        "--hostfile nowhere": "the hostfile nowhere cannot be read .*see launch/hostfile.example",
        "--gpus 8xH100": "--gpus is for a plan only: add --dry-run",
        "--price 2": "--price is for a plan only",
        "--price 2 --dry-run --depth 3": "depth 3 is planned for this CPU: give --gpus, too",
        "--dry-run --set model.vocab_size=100": "a vocabulary of 100 tokens is too small",
        "--dry-run --set model.vocab_size=null": "model.vocab_size is null, but the tokenizer needs a size",
    }.items():
        with pytest.raises(UserError, match=problem):
            cli._run(["speedrun", *words.split()])
    with pytest.raises(UserError, match="the text in .*data has about [0-9,]+ bytes, too few for .* 16,000,000 tokens"):
        words = [*options, "--set", "model.vocab_size=16000000", "--tokenizer", str(tmp_path / "other"), "--dry-run"]
        cli._run(["speedrun", *words])
    with pytest.raises(UserError, match="a vocabulary of [0-9]+ tokens, not 20000.*--vocab-size"):
        words = [*options, "--set", "model.vocab_size=20000", "--tokenizer", str(tmp_path / "other")]
        cli._run(["speedrun", *words])
