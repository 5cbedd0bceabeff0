"""A loss or gradient that is not finite, on layouts of two ranks: the capsule, its replay, and what the run does next.

The cause is real: one value embedding of the token "~", which one document has, is too large for float16.
"""

import json
import re
from datetime import timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from megachat.checkpoint.facts import checkpoint_name
from megachat.data.tokenizer import Tokenizer
from megachat.errors import UserError
from megachat.parallel.engine import start_collectives
from megachat.parallel.mesh import build_mesh
from megachat.planning.plan import resolve_without_text
from megachat.programs.replay import replay_capsule, report_lines
from megachat.train import nonfinite
from megachat.train.build import build_run
from megachat.train.documents import resume_documents
from megachat.train.metrics import Metrics
from megachat.train.state import LoopState, check_checkpoint, load_state, state_pieces
from megachat.train.trainer import Trainer
from tests.harness import run_ranks
from tests.runs.job import different, facts, losses, metrics, write_shard
from tests.training import small_config

MODEL = {"depth": 2, "aspect_ratio": 16, "kv_heads": 2, "sequence_len": 64, "window_pattern": "L"}
STEPS, TILDE = 5, ord("~")


def config_of(place: Path, **changes):
    return small_config(
        **{
            "model": MODEL,
            "batch": {"tokens": 64 * 8, "micro_rows": 2},
            "horizon": {"steps": STEPS},
            "precision": {"compute": "float16", "loss_scale": 64.0},
            "data": {"folder": str(place / "data"), "streams": 4, "tokenizer_threads": 1},
            "evaluate": {"every": 0, "tokens": 64 * 8, "prompts": ()},
            "checkpoint": {"every": 2},
        }
        | changes
    )


@torch.no_grad()
def plant(run) -> None:
    """Makes a value embedding of TILDE too large for float16, in the masters."""
    for name, (_, rectangles) in state_pieces(run).items():
        if name == "model/value_embeds.1.weight":
            for (row, _), (rows, _), values in rectangles:
                if row <= TILDE < row + rows:
                    values[TILDE - row] = 1e5
    run.engine.adamw.refresh_weights()


def train(place: Path, name: str, checkpoint: Path | None = None, *, damage=plant, **changes) -> str | None:
    """Trains a run as a job does, and returns the sentence with which it ended, None at the last step."""
    config, tokenizer = config_of(place, **changes), Tokenizer({bytes([byte]): byte for byte in range(256)})
    start_collectives(torch.device("cpu"), "gloo", timedelta(seconds=600))
    mesh = build_mesh(torch.device("cpu"), tensor=config.parallel.tensor, pipeline=config.parallel.pipeline)
    plan, documents, folder = resolve_without_text(config, mesh.world.size, tokenizer.vocab_size), None, place / name
    folder.mkdir(exist_ok=True)
    if checkpoint:
        saved = check_checkpoint(checkpoint, plan, tokenizer, config)
        documents, _ = resume_documents(checkpoint, saved, config, plan, mesh, tokenizer)
    run = build_run(config, plan, mesh, tokenizer, folder, documents)
    state = load_state(run, checkpoint) if checkpoint else LoopState()
    if not checkpoint:
        damage(run)
    values = {"first_step": state.step, "steps": STEPS, "run_name": name, "settings": {}}
    lines = Metrics(folder, config.log, writes=run.is_writer, **values)
    with run.loader:
        try:
            Trainer(run, state, lines, lambda: False, lambda step: None).fit()
        except UserError as error:
            return str(error)
        finally:
            lines.close()
    return None


def layouts_of_two(place: Path) -> list:
    """Trains on all layouts of two ranks in the same processes; one policy each."""
    rewind, skip = ({"reliability": {"on_nonfinite": policy}} for policy in ("rewind", "skip"))
    ended = [train(place, "dp2", **rewind)]
    after = place / "dp2" / "checkpoints" / checkpoint_name(4)
    ended.append(train(place, "resumed", after, **rewind))
    ended.append(train(place, "tp2", parallel={"tensor": 2, "sequence": True}, **skip))
    ended.append(train(place, "pp2", parallel={"pipeline": 2}))
    return ended


