"""A record of the speedrun: its numbers, its text, and one sentence for each piece of evidence that is missing."""

import copy
import json
import re

import pytest

from megachat.commands import main as cli
from megachat.config import load_config
from megachat.errors import UserError
from megachat.evals.core_bundle import CORE_TASKS
from megachat.evals.results import evaluation_stamp, results_path
from megachat.planning.explain import plan_values
from megachat.planning.plan import resolve_plan
from megachat.studies.record import build_record, has_partial_core
from megachat.studies.record_text import record_text
from megachat.studies.runs import load_run
from tests.unit.evals.test_comparison import evaluated

STEPS = 20
HASH = {name: name * 64 for name in "abcd"}
START = {
    "commit": HASH["c"][:40],
    "uncommitted_changes": False,
    "device": "NVIDIA H100 80GB HBM3",
    "device_count": 8,
    "launch": {"world_size": 16, "local_size": 8},
    "packages": {"torch": "2.13.0", "wandb": None},
    "tokenizer": {"fingerprint": HASH["a"], "vocab_size": 32768, "origin": {"vocab_size": 32768, "data": HASH["b"]}},
    "data": {"source": "climbmix", "shards": {f"shard_{n:05d}.parquet": HASH["d"] for n in (0, 1, 2, 6542)}},
}
CONFIG = {"run": {"seed": 1}, "model": {"depth": 4, "vocab_size": 32768}, "horizon": {"steps": STEPS}}


@pytest.fixture
def make(tmp_path):
    """Writes a finished run whose parts `change` may spoil; returns its folder."""

    def write(name: str = "one", seconds: float = 120.0, change=lambda parts: None, seed: int = 1, chance: float = 0.7):
        folder = tmp_path / name
        (folder / "evaluations").mkdir(parents=True)
        evaluated(results_path(folder, STEPS), chance, seed, step=STEPS, **evaluation_stamp(HASH["a"]))
        (tmp_path / f"{name}.json").write_text(json.dumps(CONFIG | {"run": {"seed": seed}}))
        plan = plan_values(resolve_plan(load_config(tmp_path / f"{name}.json"), 16, 32768))
        last = {"step": STEPS, "total_training_time": seconds, "val/bpb": 0.9 + 0.001 * seed}
        parts = {
            "config": json.loads((tmp_path / f"{name}.json").read_text()),
            "plan": plan,
            "metrics": [{"step": STEPS - 1, "train/loss": 3.0, "train/skipped": False}, last],
            "environment": copy.deepcopy([START]),
            "core": json.loads(results_path(folder, STEPS).read_text()),
        }
        change(parts)
        for part in ("config", "plan", "environment"):
            (folder / f"{part}.json").write_text(json.dumps(parts[part]))
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in parts["metrics"]))
        results_path(folder, STEPS).write_text(json.dumps(parts["core"]))
        if not parts["core"]:
            results_path(folder, STEPS).unlink()
        return folder

    return write


def recorded(*folders) -> dict:
    return build_record([load_run(folder) for folder in folders])


def test_the_clock_the_means_and_the_verdict(make, capsys):
    folders = [make("a", 120.0), make("b", 126.0, seed=2), make("c", 132.0, seed=3)]
    record = recorded(*folders)
    assert record["minutes"] == {"mean": 2.1, "run_deviation": pytest.approx(0.1), "values": [2.0, 2.1, 2.2]}
    assert record["gpu_hours"]["mean"] == pytest.approx(2.1 / 60 * 16)
    assert record["bpb"]["mean"] == pytest.approx(0.902) and record["core"]["verdict"]["word"] == "above"
    assert record["core"]["mean"] == pytest.approx(record["core"]["core_metric"]) and record["runs"][0]["nodes"] == 2
    cli._run(["record", *map(str, folders), "--name", "ours"])
    text = capsys.readouterr().out
    assert text.startswith("## ours: 3 runs\n")
    for fact in (
        "| time, minutes | 2.10 +- 0.10 (run deviation); training steps after step 10 |",
        "| GPU-hours | 0.56 +- 0.03 (run deviation) |",
        "16 ranks on 2 nodes, NVIDIA H100 80GB HBM3; data 16 x tensor 1 x pipeline 1",
        "| against GPT-2's 0.256525 | above; 3 of 3 runs above |",
        "not the leaderboard's: tokens ",
        f"| tokenizer | `{HASH['a']}`, vocab_size 32768, data {'b' * 12} |",
        "| harness | version 1, megachat ",
        f"{HASH['d']}  shard_06542.parquet",
        "torch 2.13.0 |",
        '"model.depth": 4',
    ):
        assert fact in text, fact
    assert "run.seed" not in text, "the seed is no part of the recipe"
    cli._run(["record", str(folders[0]), "--json"])
    assert json.loads(capsys.readouterr().out)["minutes"]["run_deviation"] is None


def test_the_shards_of_the_tokenizer_are_shown(make):
    shards = {f"shard_{number:05d}.parquet": HASH["d"] for number in range(8)}
    folder = make(change=lambda parts: parts["environment"][0]["tokenizer"]["origin"].update(shards=shards))
    text = record_text(recorded(folder), "one")
    assert "data bbbbbbbbbbbb, shards shard_00000.parquet to shard_00007.parquet |" in text


