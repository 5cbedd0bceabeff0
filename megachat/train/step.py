"""One optimizer step: schedules in, batch through the engine, and a decision that all ranks share."""

import math
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megachat.device import synchronize
from megachat.errors import UserError
from megachat.optim.groups import GROUPS
from megachat.parallel.collectives import all_gather_objects
from megachat.parallel.progress import profile_range
from megachat.schedule import learning_rate_multiplier, muon_momentum, weight_decay_multiplier
from megachat.train.build import Run, Training

_RATE_OF = {group.name: group.rate for group in GROUPS}


@dataclass(frozen=True)
class StepResult:
    """loss: mean over tokens and ranks, nats. norm: joint gradient norm before clipping, inf when not finite. seconds: wall time.

    wished: what any rank wished for, in the order of `train_step`'s wishes.
    """

    loss: float
    norm: float
    skipped: bool
    rate_multiplier: float
    seconds: float
    wished: tuple[bool, ...] = ()


def set_schedules(run: Training, step: int) -> float:
    """Give both optimizers the step's rates, decay and momentum; returns the rate multiplier."""
    plan, asked = run.plan, run.config.optimizer
    multiplier = learning_rate_multiplier(
        step,
        plan.steps,
        warmup_steps=asked.warmup_steps,
        warmdown_ratio=asked.warmdown_ratio,
        final_fraction=asked.final_lr_fraction,
    )
    for group in run.engine.optimizer.param_groups:
        group["lr"] = plan.rates[_RATE_OF[group["name"]]] * multiplier
    run.muon.set_hyper(
        lr=plan.rates["matrix"] * multiplier,
        weight_decay=plan.weight_decay * weight_decay_multiplier(step, plan.steps),
        momentum=muon_momentum(step, plan.steps, warmdown_ratio=asked.warmdown_ratio),
    )
    return multiplier


def micro_batches(rows: torch.Tensor, micro_rows: int):
    """Yield (ids, targets) [micro_rows, tokens] of a rank's rows [count, tokens + 1], in order."""
    for chunk in rows.split(micro_rows):
        yield chunk[:, :-1].contiguous(), chunk[:, 1:].contiguous()


def train_step(run: Run, step: int, wishes: Sequence[bool] = ()) -> StepResult:
    """Run step `step`. Raises UserError, on all ranks, when the loss is not finite; nothing was changed then.

    wishes: of this rank, as many on each; all ranks learn of them together, in the collective of the gradient norm.
    """
    progress = run.mesh.world.progress
    progress.note(f"rows of step {step}")
    with profile_range("data"):
        rows = next(run.loader)
    synchronize(run.mesh.device)
    begin = time.perf_counter()
    multiplier = set_schedules(run, step)
    run.engine.optimizer.wishes = torch.tensor(wishes, dtype=torch.float32, device=run.mesh.device)
    loss = run.engine.train_batch(micro_batches(rows, run.plan.micro_rows))
    progress.note(
        f"loss of step {step}", waits=True
    )  # a GPU still works off what it was given, other ranks' parts included
    loss = loss.item()
    if not math.isfinite(loss):
        _stop_for_loss(run, step, loss)
    norm = run.engine.joint_norm.item()
    synchronize(run.mesh.device)
    progress.note(f"after step {step}")
    wished = tuple(count > 0 for count in run.engine.optimizer.wishes.tolist())
    return StepResult(loss, norm, bool(run.engine.optimizer.overflow), multiplier, time.perf_counter() - begin, wished)


def _stop_for_loss(run: Run, step: int, loss: float) -> None:
    own = run.engine.own_loss
    bad = None if own is None or math.isfinite(own.item()) else f"rank {run.mesh.world.rank} ({socket.gethostname()})"
    named = [name for name in all_gather_objects(bad, run.mesh.world) if name]
    raise UserError(
        f"step {step}: the loss is {loss} on {', '.join(named) or 'no single rank'}; training stopped and this step changed no weight, "
        f"checkpoints are untouched: continue with --resume auto and lower rates, or look at the rows of this step"
    )
