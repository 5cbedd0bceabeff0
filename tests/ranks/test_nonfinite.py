"""A loss or gradient that is not finite, on layouts of two and four ranks: the capsule, its replay, and what the run
does next.

The cause is real: one value embedding of the token "~", which one document has, is too large for float16.
"""

import io
import json
import logging
import re
from datetime import timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F

from megachat.checkpoint.facts import checkpoint_name
from megachat.data.tokenizer import Tokenizer, save_tokenizer
from megachat.errors import UserError
from megachat.kernels.linear import Linear
from megachat.model.gpt import Embed
from megachat.parallel.build import start_collectives
from megachat.parallel.collectives import all_gather_objects
from megachat.parallel.mesh import build_mesh
from megachat.place import place_of
from megachat.planning.plan import resolve_without_text
from megachat.programs import replay
from megachat.programs.replay import replay_capsule, report_lines
from megachat.train import tasks
from megachat.train.build import build_run
from megachat.train.capsule import read_capsule
from megachat.train.documents import resume_documents
from megachat.train.metrics import Metrics
from megachat.train.state import LoopState, check_checkpoint, load_state, state_pieces
from megachat.train.trainer import Trainer
from tests.harness import run_ranks
from tests.runs.forked import run_forked
from tests.runs.job import different, facts, losses, metrics, write_shard
from tests.training import small_config, whole_state

MODEL = {"depth": 2, "aspect_ratio": 16, "kv_heads": 2, "sequence_len": 64, "window_pattern": "L"}
STEPS, TILDE = 5, ord("~")
STEP = {"now": 0}  # that a trainer of this process takes
TOKENIZER = Tokenizer({bytes([byte]): byte for byte in range(256)})
TABLES = {
    "ngram": {"blocks": (0,), "rows": 60},
    "lookup": {"after_blocks": (0,), "rows": 400, "max_rows_per_token": 60},
}


def config_of(place: Path, **changes):
    return small_config(
        **{
            "model": MODEL,
            "batch": {"tokens": 64 * 8, "micro_rows": 2},
            "horizon": {"steps": STEPS},
            "precision": {"compute": "float16", "loss_scale": 64.0},
            "data": {"folder": str(place / "data"), "streams": 4, "tokenizer_threads": 1},
            "evaluate": {"every": 0, "tokens": 64 * 8, "prompts": ()},
        }
        | changes
    )


@torch.no_grad()
def plant(run, value: float = 1e5) -> None:
    """Makes a value embedding of TILDE too large for float16, in the masters."""
    for name, (_, rectangles) in state_pieces(run).items():
        if name == "model/value_embeds.1.weight":
            for (row, _), (rows, _), values in rectangles:
                if row <= TILDE < row + rows:
                    values[TILDE - row] = value
    run.engine.adamw.refresh_weights()


def train(
    place: Path, name: str, checkpoint: Path | None = None, *, damage=plant, stop_at=-1, states=None, every=2, **changes
) -> str | bool:
    """Trains a run as a job does, and returns the sentence with which it ended, or whether it stopped on request.

    stop_at: the step in which a stop is requested. every: steps between checkpoints. states: gets the whole state
    before each step, and at the end that and the loader's place on each rank; copies on several ranks are equal.
    """
    config, tokenizer = config_of(place, checkpoint={"every": every}, **changes), TOKENIZER
    start_collectives(torch.device("cpu"), "gloo", timedelta(seconds=600))
    mesh = build_mesh(torch.device("cpu"), tensor=config.parallel.tensor, pipeline=config.parallel.pipeline)
    plan, documents, folder = resolve_without_text(config, mesh.world.size, tokenizer.vocab_size), None, place / name
    folder.mkdir(exist_ok=True)
    if checkpoint:
        saved = check_checkpoint(checkpoint, plan, tokenizer, config)
        documents, _ = resume_documents(checkpoint, saved, config, plan, mesh, tokenizer)
    run = build_run(config, plan, mesh, tokenizer, folder, documents)
    state = load_state(run, checkpoint) if checkpoint else LoopState()
    if not checkpoint or damage is not plant:
        damage(run)
    values = {"first_step": state.step, "rewinds": state.rewinds, "steps": STEPS, "run_name": name, "settings": {}}
    lines = Metrics(folder, config.log, writes=run.is_writer, **values)

    def before_step(step: int) -> None:
        STEP["now"] = step
        if states is not None:
            states.setdefault(step, []).append(whole_state(trainer.run))

    trainer = Trainer(run, state, lines, lambda: trainer.state.step == stop_at, before_step)
    with run.loader:
        try:
            stopped = trainer.fit()
            before_step(trainer.state.step)
            places = all_gather_objects((trainer.run.loader.step, trainer.run.loader.left_out), mesh.world)
            assert places == [places[0]] * mesh.world.size
            return stopped
        except UserError as error:
            return str(error)
        finally:
            lines.close()