def test_rows_of_the_leaderboard_are_recognized(make):
    def leaderboard(parts):
        parts["plan"]["evaluation_rows"] = 80 * 2**19 // 2048

    assert recorded(make(change=leaderboard))["runs"][0]["row_differences"] == {}


def planted(place: str, *keys, value=None):
    """Returns a change that sets a value inside a part of the run; None removes it."""

    def change(parts):
        inner = parts[place]
        for key in keys[:-1]:
            inner = inner[key]
        if value is None:
            del inner[keys[-1]]
        else:
            inner[keys[-1]] = value

    return change


def resumed(key: str, value):
    return lambda parts: parts["environment"].insert(0, copy.deepcopy(START) | {key: value})


SHARDS = START["data"]["shards"]
MISSING = {
    "time": (planted("metrics", 1, "total_training_time"), "no validation at the last step"),
    "validation": (planted("metrics", 1, "val/bpb"), "no validation at the last step"),
    "steps": (lambda parts: parts["metrics"].pop(), "has done 20 of 20|no validation at the last step"),
    "half": (planted("plan", "steps", value=40), "has done 20 of 40 steps"),
    "untimed": (planted("plan", "steps", value=11), "11 steps, and the clock counts those after the first 11"),
    "core": (lambda parts: parts["core"].clear(), "contains no evaluation with CORE"),
    "core of an earlier step": (planted("core", "step", value=10), "CORE is of step 10"),
    "all examples": (planted("core", "core", "whole", value=False), "has not all examples"),
    "uncropped prompts": (planted("core", "core", "crop", value=True), "cropped prompts"),
    "harness": (planted("core", "core", "harness"), "has no harness"),
    "bundle": (planted("core", "core", "bundle_digest"), "has no bundle digest"),
    "CORE's tokenizer": (planted("core", "core", "tokenizer"), "has no tokenizer"),
    "another tokenizer": (planted("core", "core", "tokenizer", value=HASH["b"]), "another tokenizer .b{12}"),
    "starts": (lambda parts: parts["environment"].clear(), "no record of a start"),
    "commit": (planted("environment", 0, "commit"), "no commit"),
    "device": (planted("environment", 0, "device"), "no device"),
    "tokenizer": (planted("environment", 0, "tokenizer"), "no tokenizer hash"),
    "shards": (planted("environment", 0, "data"), "no list of shards"),
    "a hash": (planted("environment", 0, "data", "shards", value=SHARDS | {"shard_00001.parquet": ""}), "have no hash"),
    "a shard": (
        planted("environment", 0, "data", "shards", "shard_00001.parquet"),
        "shard_00001.parquet is missing in",
    ),
    "one commit": (resumed("commit", "e" * 40), "resumed with another commit"),
    "one device": (resumed("device", "NVIDIA A100"), "resumed with another device"),
    "one number of ranks": (resumed("launch", {"world_size": 8}), "resumed on another number of ranks"),
    "one tokenizer": (resumed("tokenizer", {"fingerprint": "e", "vocab_size": 1}), "resumed with another tokenizer"),
    "one data folder": (resumed("data", {"shards": {"a": "b"}}), "resumed with other shards"),
}


@pytest.mark.parametrize("change, sentence", MISSING.values(), ids=MISSING)
def test_a_missing_piece_of_evidence_is_one_sentence(make, change, sentence):
    folder = make(change=change)
    with pytest.raises(UserError) as error:
        recorded(folder)
    lines = str(error.value).splitlines()
    assert len([line for line in lines if re.search(sentence, line)]) == 1 and str(folder) in lines[0], lines


def test_core_needs_all_tasks_and_several_mistakes_are_all_named(make):
    folder = make(change=planted("environment", 0, "commit"))
    file = results_path(folder, STEPS)
    evaluated(file, 0.7, 1, labels=CORE_TASKS[:3], step=STEPS, **evaluation_stamp(HASH["a"]))
    results = json.loads(file.read_text())
    results["core"]["crop"] = True
    file.write_text(json.dumps(results))
    (folder / "config.json").write_text(json.dumps(CONFIG | {"evaluate": {"core_bundle": "three"}}))
    with pytest.raises(UserError) as error:
        recorded(folder)
    commit, tasks, cropped = str(error.value).splitlines()
    assert "no commit" in commit and "has not all 22 tasks of CORE" in tasks
    assert "--core three" not in cropped and "--core BUNDLE` with a full bundle" in cropped


