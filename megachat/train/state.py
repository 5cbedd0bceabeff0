"""The state that survives a restart: weights, optimizers, loss scaler, loader, random numbers and the loop's
counters.
"""

import dataclasses
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megachat.checkpoint.facts import read_facts
from megachat.checkpoint.index import by_tensor, state_name
from megachat.checkpoint.save import remove_old_checkpoints, save_checkpoint
from megachat.checkpoint.saver import Saver
from megachat.config import Config
from megachat.data.loader_state import combined_ledger, save_loader_state
from megachat.data.packing import saving_rank, streams_of_rank
from megachat.data.tokenizer import Tokenizer
from megachat.device import random_states, restore_random_states
from megachat.errors import UserError
from megachat.files import CHECKPOINTS, LOADER, RANDOM
from megachat.job.join import random_seed
from megachat.parallel.collectives import all_gather_objects
from megachat.parallel.mesh import Axis
from megachat.parallel.rectangles import RectanglesByName
from megachat.planning.dimensions import saved_dimensions
from megachat.planning.plan import Plan
from megachat.settings import NgramConfig
from megachat.train.build import Run, TrainingModel
from megachat.train.changes import saved_flops

LOSS_DECAY = 0.9  # of the moving average of the losses, as nanochat's
# left out of a checkpoint where they are 0 or empty, so that a version without them can read it
_SAVED_IF_SET = "rewinds", "rewound_to", "recent", "skips_in_a_row", "faults_in_a_row"


@dataclass
class LoopState:
    """The loop's counters, saved in every checkpoint.

    step: the next to run, from 0. training_s: seconds in steps after step 10, as the speedrun counts them.
    training_flops: of all steps so far, each with the batch that it had. smooth_loss: exponential moving average of
    the losses of smoothed_steps steps (nats), which starts at 0: `shown_loss` corrects that. pending: names of the
    tasks of this step (train/tasks.py) that were due and not done when the checkpoint was made; a resumed job runs them
    first. rewinds: how often the run went back to a checkpoint (reliability.on_nonfinite). rewound_to: the step of the
    last one. recent: the last losses and gradient norms, if spikes are reported. skips_in_a_row: the last steps whose
    updates were skipped, as reliability.nonfinite_limit counts them. faults_in_a_row: the last steps whose loss or
    gradient was not finite.
    """

    step: int = 0
    training_s: float = 0.0
    training_flops: int = 0
    skipped_steps: int = 0
    val_bpb: float | None = None
    min_val_bpb: float | None = None
    smooth_loss: float = 0.0
    smoothed_steps: int = 0
    pending: list[str] = field(default_factory=list)
    rewinds: int = 0
    rewound_to: int | None = None
    recent: dict[str, list[float]] = field(default_factory=dict)
    skips_in_a_row: int = 0
    faults_in_a_row: int = 0

    @classmethod
    def from_saved(cls, saved: dict) -> "LoopState":
        """Reads the counters of a checkpoint; earlier ones have two flags in place of `pending`."""
        values: dict[str, Any] = dict(saved)
        flags = {"validation": values.pop("owes_evaluation", False), "core": values.pop("owes_core", False)}
        values.setdefault("pending", [task for task, flag in flags.items() if flag])
        return cls(**values)

    def saved(self) -> dict[str, Any]:
        """Returns the counters for a checkpoint."""
        values = dataclasses.asdict(self)
        return {key: value for key, value in values.items() if value or key not in _SAVED_IF_SET}

    def add_loss(self, loss: float) -> None:
        """Adds the loss of a step to the moving average."""
        self.smooth_loss = LOSS_DECAY * self.smooth_loss + (1 - LOSS_DECAY) * loss
        self.smoothed_steps += 1

    @property
    def shown_loss(self) -> float:
        """The moving average without the bias of its start, after one step or more, as nanochat's base_train shows."""
        return self.smooth_loss / (1 - LOSS_DECAY**self.smoothed_steps) if self.smoothed_steps else math.nan


