"""The Python API: equal to the programs and to the proof's reference, light to import, clear about bad arguments."""

import ast
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import megachat
from megachat.checkpoint.facts import read_facts, write_facts
from megachat.convert.conversion import export_checkpoint
from megachat.convert.formats import open_checkpoint
from megachat.convert.huggingface import transformers_logits
from megachat.convert.proof import megachat_logits
from megachat.convert.saved_model import open_saved_model
from megachat.model.gpt import logits
from megachat.planning.plan import Plan
from megachat.programs.convert import inspect_command
from megachat.train.weights import build_evaluation_model, evaluation_plan
from tests import reference
from tests.harness import run_ranks
from tests.runs.forked import ROOT, run_forked
from tests.unit.convert.checkpoints import HUGGINGFACE, STEP, VOCAB_SIZE, make_run, step_folder
from tests.unit.evals.bundle import write_bundle
from tools.generate import main as generate_main
from tools.prepare_data import main as prepare_data

TEXT = "abcdefgh zz, and the old river: 1234 \u00e9"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of random weights, saved by two ranks."""
    return make_run(tmp_path_factory.mktemp("api") / "run", parts=2)


@pytest.fixture(scope="module")
def model(run) -> megachat.Model:
    return megachat.load(run, device="cpu", dtype="float32")


def test_the_package_is_light():
    """Neither the import nor planning loads torch."""
    code = (
        "import sys, megachat\n"
        "assert megachat.__version__ and 'load' in dir(megachat)\n"
        "plan = megachat.resolve({'model': {'depth': 4}}, 2, vocab_size=4096)\n"
        "print(plan.dims.width, 'torch' in sys.modules, 'deepspeed' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "256 False False\n", done.stderr
    assert f'version="{megachat.__version__}"' in (ROOT / "setup.py").read_text()
    with pytest.raises(AttributeError, match="has no attribute 'laod'"):
        megachat.laod  # noqa: B018
    assert {name for name in megachat.__all__ if getattr(megachat, name)} == set(megachat._MODULES)


def test_a_model_is_loaded_without_deepspeed():
    """What modules import where they begin, starting from the API's."""
    waiting, seen = ["megachat.api.model"], set[str]()
    while waiting:
        name = waiting.pop()
        path = ROOT / (name.replace(".", "/") + ".py")
        if name in seen or not path.is_file():
            continue
        seen.add(name)
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Import):
                waiting += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                waiting += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            assert not any(each.split(".")[0] == "deepspeed" for each in waiting), f"{name} imports DeepSpeed"
    assert len(seen) > 40 and "megachat.parallel.engine" not in seen


def engine_logits(folder, ids: torch.Tensor) -> torch.Tensor:
    """The logits of launch/evaluate.py's engine, on one rank."""
    from datetime import timedelta

    from megachat.parallel.build import start_collectives
    from megachat.parallel.mesh import build_mesh

    class Logits(torch.nn.Module):
        def forward(self, output, targets):
            return logits(output, plan.dims)

    start_collectives(torch.device("cpu"), "gloo", timedelta(seconds=600))
    saved = open_saved_model(folder, ["precision.compute=float32"])
    plan = evaluation_plan(saved, 1)
    built = build_evaluation_model(saved, plan, build_mesh(torch.device("cpu")))
    return built.engine.evaluate([(ids[None], ids[None])], Logits())[0][0]