def train_and_rewind(place: Path, name: str, **changes) -> None:
    """Trains with a rewind, and resumes the run from its checkpoint after that."""
    changes |= {"reliability": {"on_nonfinite": "rewind"}} | TABLES
    states: dict = {}
    assert train(place, name, states=states, **changes) is False
    twice = {step: seen for step, seen in states.items() if len(seen) > 1}
    assert min(twice) == 2 and [equal(*seen) for seen in twice.values()] == [True, True]
    assert not equal(states[2][0], states[3][0]), "there was a step to undo"
    after = place / name / "checkpoints" / checkpoint_name(4)
    assert train(place, f"{name} resumed", after, **changes) is False


def equal(one: dict, other: dict) -> bool:
    assert one.keys() == other.keys() and any(name.startswith("rows/ngram") for name in one) and len(one) > 20
    return all(torch.equal(one[name], other[name]) for name in one)


def layouts_of_two(place: Path) -> list:
    """Trains on all layouts of two ranks in the same processes, with every policy."""
    train_and_rewind(place, "dp2")
    train_and_rewind(place, "tp2 rewind", parallel={"tensor": 2})
    train_and_rewind(place, "pp2 rewind", parallel={"pipeline": 2})
    skip, states = {"reliability": {"on_nonfinite": "skip"}} | TABLES, {}
    ended = [train(place, "tp2", parallel={"tensor": 2, "sequence": True}, states=states, **skip)]
    assert [equal(states[step][0], states[step + 1][0]) for step in range(STEPS)] == [
        step == 3 for step in range(STEPS)
    ]
    after = place / "tp2" / "checkpoints" / checkpoint_name(4)
    ended.append(train(place, "tp2 resumed", after, parallel={"tensor": 2, "sequence": True}, **skip))
    ended.append(train(place, "pp2", parallel={"pipeline": 2}, **TABLES))
    return ended


def layout_of_four(place: Path) -> list:
    """Rewinds; then a stop is requested in the step that rewinds, and the run is resumed, in the same folder."""
    changes = {"parallel": {"tensor": 2, "pipeline": 2}, "reliability": {"on_nonfinite": "rewind"}} | TABLES
    train_and_rewind(place, "tp2 pp2", parallel=changes["parallel"])
    ended = [train(place, "tp2 pp2 stopped", stop_at=3, **changes)]
    (checkpoint,) = (place / "tp2 pp2 stopped" / "checkpoints").glob("step_*")
    ended += [checkpoint.name, facts(checkpoint)["loop"]["rewinds"], left_out(checkpoint)]
    return [*ended, train(place, "tp2 pp2 stopped", checkpoint, **changes)]


def left_out(checkpoint: Path) -> list[int]:
    return json.loads((checkpoint / "loader" / "loader.json").read_text())["left_out"]


def overflow_in_backward(run, first: int = 4) -> None:
    """From step `first` on the gradient of a matrix is not finite, and no loss scale cures it."""
    matrix = next(each for each in run.layers.parameters() if each.ndim == 2 and each.shape[0] == each.shape[1])
    matrix.register_hook(lambda gradient: gradient * torch.inf if STEP["now"] >= first else gradient)


