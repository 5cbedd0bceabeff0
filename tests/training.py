"""A model under its engine without data files: rows are given by the test. What the tests with ranks compare."""

from datetime import timedelta
from pathlib import Path

import torch

from megachat.checkpoint.index import by_tensor, read_index
from megachat.checkpoint.storage import load_checkpoint
from megachat.config import Config
from megachat.convert.megachat import whole_piece
from megachat.parallel.build import start_collectives
from megachat.parallel.collectives import all_gather_objects
from megachat.parallel.mesh import build_mesh
from megachat.planning.plan import resolve_without_text
from megachat.programs.verify_layout import related_rows, shards_of_shares
from megachat.train.build import TrainingModel, build_training_model
from megachat.train.state import state_pieces
from megachat.train.step import update

SMALL = {
    "model": {
        "depth": 3,
        "aspect_ratio": 16,
        "head_size": 16,
        "kv_heads": 3,
        "sequence_len": 160,
        "window_pattern": "SL",
    },
    "batch": {"tokens": 160 * 12, "micro_rows": 1},
    "horizon": {"steps": 20},
    "optimizer": {"scale_to_batch": False, "warmup_steps": 2},
    "precision": {"compute": "float32"},
}
SMALL_VOCAB = 97
random_rows = related_rows


def small_config(**changes: dict) -> Config:
    """SMALL with sections overridden key by key."""
    merged = {section: dict(values) for section, values in SMALL.items()}
    for section, values in changes.items():
        merged.setdefault(section, {}).update(values)
    return Config.model_validate(merged)


def build(config: Config, vocab_size: int) -> TrainingModel:
    """On the ranks that torch.distributed already has."""
    start_collectives(torch.device("cpu"), "gloo", timedelta(seconds=600))
    mesh = build_mesh(torch.device("cpu"), tensor=config.parallel.tensor, pipeline=config.parallel.pipeline)
    plan = resolve_without_text(config, mesh.world.size, vocab_size)
    return build_training_model(config, plan, mesh, torch.ones(vocab_size, dtype=torch.int64))


def rows_of_rank(training: TrainingModel, rows: torch.Tensor) -> torch.Tensor:
    """This rank's rows of a step, dealt as the loader deals them."""
    return rows[training.mesh.data.rank :: training.mesh.data.size]


def take_step(training: TrainingModel, rows: torch.Tensor, **how) -> tuple[float, float, bool]:
    """(loss, joint norm, skipped) of one step over all ranks. how: further arguments of train.step.update."""
    loss, outcome = update(training, rows_of_rank(training, rows), **how)
    training.muon.wait_for_gather()
    return loss.item(), outcome.norm, outcome.skipped


def whole_state(training: TrainingModel) -> dict[str, torch.Tensor]:
    """Every state tensor by checkpoint name, assembled from all ranks, on every rank."""
    return assembled(state_pieces(training), training)


def assembled(pieces: dict, training: TrainingModel) -> dict[str, torch.Tensor]:
    """Whole tensors by name from all ranks' rectangles, on every rank; what several ranks hold must be equal to the
    bit.
    """
    mine = [
        (name, shape, [(o, s, view.clone()) for o, s, view in rectangles])
        for name, (shape, rectangles) in pieces.items()
    ]
    whole: dict[str, torch.Tensor] = {}
    for others in all_gather_objects(mine, training.mesh.world):
        for name, shape, rectangles in others:
            target = whole.setdefault(name, torch.full(shape, torch.nan))
            for offsets, sizes, view in rectangles:
                here = target[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))]
                assert torch.equal(here[~here.isnan()], view[~here.isnan()]), f"ranks keep different values of {name}"
                here.copy_(view)
    return whole


def gradient_pieces(training: TrainingModel) -> dict:
    """Copies of this rank's part of the step's mean gradients as named rectangles, for `inspect_gradients` of update.
    Over all ranks, each element exists once.
    """
    adamw = training.engine.adamw
    shards = training.muon.gradient_shards() + training.rows.gradient_shards()
    shards += shards_of_shares(training, adamw.gradient_shares())
    copies = adamw.names_of_copies()
    pieces = by_tensor((shard.name, shard) for shard in shards if shard.name not in copies)
    return {
        name: (whole, [(offsets, sizes, view.clone()) for offsets, sizes, view in rectangles])
        for name, (whole, rectangles) in pieces.items()
    }


def load_whole_state(training: TrainingModel, whole: dict[str, torch.Tensor], adamw_step: int) -> None:
    """Write whole tensors into the ranks' shards, as a checkpoint load does."""
    with torch.no_grad():
        for name, (_, rectangles) in state_pieces(training).items():
            for offsets, sizes, view in rectangles:
                view.copy_(whole[name][tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))])
    for counter in training.engine.adamw.step_counters():
        counter.fill_(adamw_step)
    training.engine.adamw.refresh_weights()
    training.muon.refresh_weights()


def load_model_weights(checkpoint: Path, names: list[str] | None = None) -> dict[str, torch.Tensor]:
    """Loads whole float32 weights by name on this process alone. names: None for all."""
    saved = {name: tuple(entry["shape"]) for name, entry in read_index(checkpoint).items()}
    names = names or [name.removeprefix("model/") for name in saved if name.startswith("model/")]
    weights = {name: torch.empty(saved[f"model/{name}"]) for name in names}
    load_checkpoint(checkpoint, {f"model/{name}": whole_piece(tensor) for name, tensor in weights.items()})
    return weights