def test_logits_are_those_of_the_engine_and_of_the_proof(run, model):
    ids = model.tokenizer.encode(TEXT, bos=True).astype(np.int64)
    result = model.logits(TEXT)
    assert result.shape == (len(ids), VOCAB_SIZE) and result.dtype == torch.float32
    for same in (ids, ids.tolist(), torch.from_numpy(ids), model.tokenizer.encode(TEXT, bos=True)):
        assert torch.equal(model.logits(same), result)
    expected = megachat_logits(open_checkpoint(run))(torch.from_numpy(ids)[None])
    assert (result - expected).abs().max() < 1e-6
    (by_engine,) = run_ranks(engine_logits, 1, run, torch.from_numpy(ids))
    assert (result - by_engine).abs().max() < 1e-6
    rows = torch.from_numpy(np.stack((ids, ids[::-1])))
    assert torch.allclose(model.module(rows)[0], result, atol=1e-5) and not model.module(rows[0]).requires_grad
    long = [5] * 200  # beyond sequence_len, within the rotary tables
    assert model.logits(long).shape == (200, VOCAB_SIZE)
    half = megachat.load(run, device="cpu", dtype=torch.bfloat16).logits(TEXT)
    assert half.dtype == torch.float32 and 1e-4 < (half - result).abs().max() < 0.5


def test_a_model_knows_its_run(run, model):
    assert model.step == STEP and model.folder == step_folder(run)
    assert isinstance(model.plan, Plan) and model.plan.dims.depth == model.config.model.depth == 3
    assert model.plan.layout.data == 2 and model.tokenizer.vocab_size == VOCAB_SIZE
    assert "run" in repr(model) and "float32 on cpu" in repr(model)
    assert torch.equal(
        megachat.load(str(step_folder(run)), device="cpu", dtype="float32").logits("ab"), model.logits("ab")
    )


def test_every_format_is_loaded(run, model, tmp_path):
    expected = model.logits(TEXT)
    for command in ("safetensors", "nanochat"):
        export_checkpoint(command, run, tmp_path / command)
        other = megachat.load(tmp_path / command, device="cpu", dtype="float32")
        assert torch.equal(other.logits(TEXT), expected) and other.step == STEP
        assert other.config.model == model.config.model and other.plan.dims == model.plan.dims
    plain = make_run(tmp_path / "plain", model=HUGGINGFACE)
    export_checkpoint("hf", plain, tmp_path / "hf")
    other = megachat.load(tmp_path / "hf", device="cpu", dtype="float32")
    result = other.logits(TEXT)
    assert torch.allclose(result, megachat.load(plain, device="cpu", dtype="float32").logits(TEXT), atol=1e-6)
    theirs = transformers_logits(tmp_path / "hf", VOCAB_SIZE)
    ids = torch.from_numpy(other.tokenizer.encode(TEXT, bos=True).astype(np.int64))
    assert (theirs(ids[None]) - result).abs().max() < 5e-4 and other.config.model.lambdas == "neutral"
    (by_engine,) = run_ranks(engine_logits, 1, tmp_path / "hf", ids)
    assert (result - by_engine).abs().max() < 1e-6


def test_a_step_of_several(run, model, tmp_path):
    several = tmp_path / "several"
    shutil.copytree(run, several)
    other = several / "checkpoints" / "step_000009"
    shutil.copytree(step_folder(several), other)
    facts = read_facts(other)
    write_facts(other, facts | {"step": 9, "loop": facts["loop"] | {"step": 9}})
    assert megachat.load(several, device="cpu").step == 9
    assert megachat.load(several, device="cpu", step=STEP).folder == step_folder(several)
    for wrong in (
        lambda: megachat.load(several, step=8),
        lambda: inspect_command(several, 8, as_json=False, verbose=False),
    ):
        with pytest.raises(megachat.UserError, match="several has no step 8: it has 7,9$"):
            wrong()
    with pytest.raises(megachat.UserError, match="step_000009 has step 9, not 7: give that one, or none"):
        megachat.load(other, step=7)


