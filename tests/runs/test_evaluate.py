"""launch/evaluate.py, and CORE during training: equal on every launcher and layout, through stop and resume."""

import json
import re

import pytest

from megachat.checkpoint.resume import newest_complete
from megachat.config import load_config
from megachat.errors import SAVED_STATUS, UserError
from megachat.evals.results import HARNESS_VERSION
from megachat.job.launch import bootstrap_environment
from megachat.programs.dry_run import describe_job
from megachat.programs.evaluate import EvaluationRequest, evaluate
from megachat.programs.job_inputs import check_job_inputs
from tests import reference
from tests.limits import limit_s
from tests.runs.forked import run_forked
from tests.runs.job import (
    STEPS,
    bits_per_byte,
    checkpoint,
    command,
    facts,
    finish,
    launched,
    losses,
    metrics,
    train,
)
from tests.runs.warm import Launcher
from tests.unit.evals.bundle import ALL, write_bundle
from tools.prepare_data import main as prepare

BUNDLE = reference.FOLDER.parents[1] / "eval_bundle"
CAP = 4  # examples of a task


@pytest.fixture(scope="module")
def bundle(place):
    return write_bundle(place.runs / "bundle", ALL)


def core(bundle, **more) -> dict:
    """Returns a config that evaluates CORE at step 3 and at the end."""
    return {"evaluate": {"core_every": 3, "core_bundle": str(bundle), "core_max_per_task": CAP} | more}


@pytest.fixture(scope="module")
def core_run(place, bundle):
    """A run on two ranks with CORE during training."""
    return train(place, "core", world=2, config=core(bundle))


def evaluated(launcher: str | None, world: int, saved, out, *arguments) -> dict:
    """Runs launch/evaluate.py, which must succeed. Returns the JSON file's content, and the output under "log"."""
    program = ["launch/evaluate.py", "--checkpoint", saved, "--out", out, *arguments]
    done = finish(Launcher(launched(launcher, world, program))) if launcher else run_forked(program, world)
    assert done.status == 0, f"{launcher} on {world} ended with {done.status}:\n{done.out}\n{done.err}"
    return json.loads(out.read_text()) | {"log": done.out}


def answers(result: dict) -> dict[str, str]:
    return {label: task["right"] for label, task in result["core"]["tasks"].items()}


def core_lines_by_step(run) -> dict[int, dict]:
    return {line["step"]: line for line in metrics(run) if "centered_results" in line}


def in_training(run, step: int) -> dict:
    return json.loads((run / "evaluations" / f"step_{step:06d}_in_training.json").read_text())


def test_core_during_training(core_run, two, bundle):
    result = core_lines_by_step(core_run)
    assert list(result) == [3, STEPS] and all(list(line["centered_results"]) == list(ALL) for line in result.values())
    for step, line in result.items():
        assert line["core_metric"] == pytest.approx(sum(line["centered_results"].values()) / 22)
        assert in_training(core_run, step)["core"]["core_metric"] == line["core_metric"]
        assert (
            set(in_training(core_run, step)["core"]["tasks"]["copa"]["right"]) <= set("01")
            and not in_training(core_run, step)["core"]["whole"]
        )
    assert losses(core_run) == losses(two) and bits_per_byte(core_run) == bits_per_byte(
        two
    )  # CORE does not change training
    environment = json.loads((core_run / "environment.json").read_text())
    section = in_training(core_run, 3)["core"]
    assert environment[-1]["core_bundle"] == section["bundle_digest"]
    fingerprint = facts(checkpoint(core_run, STEPS))["tokenizer"]["fingerprint"]
    assert (section["tokenizer"], section["harness"]) == (fingerprint, HARNESS_VERSION) and section["megachat"]