def one_rank(place: Path) -> list:
    tasks.SPIKE_LEAST = 2
    deepspeed_lines = io.StringIO()
    logging.getLogger("DeepSpeed").addHandler(logging.StreamHandler(deepspeed_lines))
    changes = {"precision": {"compute": "float32"}, "reliability": {"on_nonfinite": "stop", "spike_sigma": 0.1}}
    (place / "blocked").mkdir()
    (place / "blocked" / "capsules").touch()
    ended = [train(place, name, damage=overflow_in_backward, **changes) for name in ("one", "blocked")]
    ended.append(train(place, "one resumed", place / "one" / "checkpoints" / checkpoint_name(2), **changes))
    limit = changes | {"reliability": {"on_nonfinite": "rewind", "nonfinite_limit": 2}}
    ended.append(train(place, "limit", damage=overflow_in_backward, every=1, **limit))
    for checkpoint in (None, place / "first" / "checkpoints" / checkpoint_name(4)):
        ended.append(train(place, "first", checkpoint, damage=overflow_in_backward, every=4, **limit))
    skips = changes | {"reliability": {"on_nonfinite": "skip", "nonfinite_limit": 2}}
    for name, checkpoint in (("skips", None), ("skips resumed", place / "skips" / "checkpoints" / checkpoint_name(2))):
        ended.append(train(place, name, checkpoint, damage=lambda run: overflow_in_backward(run, 1), **skips))
    return [*ended, deepspeed_lines.getvalue()]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("nonfinite")
    (folder / "data").mkdir()
    for index in range(3):
        write_shard(folder / "data" / f"shard_{index:05d}.parquet", 60, seed=index)
    path = folder / "data" / "shard_00000.parquet"
    texts = pq.read_table(path)["text"].to_pylist()
    texts[17] = "~ " + texts[17]
    pq.write_table(pa.table({"text": texts}), path, row_group_size=20)
    return folder


@pytest.fixture(scope="module")
def ended(place) -> list:
    return run_ranks(layouts_of_two, 2, place)[0]


@pytest.mark.parametrize("layout", ["dp2", "tp2", "pp2"])
def test_a_capsule_of_any_layout_names_module_row_document_and_cure(layout, ended, place):
    (capsule,) = (place / layout / "capsules").iterdir()
    report = replay_capsule(capsule)
    text = "\n".join(report_lines(report))
    assert report["reproduced"] and report["float32_is_finite"] and report["dtype"] == "float16", text
    culprit, (row,) = report["culprit"], report["rows"]
    assert (culprit["during"], culprit["name"], culprit["passed_to"]) == ("forward", "blocks.1", "blocks.1.attn")
    assert culprit["inputs"][0]["not_finite"] == 0 < culprit["passed"][1]["not_finite"] < 1
    assert row["document"]["document"] == 17 and "shard_00000.parquet" in row["document"]["place"], text
    assert len(row["rows"]) == 1 and {rank["rank"] for rank in report["ranks"]} == {0, 1}
    assert any(rank["loss"] == "nan" for rank in report["ranks"]) and all(rank["gradient"] for rank in report["ranks"])
    assert re.search(r"^  passed on 1: .*\n  passed on 2: float16 .*largest possible 65504", text, re.MULTILINE), text
    other = replay_capsule(capsule, dtype="float32")
    assert not other["reproduced"] and "FINITE in float32 on cpu, but the run computed in float16:" in (
        text := "\n".join(report_lines(other))
    )
    assert "do not cause it" not in text


def bad_step(place: Path) -> int:
    (capsule,) = (place / "pp2" / "capsules").iterdir()
    return facts(capsule)["step"]


def test_stop_names_the_capsule(ended, place):
    step = bad_step(place)
    assert ended[2].startswith(f"step {step}: the loss is nan on rank ") and f"capsules/step_{step:06d}`" in ended[2]
    assert sorted(losses(place / "pp2")) == list(range(step)), "the metrics end with the last good step"


