"""All that survives a restart: weights, both optimizers, loss scaler, loader, random numbers and the loop's own counters."""

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from megachat.checkpoint.facts import read_facts
from megachat.checkpoint.load import load_checkpoint
from megachat.checkpoint.resume import checkpoints_folder
from megachat.checkpoint.save import remove_old_checkpoints, save_checkpoint
from megachat.checkpoint.saver import Saver
from megachat.checkpoint.storage import RectanglesByName
from megachat.config import Config
from megachat.data.loader_state import combined_ledger, save_loader_state
from megachat.data.packing import saving_rank, streams_of_rank
from megachat.data.tokenizer import Tokenizer
from megachat.errors import UserError
from megachat.job.join import random_seed
from megachat.parallel.collectives import all_gather_objects
from megachat.parallel.engine import adamw_fragments, adamw_steps
from megachat.parallel.mesh import Axis
from megachat.parallel.rectangles import flat_rectangles
from megachat.place import place_of
from megachat.planning.dimensions import saved_dimensions
from megachat.planning.plan import Plan
from megachat.train.build import Run, Training

_SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


@dataclass
class LoopState:
    """The loop's counters. step: the next to run, from 0. training_s: seconds in steps after the tenth, as the speedrun counts them.

    owes_evaluation: the job was told to stop and saved before the evaluation that is due at this step. owes_core: before that of CORE was done.
    """

    step: int = 0
    training_s: float = 0.0
    skipped_steps: int = 0
    val_bpb: float | None = None
    min_val_bpb: float | None = None
    owes_evaluation: bool = False
    owes_core: bool = False


def state_pieces(run: Training, *, replicas: bool = True) -> dict:
    """Every tensor of the state as named rectangles of this rank; weights are the float32 masters.

    The ranks of the tensor axis all keep what it does not cut; without replicas, only the first of them offers it, so that over all ranks
    each element is there once.
    """
    pieces: dict[str, tuple] = {}
    for kind, name, shape, rectangles in run.muon.state_shards():
        pieces["model/" + name if kind == "master" else f"muon/{name}/{kind}"] = (tuple(shape), rectangles)
    for parameter, begin, _, views in adamw_fragments(run.engine.optimizer):
        where = place_of(parameter)
        if not replicas and where.cut == "whole" and run.mesh.tensor.rank > 0:
            continue
        for kind, view in views.items():
            name = f"model/{where.name}" if kind == "master" else f"adamw/{where.name}/{kind}"
            rectangles = flat_rectangles(tuple(parameter.shape), view, begin, where.offset or None)
            pieces.setdefault(name, (where.whole, []))[1].extend(rectangles)
    return pieces


def save_state(run: Run, state: LoopState, saver: Saver) -> None:
    """Begin to save checkpoint step_NNNNNN of the run as it is now; all ranks call it. Raises UserError when an earlier save failed."""
    since = time.perf_counter()
    scaler, folder = run.engine.optimizer.loss_scaler, checkpoints_folder(run.folder)
    facts = {
        "model": dataclasses.asdict(run.plan.dims),
        "tokenizer": {"fingerprint": run.tokenizer.fingerprint, "vocab_size": run.tokenizer.vocab_size},
        "loop": dataclasses.asdict(state),
        "adamw_steps": int(adamw_steps(run.engine.optimizer)[0].item()),
        "loss_scaler": {field: getattr(scaler, field) for field in _SCALER_FIELDS if hasattr(scaler, field)},
        "config": run.config.model_dump(mode="json", exclude_defaults=True),
        "layout": dataclasses.asdict(run.plan.layout),
    }
    loader_state, ledger, random_state = run.loader.state(), run.loader.ledger(), _random_state(run.mesh.device)
    data, streams, keep = run.mesh.data, run.config.data.streams, run.config.checkpoint

    def write_rank_files(temporary: Path) -> None:
        if run.mesh.tensor.rank == 0 and run.mesh.pipeline.rank == 0:
            mine = [
                s
                for s in streams_of_rank(data.rank, data.size, streams, run.plan.rows_per_step)
                if saving_rank(s, data.size, streams, run.plan.rows_per_step) == data.rank
            ]
            save_loader_state(temporary / "loader", loader_state, mine)
        (temporary / "random").mkdir(exist_ok=True)
        np.savez(temporary / "random" / f"rank_{run.mesh.world.rank:05d}.npz", **random_state)

    def write(pieces: RectanglesByName, axis: Axis) -> Path:
        ledgers = {stream: told for part in all_gather_objects(ledger, axis) for stream, told in part.items()}
        path = save_checkpoint(
            folder, state_step, pieces, facts | {"ledger": combined_ledger(ledgers)}, write_rank_files, axis
        )
        if axis.rank == 0:
            remove_old_checkpoints(folder, keep.keep_last, keep.keep_every, state_step)
        return path

    state_step = state.step
    saver.begin(state_pieces(run, replicas=False), write, since)


def load_state(run: Run, checkpoint: Path) -> LoopState:
    """Read the checkpoint into the run, whatever layout wrote it; all ranks call it. The loader was given its state when it was built."""
    facts = read_facts(checkpoint)
    zero = run.engine.optimizer
    load_checkpoint(checkpoint, state_pieces(run))
    for counter in adamw_steps(zero):
        counter.fill_(facts["adamw_steps"])
    zero.update_lp_params()
    run.muon.refresh_weights()
    scaler = facts["loss_scaler"]
    if (
        zero.dynamic_loss_scale and _SCALER_FIELDS[1] in scaler
    ):  # the scale 1 of a checkpoint in another dtype would make float16's gradients 0
        for field in _SCALER_FIELDS:
            setattr(zero.loss_scaler, field, scaler[field])
    own_random = checkpoint / "random" / f"rank_{run.mesh.world.rank:05d}.npz"
    if own_random.is_file():
        with np.load(own_random) as saved:
            _restore_random({key: saved[key] for key in saved.files}, run.mesh.device)
    else:  # more ranks than wrote it: a stream of its own
        torch.manual_seed(random_seed(run.config.run.seed, facts["step"], run.mesh.world.rank))
    return LoopState(**facts["loop"])


def check_checkpoint(checkpoint: Path, plan: Plan, tokenizer: Tokenizer, config: Config) -> dict:
    """The checkpoint's facts. Raises UserError unless it is of this model and tokenizer."""
    facts = read_facts(checkpoint)
    if facts["tokenizer"]["fingerprint"] != tokenizer.fingerprint:
        before = facts["tokenizer"]["vocab_size"]
        raise UserError(
            f"{checkpoint} was trained with another tokenizer ({before} tokens, fingerprint {facts['tokenizer']['fingerprint'][:12]}) than "
            f"{config.data.tokenizer} ({tokenizer.vocab_size} tokens, {tokenizer.fingerprint[:12]}): "
            "set data.tokenizer to the one it was trained with"
        )
    asked, saved = dataclasses.asdict(plan.dims), dataclasses.asdict(saved_dimensions(facts["model"]))
    other = [key for key in asked if asked[key] != saved[key]]
    if other:
        listed = ", ".join(f"{key} {saved[key]} (asked for {asked[key]})" for key in other)
        raise UserError(
            f"{checkpoint} is of another model: {listed}; use the config it was trained with, or another run.name"
        )
    return facts


def _random_state(device: torch.device) -> dict[str, np.ndarray]:
    states = {"cpu": torch.get_rng_state().numpy()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device).numpy()
    return states


def _restore_random(states: dict[str, np.ndarray], device: torch.device) -> None:
    torch.set_rng_state(torch.from_numpy(states["cpu"]))
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(torch.from_numpy(states["cuda"]), device)