def test_every_launcher_and_layout_repeats_what_training_logged(core_run, bundle, place, tmp_path, capsys):
    texts = {name: place.runs / name for name in ("novels", "notes")}
    for name, folder in texts.items():
        folder.mkdir()
        for number in range(60):
            (folder / f"{number}.txt").write_text(f"the {name} of {number} old towns " * 3)
    inputs = (part for name, folder in texts.items() for part in ("--input", f"{name}={folder}"))
    prepare(["--source", "text", *inputs, "--out", f"{tmp_path}/data"])
    parts = ("--core", bundle, "--max-per-task", str(CAP))
    alone = evaluated(None, 1, core_run, tmp_path / "alone.json", *parts, "--bpb", "--sample")
    deepspeed = evaluated(
        "deepspeed", 2, checkpoint(core_run, STEPS), tmp_path / "deepspeed.json", *parts, "--bpb", tmp_path / "data"
    )
    layout = (
        "--set",
        "parallel.tensor=2",
        "--set",
        "parallel.pipeline=2",
        "--bpb",
        tmp_path / "data",
        "--sample",
        "--core-crop",
    )
    cut = evaluated(None, 4, core_run, tmp_path / "cut.json", *parts, *layout)
    expected = in_training(core_run, STEPS)
    assert answers(alone) == answers(deepspeed) == answers(cut) == answers(expected)
    assert (
        alone["core"]["core_metric"] == expected["core"]["core_metric"]
        and alone["core"]["verdict"] == expected["core"]["verdict"]
    )
    assert alone["bpb"]["harness"] == HARNESS_VERSION and alone["bpb"]["tokenizer"] == alone["tokenizer"]
    assert alone["bpb"]["bpb"] == pytest.approx(bits_per_byte(core_run)[STEPS], rel=1e-6)
    assert (
        deepspeed["bpb"]["bpb"] == pytest.approx(cut["bpb"]["bpb"], rel=1e-6)
        and deepspeed["bpb"]["bpb"] != alone["bpb"]["bpb"]
    )
    assert list(cut["bpb"]["sources"]) == ["novels", "notes"] and all(
        source["rows"] > 0 for source in cut["bpb"]["sources"].values()
    )
    for name, source in cut["bpb"]["sources"].items():
        assert deepspeed["bpb"]["sources"][name] == pytest.approx(source, rel=1e-6)
    assert (
        alone["samples"] == cut["samples"] == json.loads((core_run / "samples" / f"step_{STEPS:06d}.json").read_text())
    )
    assert "not the full metric" in alone["log"] and "against GPT-2's: " in alone["log"] and alone["step"] == STEPS
    assert cut["layout"] == {"data": 1, "tensor": 2, "pipeline": 2} and "samples" not in deepspeed
    # the prompts of this bundle fit a row, so cropping changes nothing here
    assert [result["core"]["crop"] for result in (alone, deepspeed, cut)] == [False, False, True]
    assert "prompts are cropped" in cut["log"] and "prompts are cropped" not in alone["log"]


# launch/pretrain.py, whose rank is requested to stop after the first task of CORE
STOPPED_IN_CORE = """
import os, runpy, signal, time
from megachat.train import tasks

evaluate, checks = tasks.evaluate_bundle, []

def stopped(*arguments, stop, **options):
    def stop_now():
        checks.append(stop())
        if len(checks) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            while not stop():
                time.sleep(0.01)
        return stop()

    return evaluate(*arguments, stop=stop_now, **options)

tasks.evaluate_bundle = stopped
runpy.run_path("launch/pretrain.py", run_name="__main__")
"""


def test_a_stop_interrupts_core_and_the_resumed_run_repeats_it(place, bundle, core_run, one):
    tasks = list(ALL)[:9]
    config = core(bundle, core_tasks=tasks) | {"checkpoint": {"stop_s": limit_s()}}
    (place.runs / "stopped.py").write_text(STOPPED_IN_CORE)
    done = run_forked([place.runs / "stopped.py", *command(place, "stopped", config=config)[1:]])
    stopped = place.runs / "stopped"
    assert done.status == SAVED_STATUS, done
    saved, _ = newest_complete(stopped / "checkpoints")
    loop = facts(saved)["loop"]
    assert (loop["step"], loop["pending"]) == (3, ["core"])
    assert core_lines_by_step(stopped) == {} and list(bits_per_byte(stopped)) == [0, 3]
    train(place, "stopped", "--resume", "auto", config=config)
    for key, steps in {"val/bpb": [0, 3, STEPS], "centered_results": [3, STEPS]}.items():  # each once
        assert [line["step"] for line in metrics(stopped) if key in line] == steps
    assert losses(stopped) == losses(one)
    for step in (3, STEPS):
        assert answers(in_training(stopped, step)) == {
            label: answers(in_training(core_run, step))[label] for label in tasks
        }
        assert (
            "core_metric" not in core_lines_by_step(stopped)[step]
            and in_training(stopped, step)["core"]["core_metric"] is None
        )
    assert "core" in facts(checkpoint(stopped, STEPS))["loop"]["pending"], "the step is saved before CORE"
    again = train(place, "stopped", "--resume", "auto", config=config)
    assert [line["step"] for line in metrics(again) if "centered_results" in line] == [3, STEPS], "CORE ran again"


@reference.needs_reference
@pytest.mark.skipif(
    not BUNDLE.is_dir(), reason="../shared/eval_bundle is absent: it comes with the developers' checkout"
)
def test_nanochats_checkpoint_as_it_is_and_imported(tmp_path):
    expected = json.loads((reference.FOLDER / "core_expected.json").read_text())["tasks"]
    tasks = ["openbook_qa", "winograd"]
    imported = run_forked(["tools/convert_checkpoint.py", "from-nanochat", reference.FOLDER, tmp_path / "run"])
    assert imported.status == 0, imported.err
    parts = ("--core", BUNDLE, "--tasks", ",".join(tasks), "--max-per-task", "40", "--set", "precision.compute=float32")
    for number, saved in enumerate((reference.FOLDER, tmp_path / "run")):
        result = evaluated(None, 1, saved, tmp_path / f"{number}.json", *parts)
        assert answers(result) == {label: "".join(map(str, expected[label]["right"])) for label in tasks}
        assert result["core"]["core_metric"] is None and "20 of its 22 tasks are missing" in result["log"]