def test_skip_counts_and_continues(ended, place):
    step, lines = bad_step(place), {line["step"]: line for line in metrics(place / "tp2") if "train/loss" in line}
    assert ended[:2] == [False, False] and sorted(lines) == list(range(STEPS))
    assert [number for number, line in lines.items() if line["train/loss_raw"] is None] == [step]
    assert lines[step]["train/skipped"] and lines[STEPS - 1]["train/skipped_steps"] == 1
    last = Path("checkpoints", checkpoint_name(STEPS))
    assert different(place / "tp2 resumed" / last, place / "tp2" / last) == [], "no gradient of the step is left"


def check_rewind(place: Path, name: str, step: int) -> None:
    last = Path("checkpoints", checkpoint_name(STEPS))
    (rewound,) = (line for line in metrics(place / name) if "rewind/count" in line)
    assert rewound | {"time": 0} == {
        "step": step // 2 * 2,
        "time": 0,
        "rewind/from_step": step,
        "rewind/left_out": step,
        "rewind/count": 1,
    }
    saved = facts(place / name / last)
    header = json.loads((place / name / last / "loader" / "loader.json").read_text())
    assert left_out(place / name / last) == [step] and header["step"] == STEPS + 1 and saved["loop"]["rewinds"] == 1
    assert facts(place / "tp2" / last)["ledger"] != saved["ledger"]


@pytest.mark.parametrize("layout", ["dp2", "tp2 rewind", "pp2 rewind"])
def test_rewind_leaves_out_the_rows_and_resumes_to_the_bit(layout, ended, place):
    check_rewind(place, layout, bad_step(place))
    check_equal_runs(place, layout, f"{layout} resumed")


def check_equal_runs(place: Path, one: str, other: str) -> None:
    paths = [place / name / "checkpoints" / checkpoint_name(STEPS) for name in (one, other)]
    assert different(*paths) == [] and facts(paths[0])["ledger"] == facts(paths[1])["ledger"]


def test_a_mixture_rewinds_and_a_stop_in_that_step_loses_nothing(ended, place):
    stopped, saved, rewinds, rows, resumed = run_ranks(layout_of_four, 4, place)[0]
    assert (stopped, saved, rewinds, rows, resumed) == (True, "step_000002", 1, [bad_step(place)], False)
    check_equal_runs(place, "tp2 pp2", "tp2 pp2 resumed")
    for name in ("tp2 pp2", "tp2 pp2 stopped"):
        check_rewind(place, name, bad_step(place))
    check_equal_runs(place, "tp2 pp2", "tp2 pp2 stopped")


@pytest.fixture(scope="module")
def alone(place) -> list:
    return run_ranks(one_rank, 1, place)[0]


def test_a_run_goes_back_further_and_stops_when_it_went_back_too_often(alone, place):
    """The checkpoint of the step that fails has its weights, and that before it led to the same fault."""
    run, stopped = place / "limit", alone[3]
    rewinds = [line for line in metrics(run) if "rewind/count" in line]
    assert [(line["step"], line["rewind/from_step"], line["rewind/left_out"]) for line in rewinds] == [
        (3, 4, 4),
        (2, 4, 5),
    ]
    assert [line["rewind/count"] for line in rewinds] == [1, 2]
    assert stopped.startswith("step 4: the gradient of") and "the run went back 2 times already" in stopped
    assert f"continue with --resume {run / 'checkpoints' / checkpoint_name(3)} and lower rates" in stopped
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names[-4:] == ["step_000003.aside.2", "step_000004", "step_000004.aside", "step_000004.aside.2"]
    assert sorted(losses(run)) == [0, 1, 2, 3]


def test_each_branch_of_a_run_has_its_capsule(alone, place):
    folder = place / "limit" / "capsules"
    capsules = [folder / f"step_000004{suffix}" for suffix in ("", ".2", ".3")]
    assert sorted(folder.iterdir()) == capsules and f"megachat replay {capsules[2]}`" in alone[3]
    rows = [read_capsule(path)[0] for path in capsules]
    assert len({each.tobytes() for each in rows}) == 3, "the rows of the step before were left out"
    assert replay_capsule(capsules[2])["step"] == 4