def state_pieces(run: TrainingModel, *, replicas: bool = True) -> dict:
    """Returns every tensor of the state as this rank's named rectangles; weights are the float32 masters.

    Ranks of the tensor axis each hold a copy of what the axis does not cut. With replicas=False only tensor rank 0
    lists it, so that over all ranks each element is listed once.
    """
    copies = set() if replicas else run.engine.adamw.names_of_copies()
    return by_tensor(
        (state_name(optimizer, shard.name, shard.kind), shard)
        for optimizer, state in run.optimizers.items()
        for shard in state.state_shards()
        if shard.name not in copies
    )


def checkpoint_facts(run: Run, state: LoopState) -> dict:
    """Returns what checkpoint.json has beside the documents and files."""
    adamw = run.engine.adamw
    return {
        "model": dataclasses.asdict(run.plan.dims),
        "tokenizer": {"fingerprint": run.tokenizer.fingerprint, "vocab_size": run.tokenizer.vocab_size},
        "loop": state.saved(),
        "adamw_steps": int(adamw.step_counters()[0].item()),
        "loss_scaler": adamw.loss_scaler_state(),
        "config": run.config.model_dump(mode="json", exclude_defaults=True),
        "layout": dataclasses.asdict(run.plan.layout),
    }


def save_random_state(folder: Path, run: Run, state: dict[str, torch.Tensor] | None = None) -> None:
    """Writes the random numbers' state of this rank, by default the current one, into the folder of a checkpoint."""
    random_file = _random_file(folder, run.mesh.world.rank)
    random_file.parent.mkdir(exist_ok=True)
    states: dict[str, Any] = state or random_states(run.mesh.device)
    np.savez(random_file, **{kind: each.numpy() for kind, each in states.items()})


@dataclass(frozen=True)
class SavedBeside:
    """What a save writes beside the tensors, as it was when the save began: training continues meanwhile."""

    run: Run
    step: int
    facts: dict
    loader: dict[str, Any]
    random: dict[str, torch.Tensor]
    by_stream: tuple[dict, dict[int, int]]  # of this rank: the ledger, and the texts that were skipped

    def write(self, pieces: RectanglesByName, axis: Axis) -> Path:
        """Writes the checkpoint and removes old ones; all ranks call it, in the thread of the save."""
        folder, keep = self.run.folder / CHECKPOINTS, self.run.config.checkpoint
        ranks = all_gather_objects(self.by_stream, axis)
        facts = self.facts | {"ledger": combined_ledger({k: v for ledger, _ in ranks for k, v in ledger.items()})}
        if skipped := sum({stream: count for _, counts in ranks for stream, count in counts.items()}.values()):
            facts["skipped_texts"] = skipped
            if axis.rank == 0:
                print(f"step {self.step:05d} | {skipped:,} texts that are not UTF-8 were skipped so far", flush=True)
        path = save_checkpoint(folder, self.step, pieces, facts, self._write_rank_files, axis)
        if axis.rank == 0:
            remove_old_checkpoints(folder, keep.keep_last, keep.keep_every, self.step)
        return path

    def _write_rank_files(self, folder: Path) -> None:
        mesh, streams, rows = self.run.mesh, self.run.config.data.streams, self.run.plan.rows_per_step
        if mesh.tensor.rank == 0 and mesh.pipeline.rank == 0:
            rank, ranks = mesh.data.rank, mesh.data.size
            candidates = streams_of_rank(rank, ranks, streams, rows)
            saved_here = [stream for stream in candidates if saving_rank(stream, ranks, streams, rows) == rank]
            save_loader_state(folder / LOADER, self.loader, saved_here)
        save_random_state(folder, self.run, self.random)


def save_state(run: Run, state: LoopState, saver: Saver) -> None:
    """Starts saving checkpoint step_NNNNNN of the run as it is now; all ranks call it. Raises UserError when an earlier
    save failed.
    """
    since = time.perf_counter()
    beside = SavedBeside(
        run,
        state.step,
        checkpoint_facts(run, state),
        loader=run.loader.state(),
        random=random_states(run.mesh.device),
        by_stream=(run.loader.ledger(), run.loader.skipped_texts()),
    )
    saver.begin(state_pieces(run, replicas=False), beside.write, since)