@pytest.mark.parametrize(
    ("section", "values", "table"),
    [
        ("ngram", {"blocks": [0, 2], "rows": 50, "width": 12}, "model/ngram"),
        ("lookup", {"after_blocks": [1], "rows": 700, "tied": False}, "model/lookup"),
    ],
)
def test_models_with_tables(section, values, table, tmp_path):
    """With a cache the model chooses the tokens that it chooses without; the table matters."""

    def without(tensors: dict) -> None:
        for name in (name for name in tensors if name.startswith(table)):
            tensors[name].zero_()

    made = {
        name: make_run(tmp_path / name, **{section: values}, change=how)
        for name, how in {"tables": lambda tensors: None, "zeros": without}.items()
    }
    model, plain = (megachat.load(path, device="cpu", dtype="float32") for path in made.values())
    assert getattr(model.plan.dims, section) is not None
    assert (model.logits(TEXT) - plain.logits(TEXT)).abs().max() > 1e-3
    prompts = ["abcdefgh zz", "q"]
    for prompt, text in zip(prompts, model.generate(prompts, tokens=8, temperature=0), strict=True):
        ids = model.tokenizer.encode(prompt, bos=True).tolist()
        start = len(ids)
        while len(ids) < start + 8 and (token := int(model.logits(ids)[-1].argmax())) != model.tokenizer.bos:
            ids.append(token)
        assert text == model.tokenizer.decode(ids[start:]) and len(ids) > start
    ids = torch.from_numpy(model.tokenizer.encode(TEXT, bos=True).astype(np.int64))
    nats = torch.nn.functional.cross_entropy(model.logits(ids)[:-1].double(), ids[1:], reduction="sum")
    assert model.bits_per_byte(TEXT) == pytest.approx(nats.item() / np.log(2) / len(TEXT.encode()), rel=1e-6)
    bundle = write_bundle(tmp_path / "bundle")
    core = megachat.evaluate_core(model, bundle, tasks=["winograd"], max_per_task=2)
    assert core["tasks"]["winograd"]["examples"] == 2


@reference.needs_reference
def test_nanochats_checkpoint_has_its_logits():
    model = megachat.load(reference.FOLDER, device="cpu", dtype="float32")
    rows = reference.rows(reference.FIRST_STEP)
    expected = torch.from_numpy(np.load(reference.FOLDER / "logits_batch20_last8.npy"))
    result = torch.stack([model.logits(row[:-1])[-8:] for row in rows])
    assert (result.flatten() - expected.flatten()).abs().max() < 1e-5
    reader = open_checkpoint(reference.FOLDER)
    assert (model.logits(rows[0][:-1]) - megachat_logits(reader)(rows[:1, :-1])).abs().max() < 1e-6
    assert model.step == reference.FIRST_STEP and model.config.model.depth == 4


def test_text_is_that_of_the_program(run, model, capsys):
    prompts = ["abcdefgh", "zz", ""]
    settings = {"tokens": 12, "temperature": 1.1, "top_k": 50, "top_p": 0.9, "seed": 4}
    options = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    requested = [f"--prompt={prompt}" for prompt in prompts]
    generate_main(["--checkpoint", str(run), "--dtype", "float32", "--json", *options, *requested])
    expected = [json.loads(line)["text"] for line in capsys.readouterr().out.splitlines()]
    assert model.generate(prompts, **settings) == expected and len(set(expected)) == 3
    assert model.generate(prompts[0], **settings) == expected[0]
    parts = list(model.generate(prompts[0], **settings, stream=True))
    assert "".join(parts) == expected[0] and len(parts) > 3
    assert model.generate(prompts[0], **settings | {"seed": 5}) != expected[0]
    assert model.generate(prompts[0], **settings | {"top_p": 1e-9}) == model.generate(
        prompts[0], tokens=12, temperature=0
    )
    stop = expected[0][4:6]
    assert model.generate(prompts[0], **settings, stop=[stop]) == expected[0][: expected[0].index(stop)]
    long = "ab" * 200
    assert model.generate(long, tokens=3, slide=True) and capsys.readouterr() == ("", "")