def test_a_run_without_an_earlier_checkpoint_stops(alone, place):
    stopped, resumed = alone[4:6]
    assert stopped == resumed and "; there is no earlier checkpoint to go back to: the weights of this" in stopped
    assert "start again with lower rates" in stopped and "--resume" not in stopped
    (capsule,) = (place / "first" / "capsules").iterdir()  # that of the resumed run is the same
    assert f"megachat replay {capsule}`" in stopped


def test_skips_in_a_row_are_counted_across_a_resume(alone, place):
    whole, resumed, deepspeed_lines = alone[6:]
    assert whole == resumed and whole.startswith("step 3: the gradient was not finite for 3 steps in a row")
    assert "OVERFLOW" not in deepspeed_lines, "DeepSpeed reports the fault as well"
    assert (place / "skips" / "capsules").is_dir() and not (place / "skips resumed" / "capsules").exists()


def test_a_resumed_run_reports_the_same_spikes(alone, place):
    assert alone[2] is False
    lines = [
        [line | {"time": 0} for line in metrics(place / name) if "spike/documents" in line and 2 <= line["step"] < 4]
        for name in ("one", "one resumed")
    ]
    recent = [
        facts(place / name / "checkpoints" / checkpoint_name(4))["loop"]["recent"] for name in ("one", "one resumed")
    ]
    assert lines[0] == lines[1] != [] and recent[0] == recent[1] and len(recent[0]["loss"]) == 4


def test_a_gradient_stops_one_rank_and_spikes_leave_their_rows(alone, place):
    sentence, without = alone[:2]
    assert without == re.sub(r"run `.+", "look at the rows of this step", sentence).replace("/one/", "/blocked/")
    assert f"continue with --resume {place / 'one' / 'checkpoints' / checkpoint_name(2)} and lower rates" in sentence
    assert sentence.startswith("step 4: the gradient of transformer.h.0.attn.c_") and "megachat replay" in sentence
    report = replay_capsule(place / "one" / "capsules" / "step_000004")
    assert not report["reproduced"] and report["ranks"][0]["loss"] and report["culprit"] is None
    assert "saved weights and rows do not cause it" in "\n".join(report_lines(report))
    spikes = [line for line in metrics(place / "one") if "spike/documents" in line]
    folders = sorted((place / "one" / "spikes").iterdir())
    assert spikes and [line["step"] for line in spikes] == [int(path.name.split("_")[1]) for path in folders]
    documents = json.loads((folders[0] / "capsule.json").read_text())["documents"]
    assert len(documents) == 8 and spikes[0]["spike/documents"][0] == documents[0][0]["place"]


class Overflow(torch.autograd.Function):
    """Returns a copy; the gradient of what is marked is infinite."""

    @staticmethod
    def forward(ctx, tensor, marked):
        ctx.save_for_backward(marked)
        return tensor.clone()

    @staticmethod
    def backward(ctx, gradient):
        (marked,) = ctx.saved_tensors
        return gradient.masked_fill(marked, torch.inf), None