def load_state(run: Run, checkpoint: Path) -> LoopState:
    """Reads a checkpoint of any layout into the run; all ranks call it. The loader got its state when it was built."""
    from megachat.checkpoint.storage import load_checkpoint  # loads torch.distributed.checkpoint, 0.7 s

    facts, adamw = read_facts(checkpoint), run.engine.adamw
    load_checkpoint(checkpoint, state_pieces(run))
    for counter in adamw.step_counters():
        counter.fill_(facts["adamw_steps"])
    adamw.refresh_weights()
    run.muon.refresh_weights()
    adamw.load_loss_scaler_state(facts["loss_scaler"])
    random_file = _random_file(checkpoint, run.mesh.world.rank)
    if random_file.is_file():
        with np.load(random_file) as saved:
            states = {kind: torch.from_numpy(saved[kind]) for kind in saved.files}
        restore_random_states(states, run.mesh.device)
    else:  # the checkpoint was written by fewer ranks: this one starts a stream
        torch.manual_seed(random_seed(run.config.run.seed, facts["step"], run.mesh.world.rank))
    flops = {} if "training_flops" in facts["loop"] else {"training_flops": saved_flops(facts, run.plan)}
    return LoopState.from_saved(facts["loop"] | flops)


def check_checkpoint(checkpoint: Path, plan: Plan, tokenizer: Tokenizer, config: Config) -> dict:
    """Returns the checkpoint's facts. Raises UserError when it belongs to another model or tokenizer."""
    facts = read_facts(checkpoint)
    if "capsule" in facts:
        raise UserError(
            f"{checkpoint} is a capsule, which has no optimizer state: run it with `megachat replay`, or resume from a "
            "checkpoint of the run"
        )
    if facts["tokenizer"]["fingerprint"] != tokenizer.fingerprint:
        saved = facts["tokenizer"]
        raise UserError(
            f"{checkpoint} was trained with another tokenizer ({saved['vocab_size']} tokens, fingerprint "
            f"{saved['fingerprint'][:12]}) than {config.data.tokenizer} ({tokenizer.vocab_size} tokens, fingerprint "
            f"{tokenizer.fingerprint[:12]}): set data.tokenizer to the one it was trained with"
        )
    saved, configured = saved_dimensions(facts["model"]), plan.dims
    if configured.lookup and saved.lookup:  # a resumed run keeps the checkpoint's allocation
        lookup = dataclasses.replace(
            configured.lookup, rows_per_token=saved.lookup.rows_per_token, mean_rows=saved.lookup.mean_rows
        )
        configured = dataclasses.replace(configured, lookup=lookup)
    if listed := _size_differences(dataclasses.asdict(saved), dataclasses.asdict(configured)):
        raise UserError(
            f"{checkpoint} holds another model: {', '.join(listed)}; use the config it was trained with, or another "
            "run.name"
        )
    rule = facts.get("config", {}).get("ngram", {}).get("optimizer", NgramConfig().optimizer)
    if plan.dims.ngram and rule != config.ngram.optimizer:
        raise UserError(
            f"{checkpoint} has the optimizer state of ngram.optimizer={rule}, but {config.ngram.optimizer} is "
            f"configured: set ngram.optimizer={rule}"
        )
    return facts


def _size_differences(saved: dict, configured: dict, prefix: str = "") -> list[str]:
    """Returns a phrase for each size of two models that differs; of layers that only one of them has, just that."""
    phrases = []
    for key, value in configured.items():
        other = saved[key]
        if isinstance(value, dict) and isinstance(other, dict):
            phrases += _size_differences(other, value, f"{prefix}{key}.")
        elif value != other:
            words = ["yes" if isinstance(each, dict) else "no" if each is None else each for each in (other, value)]
            phrases.append(f"{prefix}{key} {words[0]} (configured: {words[1]})")
    return phrases


def _random_file(checkpoint: Path, rank: int) -> Path:
    return checkpoint / RANDOM / f"rank_{rank:05d}.npz"