def test_evaluations_are_those_of_the_program(run, model, tmp_path):
    bundle = write_bundle(tmp_path / "bundle")
    (tmp_path / "texts").mkdir()
    for number in range(60):
        (tmp_path / "texts" / f"{number:02d}.txt").write_text(
            f"the notes of {number} old towns, abab " * (1 + number % 9)
        )
    prepare_data(["--source", "text", "--input", f"notes={tmp_path / 'texts'}", "--out", f"{tmp_path}/data"])
    out = tmp_path / "out.json"
    line = ["launch/evaluate.py", "--checkpoint", run, "--out", out, "--core", bundle, "--bpb", tmp_path / "data"]
    more = ["evaluate.tokens=160000", "precision.compute=float32"]
    done = run_forked([*line, *(part for setting in more for part in ("--set", setting))])
    assert done.status == 0, done.err
    expected = json.loads(out.read_text())
    documents = pq.read_table(sorted((tmp_path / "data").glob("*.parquet"))[-1])["text"].to_pylist()
    assert len(documents) > 2
    assert model.bits_per_byte(documents) == pytest.approx(expected["bpb"]["sources"]["notes"]["bpb"], rel=1e-6)
    assert model.bits_per_byte([*documents, ""]) == model.bits_per_byte(documents) != model.bits_per_byte(documents[0])
    calls: list = []
    section = megachat.evaluate_core(model, bundle, on_progress=lambda *done: calls.append(done))
    differing = ("seconds", "padding_share", "megachat")  # the program's commit is that of tests/runs/stubs/git
    same = [{key: result[key] for key in result if key not in differing} for result in (section, expected["core"])]
    assert same[0] == same[1] and set(section) == set(expected["core"])
    assert calls[-1] == (18, 18)
    part = megachat.evaluate_core(model, bundle, tasks=["winograd"], max_per_task=2)
    assert part["tasks"]["winograd"]["examples"] == 2 and list(part["tasks"]) == ["winograd"]


def test_bits_per_byte_of_a_short_text_is_the_sum_of_its_tokens(model):
    text = "abcdefgh zz"
    ids = torch.from_numpy(model.tokenizer.encode(text, bos=True).astype(np.int64))
    nats = torch.nn.functional.cross_entropy(model.logits(ids)[:-1].double(), ids[1:], reduction="sum")
    assert model.bits_per_byte(text) == pytest.approx(nats.item() / np.log(2) / len(text), rel=1e-6)


@pytest.mark.parametrize(
    ("call", "error", "facts"),
    [
        (lambda m: m.logits(3.5), TypeError, "not float 3.5"),
        (lambda m: m.logits([0.5]), TypeError, r"not list \[0.5\]"),
        (lambda m: m.logits([[1, 2]]), TypeError, r"\[\[1, 2\]\]"),
        (lambda m: m.logits([]), ValueError, "has 0 tokens: give 1 to 1600"),
        (lambda m: m.logits([1] * 1601), ValueError, "has 1601 tokens: give 1 to 1600"),
        (lambda m: m.logits([1, 330]), ValueError, "have 330: give ids from 0 to 329"),
        (lambda m: m.logits([-1, 3]), ValueError, "have -1"),
        (lambda m: m.generate(3), TypeError, "prompt is int 3"),
        (lambda m: m.generate(["a", 1]), TypeError, r"prompt is list \['a', 1\]"),
        (lambda m: m.generate("a", tokens=0), ValueError, "tokens is 0"),
        (lambda m: m.generate("a", tokens=1.5), TypeError, "tokens is float 1.5"),
        (lambda m: m.generate("a", temperature=-1), ValueError, "temperature is -1"),
        (lambda m: m.generate("a", top_p=0), ValueError, "top-p is 0"),
        (lambda m: m.generate("a", top_k=-3), ValueError, "top-k is -3"),
        (lambda m: m.generate("a", seed=-1), ValueError, "seed is -1"),
        (lambda m: m.generate("a", stop=[""]), ValueError, "stop text is empty"),
        (lambda m: m.generate("z " * 200), ValueError, "has 401 tokens.* 160"),
        (lambda m: m.generate(["a", "b"], stream=True), TypeError, "not 2 prompts"),
        (lambda m: m.bits_per_byte(5), TypeError, "texts is int 5"),
        (lambda m: m.bits_per_byte(["", ""]), ValueError, r"texts is \['', ''\]"),
        (lambda m: megachat.evaluate_core(m, "nowhere"), megachat.UserError, "nowhere does not exist"),
        (lambda m: megachat.evaluate_core(m, unfit="drop"), ValueError, "unfit is 'drop'"),
        (lambda m: megachat.load("nowhere"), megachat.UserError, "nowhere is not a folder"),
        (lambda m: megachat.load(m.folder, dtype="int8"), ValueError, "dtype is 'int8'"),
        (lambda m: megachat.load(m.folder, device="tpu9"), ValueError, "device is 'tpu9'"),
        (lambda m: megachat.load(m.folder, device="cuda:77"), ValueError, "device is 'cuda:77', but torch has"),
        (lambda m: megachat.load(m.folder, tokenizer="nowhere"), megachat.UserError, "no tokenizer at nowhere"),
        (lambda m: megachat.resolve(5), TypeError, "config is int 5"),
        (lambda m: megachat.resolve({}, 0), ValueError, "world is 0"),
        (lambda m: megachat.resolve({}, 1, "model.depth=3"), TypeError, "overrides is 'model.depth=3'"),
        (lambda m: megachat.resolve({"model": {"dept": 3}}), megachat.UserError, "the config: .*dept"),
        (lambda m: megachat.pretrain({}), megachat.UserError, "no run.name"),
        (lambda m: megachat.read_metrics("nowhere"), megachat.UserError, "nowhere has no metrics.jsonl"),
    ],
)
def test_bad_arguments_are_one_sentence_with_the_value(model, call, error, facts):
    with pytest.raises(error, match=facts) as caught:
        call(model)
    assert "\n" not in str(caught.value)