@pytest.mark.parametrize("parameter", [False, True])
@pytest.mark.parametrize(("block", "matrix"), [(0, "mlp.c_fc"), (1, "attn.c_q")])
def test_a_fault_in_the_backward_pass_names_its_module(block, matrix, parameter, ended, place, monkeypatch):
    """What one module makes infinite is a gradient of others, too: the stream's first values reach every block, and
    queries, keys and values have one input.
    """
    embed, linear, ids = Embed.forward, Linear.forward, []

    def keep_ids(module, given):
        ids[:] = [given]
        return embed(module, given)

    def overflow(module, x):
        weight, tilde = module.weight, ids[0] == TILDE
        if place_of(weight).name == f"transformer.h.{block}.{matrix}.weight":
            if not parameter:
                return linear(module, Overflow.apply(x, tilde.unsqueeze(-1)))
            return F.linear(x, Overflow.apply(weight, tilde.any()).to(x.dtype))
        return linear(module, x)

    monkeypatch.setattr(Embed, "forward", keep_ids)
    monkeypatch.setattr(Linear, "forward", overflow)
    (capsule,) = (place / "dp2" / "capsules").iterdir()
    report = replay_capsule(capsule, dtype="float32")
    text = "\n".join(report_lines(report))
    culprit, (row,) = report["culprit"], report["rows"]
    assert (culprit["during"], culprit["name"], culprit["kind"]) == ("backward", f"blocks.{block}.{matrix}", "Linear")
    assert culprit["outputs"][0]["not_finite"] == 0 and list(culprit["parameters"]) == ["weight"] * parameter, text
    assert (culprit["inputs"][0]["not_finite"] > 0) is not parameter
    assert 17 in [each["document"] for each in row["documents"][0]]
    assert (row["document"] or {}).get("document") == (None if parameter else 17), text


def test_a_gradient_that_overflows_in_float16_is_replayed(alone, place, monkeypatch):
    """The capsule of a float32 run, with a loss scale that float16's largest number does not reach."""
    folder = place / "one" / "capsules" / "step_000004"
    rows, values = read_capsule(folder)
    monkeypatch.setattr(replay, "read_capsule", lambda _: (rows, values | {"loss_scale": 2.0**40}))
    report = replay_capsule(folder, dtype="float16")
    culprit = report["culprit"]
    assert (culprit["during"], culprit["name"], report["float32_is_finite"]) == ("backward", "loss", True), culprit
    text = "\n".join(report_lines(report))
    assert "\nall 8 rows of the step are not finite: the weights are the likely cause, not a document\n" in text
    assert "these rows are finite in float32" in text and ".parquet" not in text and "search" not in text
    monkeypatch.setattr(replay, "MOST_ROWS", 4)
    text = "\n".join(report_lines(replay_capsule(folder, dtype="float16")))
    assert "\nall 4 rows that were searched are not finite: " in text


def test_a_path_that_is_no_capsule_is_refused(alone, place):
    capsule = place / "one" / "capsules" / "step_000004"
    for folder in (place / "one", place / "one" / "capsules"):
        with pytest.raises(UserError, match=re.escape(f"give a folder of RUN/capsules/: {capsule}")):
            replay_capsule(folder)
    with pytest.raises(UserError, match="step_000005 is no capsule: there is no such folder"):
        replay_capsule(capsule.with_name("step_000005"))
    if not torch.cuda.is_available():
        with pytest.raises(
            UserError, match="--device cuda: torch cannot use it on this machine; give cpu, or leave it out"
        ):
            replay_capsule(capsule, device="cuda")


def test_a_run_that_went_back_is_evaluated_and_its_capsule_is_not_among_its_results(ended, place):
    (capsule,), tokenizer, out = (place / "dp2" / "capsules").iterdir(), place / "tokenizer", place / "out.json"
    save_tokenizer(tokenizer, TOKENIZER, {"source": "tests"})
    program = ["launch/evaluate.py", "--checkpoint", capsule, "--tokenizer", tokenizer, "--bpb"]
    refused = run_forked(program)
    assert refused.status == 2 and f"{capsule} is a capsule and no checkpoint of its run: give --out" in refused.err
    done = run_forked([*program, "--out", out], 2)
    assert done.status == 0, done.err
    result = json.loads(out.read_text())
    assert (result["run"], result["step"]) == ("dp2", bad_step(place)) and result["bpb"]["bpb"] > 0
    assert [each.name for each in capsule.parent.iterdir()] == [capsule.name]
    assert not (place / "dp2" / "evaluations").exists()
    program[2] = place / "dp2"
    done = run_forked(program)
    assert done.status == 0, done.err
    assert [each.name for each in (place / "dp2" / "evaluations").iterdir()] == [f"step_{STEPS:06d}.json"]