def overflow_in_backward(run) -> None:
    """At step 4 the gradient of a matrix is not finite, and no loss scale cures it."""
    matrix = next(each for each in run.layers.parameters() if each.ndim == 2 and each.shape[0] == each.shape[1])
    matrix.register_hook(lambda gradient: gradient * torch.inf if run.loader.step > 4 else gradient)


def one_rank(place: Path) -> list:
    nonfinite.LEAST = 2
    changes = {"precision": {"compute": "float32"}, "reliability": {"on_nonfinite": "stop", "spike_sigma": 0.1}}
    (place / "blocked").mkdir()
    (place / "blocked" / "capsules").touch()
    return [train(place, name, damage=overflow_in_backward, **changes) for name in ("one", "blocked")]


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
    assert not replay_capsule(capsule, dtype="float32")["reproduced"]


def bad_step(place: Path) -> int:
    (capsule,) = (place / "pp2" / "capsules").iterdir()
    return facts(capsule)["step"]


def test_stop_names_the_capsule(ended, place):
    step = bad_step(place)
    assert ended[3].startswith(f"step {step}: the loss is nan on rank ") and f"capsules/step_{step:06d}`" in ended[3]
    assert sorted(losses(place / "pp2")) == list(range(step)), "the metrics end with the last good step"


def test_skip_counts_and_continues(ended, place):
    step, lines = bad_step(place), {line["step"]: line for line in metrics(place / "tp2") if "train/loss" in line}
    assert ended[2] is None and sorted(lines) == list(range(STEPS))
    assert [number for number, line in lines.items() if line["train/loss_raw"] is None] == [step]
    assert lines[step]["train/skipped"] and lines[STEPS - 1]["train/skipped_steps"] == 1


def test_rewind_leaves_out_the_rows_and_resumes_to_the_bit(ended, place):
    step, last = bad_step(place), Path("checkpoints", checkpoint_name(STEPS))
    assert ended[:2] == [None, None] and 2 <= step < 4
    (rewound,) = (line for line in metrics(place / "dp2") if "rewind/count" in line)
    assert rewound | {"time": 0} == {
        "step": step // 2 * 2,
        "time": 0,
        "rewind/from_step": step,
        "rewind/left_out": step,
        "rewind/count": 1,
    }
    saved = facts(place / "dp2" / last)
    header = json.loads((place / "dp2" / last / "loader" / "loader.json").read_text())
    assert header["left_out"] == [step] and header["step"] == STEPS + 1 and saved["loop"]["rewinds"] == 1
    assert different(place / "resumed" / last, place / "dp2" / last) == []
    assert facts(place / "resumed" / last)["ledger"] == saved["ledger"] != facts(place / "tp2" / last)["ledger"]


def test_a_gradient_stops_one_rank_and_spikes_leave_their_rows(place):
    ((sentence, without),) = run_ranks(one_rank, 1, place)
    assert without == sentence.replace(re.search(r"run `.+", sentence)[0], "look at the rows of this step")
    assert sentence.startswith("step 4: the gradient of transformer.h.0.attn.c_") and "megachat replay" in sentence
    report = replay_capsule(place / "one" / "capsules" / "step_000004")
    assert not report["reproduced"] and report["ranks"][0]["loss"] and report["culprit"] is None
    spikes = [line for line in metrics(place / "one") if "spike/documents" in line]
    folders = sorted((place / "one" / "spikes").iterdir())
    assert spikes and [line["step"] for line in spikes] == [int(path.name.split("_")[1]) for path in folders]
    documents = json.loads((folders[0] / "capsule.json").read_text())["documents"]
    assert len(documents) == 8 and spikes[0]["spike/documents"][0] == documents[0][0]["place"]