def test_a_job_leaves_the_process_as_it_was(monkeypatch):
    """A job sets variables, and ignores signals after it was stopped; a notebook goes on."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)

    def state() -> tuple:
        return dict(os.environ), [signal.getsignal(number) for number in numbers]

    def run_job(config, notes, *, resume):
        for number in numbers:
            signal.signal(number, signal.SIG_IGN)
        os.environ.update(RANK="0", MASTER_PORT="4321", OMP_NUM_THREADS="77")
        os.environ.pop("HOME", None)
        assert (config.model.depth, notes, resume) == (5, [], "auto")
        if config.run.seed == 3:
            raise megachat.UserError("refused")

    monkeypatch.setattr("megachat.programs.pretrain.run_job", run_job)
    monkeypatch.setenv("HOME", "somewhere")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    before = state()
    config = {"run": {"name": "first", "folder": "somewhere"}}
    assert megachat.pretrain(config, ["model.depth=5"], resume="auto") == Path("somewhere/first")
    assert state() == before
    with pytest.raises(megachat.UserError, match="refused"):
        megachat.pretrain(config, ["model.depth=5", "run.seed=3"], resume="auto")
    assert state() == before


def test_plans_and_metrics_of_a_run(run, tmp_path):
    config = json.loads((run / "config.json").read_text())
    plans = [megachat.resolve(each, 2) for each in (config, run / "config.json", str(run / "config.json"))]
    assert plans[0] == plans[1] == plans[2] and plans[0].layout.data == 2 and plans[0].dims.vocab_size == VOCAB_SIZE
    assert plans[0] == megachat.resolve(megachat.load(run).config, 2)
    assert megachat.resolve(config, 2, ["model.depth=5"]).dims.depth == 5
    lines = b'{"step": 1, "train/loss": NaN}\n{"step": 2, "val/bpb": 1.5}\n'
    (tmp_path / "metrics.jsonl").write_bytes(lines + b'{"step": 3, "tr')
    metrics = megachat.read_metrics(tmp_path)
    assert [line["step"] for line in metrics] == [1, 2] and metrics[1]["val/bpb"] == 1.5
    (tmp_path / "metrics.jsonl").write_bytes(b"[1]\n" + lines)
    with pytest.raises(megachat.UserError, match="metrics.jsonl line 1 is damaged"):
        megachat.read_metrics(tmp_path)