@pytest.fixture
def one_rank(monkeypatch):
    """Sets the launch variables of one rank, which the evaluation reads and writes back, for this test only."""
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "LOCAL_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)


def refused(saved, *overrides, **options) -> str:
    """Returns the message of an evaluation that is refused before the ranks meet."""
    with pytest.raises(UserError) as caught:
        evaluate(EvaluationRequest(saved, overrides, **options))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_bad_input(core_run, bundle, tmp_path, one_rank):
    (tmp_path / "file").write_text("")
    few = {"core": str(bundle), "max_per_task": 1}
    blocked = {"sample": True, "out": tmp_path / "file" / "a.json"}
    for message, expected in (
        (refused(tmp_path / "none", sample=True), f"{tmp_path / 'none'} is not a folder"),
        (refused(tmp_path, sample=True), f"{tmp_path} is not a complete checkpoint"),
        (refused(core_run, core=str(bundle), tasks=("copa", "essay")), "essay is not a task of"),
        (refused(core_run, **few), "--max-per-task is 1.*hellaswag_zeroshot.* 1 shots.*2 or more"),
        (refused(core_run, core=str(bundle), max_per_task=0), "--max-per-task is 0: give 1 or more, or -1"),
        (refused(core_run, sample=True, tasks=("copa",)), "--tasks and --max-per-task .*--core"),
        (refused(core_run, bpb=str(tmp_path / "none")), "the data folder"),
        (refused(core_run, "model.depth=3", sample=True), "--set .*model of .* in .*depth"),
        (refused(core_run, "model.dept=3", sample=True), "unknown key model.dept"),
        (refused(core_run, "parallel.tensor=2", sample=True), "parallel.tensor 2 x parallel.pipeline 1.* 1 rank"),
        (refused(core_run, sample=True, out=tmp_path), f"{tmp_path} is a folder"),
        (refused(core_run, **blocked), r"a.json cannot be written \(File exists\).*--out"),
        (refused(core_run, sample=True, tokenizer=_other_tokenizer(tmp_path)), "is not the checkpoint's tokenizer"),
    ):
        assert re.search(expected, message), message


def _other_tokenizer(folder):
    from megachat.data.tokenizer import Tokenizer, save_tokenizer

    ranks = {bytes([byte]): byte for byte in range(256)} | {b"th": 256}
    save_tokenizer(folder / "tokenizer", Tokenizer(ranks), {})
    return folder / "tokenizer"


def test_bad_bundles_are_refused_before_training(place, bundle, tmp_path):
    done = run_forked(command(place, "refused", config=core(tmp_path / "none")))
    (error,) = done.errors
    assert done.status == 2 and f"bundle {tmp_path / 'none'} does not exist" in error and "core.yaml" in error
    assert not (place.runs / "refused").exists()
    with pytest.raises(UserError, match="evaluate.core_max_per_task is 1.*hellaswag_zeroshot.* 1 shots"):
        describe_job(load_config(command(place, "dry", config=core(bundle, core_max_per_task=1))[2]), 1)
    config = load_config(command(place, "dry", config=core(bundle, core_tasks=["copa"]))[2])
    (line,) = (line for line in describe_job(config, 1).splitlines() if "CORE bundle" in line)
    assert re.search("CORE bundle: 1 task, 6 examples, digest .*21 of CORE's 22 tasks", line)


def test_questions_that_do_not_fit_are_refused_before_training_or_left_out(place, tmp_path, one_rank):
    long = write_bundle(tmp_path / "long")
    file = long / "eval_data" / "language_modeling" / "lambada_openai.jsonl"
    file.write_text(file.read_text() + json.dumps({"context": "a boat", "continuation": "b" * 700}) + "\n")
    config = core(long)
    config["evaluate"]["core_max_per_task"] = 100

    def check(unfit):
        config["evaluate"]["core_unfit"] = unfit
        loaded = load_config(command(place, "long", config=config)[2])
        return check_job_inputs(loaded.changed("run", name="long"), bootstrap_environment(), None, False)

    with pytest.raises(UserError, match="lambada_openai.* the model takes at most 640"):
        check("refuse")
    assert check("leave_out").core_left_out == {"lambada_openai": 3}  # it is also a shot of two others
    assert not (place.runs / "long").exists()
