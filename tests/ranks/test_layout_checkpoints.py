"""A checkpoint of any layout resumes on any other: the same state to the bit, the losses of an uninterrupted run."""

import math
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from megachat.checkpoint.saver import Saver
from megachat.data.tokenizer import Tokenizer
from megachat.parallel.build import build_loss_scaler, start_collectives
from megachat.parallel.collectives import all_gather_objects
from megachat.parallel.mesh import build_mesh
from megachat.planning.plan import resolve_without_text
from megachat.programs.verify_layout import warm_up
from megachat.train.build import build_run
from megachat.train.documents import resume_documents
from megachat.train.state import LoopState, check_checkpoint, load_state, save_state, state_pieces
from megachat.train.step import train_step
from tests.harness import run_ranks
from tests.runs.job import write_shard
from tests.training import SMALL_VOCAB, build, small_config, whole_state

MODEL = {"aspect_ratio": 32, "head_size": 16, "kv_heads": 2, "norm_scales": ("mlp", "key")}
LAYOUTS = {
    "one": (1, {}),
    "dp4": (4, {}),
    "tp2 pp2": (4, {"tensor": 2, "pipeline": 2}),
    "dp2 pp3": (6, {"pipeline": 3}),
    "dp2 tp2 sequence": (4, {"tensor": 2, "sequence": True}),
}
LOOKUP = {"after_blocks": (1,), "rows": 900, "max_rows_per_token": 200}
SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def config_of(layout: str, data: Path | None = None):
    ngram = {"blocks": (0, 2), "rows": 50, "storage": "host" if layout in ("one", "tp2 pp2") else "device"}
    documents = {"folder": str(data), "streams": 5, "tokenizer_threads": 1}
    batch = {"micro_rows": 3}  # 4 micro-batches on one data rank, 1 on each of 4
    return small_config(
        model=MODEL,
        parallel=LAYOUTS[layout][1],
        batch=batch,
        ngram=ngram,
        lookup=LOOKUP,
        data=documents,
        optimizer={"ramp": (0.5, 2.0)},
    )


def job(config, folder: Path, checkpoint: Path | None = None):
    """(the run as a job builds it, from a checkpoint where one is given; its loop's counters).

    With a loss scaler that doubles every other step: in float32 a power of two changes no loss.
    """
    tokenizer = Tokenizer({bytes([byte]): byte for byte in range(256)})
    start_collectives(torch.device("cpu"), "gloo", timedelta(seconds=600))
    mesh = build_mesh(torch.device("cpu"), tensor=config.parallel.tensor, pipeline=config.parallel.pipeline)
    plan, documents = resolve_without_text(config, mesh.world.size, tokenizer.vocab_size), None
    if checkpoint:
        documents, remarks = resume_documents(
            checkpoint, check_checkpoint(checkpoint, plan, tokenizer, config), config, plan, mesh, tokenizer
        )
        assert remarks == []
    run = build_run(config, plan, mesh, tokenizer, folder, documents)
    run.engine.adamw.loss_scaler = build_loss_scaler(2.0**4 if checkpoint else 2.0**10, 2)
    return run, load_state(run, checkpoint) if checkpoint else LoopState()


def steps(run, first: int, last: int) -> list[float]:
    return [train_step(run, step).loss for step in range(first, last)]


def counters(run) -> dict:
    """Of the optimizers, the loss scaler and the documents."""
    ledgers = {
        stream: ledger
        for part in all_gather_objects(run.loader.ledger(), run.mesh.world)
        for stream, ledger in part.items()
    }
    scaler = {name: getattr(run.engine.adamw.loss_scaler, name) for name in SCALER}
    return {
        "adamw": {counter.item() for counter in run.engine.adamw.step_counters()},
        "scaler": scaler,
        "ledgers": ledgers,
    }


def save_and_continue(config, folder):
    """Train two steps, save, and train three more.

    Returns (checkpoint, (its state, its counters), random numbers after it, losses of the three steps, their counters).
    """
    run, state = job(config, folder)
    with run.loader:
        warm_up(run)
        steps(run, 0, 2)
        torch.manual_seed(100 + run.mesh.world.rank)
        torch.rand(7)
        saver = Saver(run.mesh.saving)
        save_state(run, LoopState(step=2, training_s=1.5, skipped_steps=1, val_bpb=2.0, min_val_bpb=1.0), saver)
        saver.wait()
        (saved,) = saver.finished()
        before = whole_state(run), counters(run)
        return saved.path, before, torch.rand(3), steps(run, 2, 5), counters(run)


def load_and_continue(config, path, folder):
    run, state = job(config, folder, path)
    with run.loader:
        assert state == LoopState(step=2, training_s=1.5, skipped_steps=1, val_bpb=2.0, min_val_bpb=1.0)
        before = whole_state(run), counters(run)
        return before, torch.rand(3), steps(run, 2, 5), counters(run)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for index, documents in enumerate((60, 60, 30)):
        write_shard(folder / f"shard_{index:05d}.parquet", documents, seed=index)
    return folder


@pytest.mark.parametrize("saved_on", ["tp2 pp2", "one", "dp2 pp3"])
def test_any_layout_resumes_from_any_other(saved_on, data, tmp_path):
    answers = run_ranks(save_and_continue, LAYOUTS[saved_on][0], config_of(saved_on, data), tmp_path)
    path, (state, counts), _, losses, end = answers[0]
    assert (
        len(state) > 60
        and losses[2] < losses[0]
        and counts["scaler"]["cur_scale"] == 2.0**10
        and end["scaler"]["cur_scale"] == 2.0**12
    )
    assert (
        counts["adamw"] == {2}
        and end["adamw"] == {5}
        and len(end["ledgers"]) == 5
        and end["ledgers"] != counts["ledgers"]
    )
    for layout, (world, _) in LAYOUTS.items():
        answers_here = run_ranks(load_and_continue, world, config_of(layout, data), path, tmp_path)
        for (loaded, loaded_counts), _, others, others_end in answers_here:
            assert loaded.keys() == state.keys()
            assert [name for name in state if not loaded[name].equal(state[name])] == [], (
                f"{saved_on} loaded on {layout}"
            )
            assert (loaded_counts, others_end) == (counts, end), f"{saved_on} loaded on {layout}"
            # The first loss comes from equal weights. After it, AdamW's first moment decides the sign of elements whose
            # gradient is below its rounding, and other rows would change a loss by more than a thousandth.
            assert others[0] == pytest.approx(losses[0], rel=1e-6), f"{saved_on} continued on {layout}"
            assert others == pytest.approx(losses, rel=2e-5), f"{saved_on} continued on {layout}"
        numbers = [tuple(answer[1].tolist()) for answer in answers_here]
        wanted = [tuple(answer[2].tolist()) for answer in answers]
        assert numbers[: len(wanted)] == wanted[:world] and len(set(numbers)) == world, (
            "each rank's random numbers continue, new ranks have other numbers"
        )


def offered(config):
    training = build(config, SMALL_VOCAB)
    return {
        name: (shape, sum(view.numel() for _, _, view in rectangles))
        for name, (shape, rectangles) in state_pieces(training, replicas=False).items()
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_ranks_offer_each_element_once(layout):
    counts: dict[str, int] = {}
    for each in run_ranks(offered, LAYOUTS[layout][0], config_of(layout)):
        for name, (shape, count) in each.items():
            counts[name] = counts.get(name, 0) + count - math.prod(shape) * (name not in counts)
    assert len(counts) > 60 and set(counts.values()) == {0}