def test_a_copy_is_named_while_core_is_missing_and_a_command_has_the_bundle(make):
    def without_core(parts):
        parts["core"].clear()
        parts["config"]["evaluate"] = {"core_bundle": "my bundle"}
        parts["environment"][0]["command"] = ["pretrain.py", "--started-by", "speedrun"]

    def unfinished(parts):
        without_core(parts)
        parts["metrics"] = parts["metrics"][:1]
        parts["plan"]["steps"] = 40

    one, two = make("one", change=without_core), make("two", change=without_core)
    with pytest.raises(UserError) as error:
        recorded(one, two)
    *missing, copied = str(error.value).splitlines()
    assert [line.partition(" --core ")[2] for line in missing] == ["'my bundle'` first"] * 2
    assert copied.startswith(f"{two} is a copy of {one}: ")
    with pytest.raises(UserError, match="20 of 40 steps: finish it with the same `megachat speedrun` command"):
        recorded(make("half", change=unfinished))


def partial(parts):
    """CORE of seven tasks."""
    core = parts["core"]["core"]
    core["tasks"] = {label: core["tasks"][label] for label in CORE_TASKS[:7]}
    core |= {"core_metric": None, "verdict": None, "missing": list(CORE_TASKS[7:]), "mean_centered": 0.125}
    core["max_per_task"] = 50


def test_a_draft_is_no_record(make, capsys):
    folders = [make("a", 120.0, partial), make("b", 126.0, partial, seed=2)]
    with pytest.raises(UserError, match="a: step_000020.json has not all 22 tasks of CORE"):
        recorded(*folders)
    cli._run(["record", *map(str, folders), "--draft", "--name", "ours"])
    text = capsys.readouterr().out.rstrip("\n")
    cli._run(["record", *map(str, folders), "--draft", "--json"])
    record = json.loads(capsys.readouterr().out)
    assert len(record["problems"]) == 2 and record["core"]["mean"] == 0.125 and "verdict" not in record["core"]
    assert text == record_text(record, "ours")
    title, heading, reasons, table, *_ = text.split("\n\n")
    assert title == "## NOT A RECORD, a draft of ours: 2 runs" and heading == "A record refuses these runs:"
    assert [line.partition(": ")[0] for line in reasons.splitlines()] == [f"- {folder}" for folder in folders]
    (mean,) = (line for line in table.splitlines() if line.startswith("| mean of 7 of CORE's 22 tasks | 0.1250 +- "))
    assert " (standard error: examples " in mean and mean.endswith(" examples; not judged |")
    assert "GPT-2" not in text and "| time, minutes | 2.05 +- 0.07 (run deviation);" in table
    run = load_run(folders[0])
    digest = record["runs"][0]["bundle_digest"]
    requests = [(50, digest), (-1, digest), (50, "f" * 64)]
    assert [has_partial_core(run, *request) for request in requests] == [True, False, False]


def test_a_draft_of_different_models_shows_each(make):
    other = make("other", change=planted("environment", 0, "tokenizer", "vocab_size", value=48))
    record = build_record([load_run(folder) for folder in (make("one"), other)], draft=True)
    table = record_text(record, "ours")
    assert re.search(r"\| model \| depth [0-9]+, .* vocabulary [0-9,]+; depth [0-9]+, .* vocabulary 48 \|", table)


def test_a_draft_needs_numbers(make):
    untimed = make("untimed", change=planted("metrics", 1, "total_training_time"))
    for folders in ([untimed], [make("whole")] * 2, [make("none", change=lambda parts: parts["core"].clear())]):
        with pytest.raises(UserError):
            build_record([load_run(folder) for folder in folders], draft=True)
    assert build_record([load_run(make("record"))], draft=True)["problems"] == []


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            planted("config", "optimizer", value={"warmdown_ratio": 0.85}),
            "recipe .optimizer.warmdown_ratio not set; .* 0.85",
        ),
        (planted("environment", 0, "device", value="NVIDIA H200"), "hardware .NVIDIA H100 80GB HBM3; NVIDIA H200"),
        (planted("environment", 0, "commit", value="e" * 40), "commit .c{12}; e{12}"),
        (
            planted("environment", 0, "data", "shards", value={**SHARDS, "shard_00000.parquet": HASH["a"]}),
            "shards .shard",
        ),
        (planted("core", "core", "harness", value=9), "harness version .1; 9"),
        (planted("plan", "evaluation_rows", value=7), "validation rows"),
        (lambda parts: None, "two is a copy of .*one"),
    ],
)
def test_runs_of_a_record_are_alike_but_no_copies(make, change, sentence):
    with pytest.raises(UserError) as error:
        recorded(make(), make("two", 120.0 if "copy" in sentence else 121.0, change))
    lines = str(error.value).splitlines()
    assert len(lines) == 1 and re.search(sentence, lines[0]), lines


def test_runs_of_different_tokenizers_are_refused(make):
    def another(parts):
        parts["environment"][0]["tokenizer"]["fingerprint"] = parts["core"]["core"]["tokenizer"] = HASH["b"]

    one = make()
    with pytest.raises(UserError, match="differ in tokenizer .a{12}; b{12}"):
        recorded(one, make("two", 121.0, another))
    with pytest.raises(UserError, match="is given twice"):
        recorded(one, one)


def test_free_settings_may_differ(make):
    changes = planted("config", "log", value={"every": 10}), planted("config", "run", value={"seed": 2, "name": "x"})
    assert len(recorded(make("a", change=changes[0]), make("b", 121.0, change=changes[1]))["runs"]) == 2
