"""One training step: schedules, rows, forward and backward, and the optimizer step (optim/joint.py)."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from megachat.device import synchronize
from megachat.optim.groups import RATE_OF_GROUP
from megachat.optim.joint import NO_REQUESTS, Optimizers, Requests, StepOutcome, optimizer_step
from megachat.optim.qk_clip import clip_scales
from megachat.parallel.progress import profile_range
from megachat.schedule import scheduled_values
from megachat.train.build import Run, TrainingModel
from megachat.train.fault_reports import GradientReport, gradient_report
from megachat.train.micro_batch_replay import replay_micro_batch
from megachat.train.replicas import compare_replicas


@dataclass(frozen=True)
class StepResult:
    """The result of one training step.

    loss: mean over tokens and ranks, nats. norm: of the whole gradient before clipping, inf if it was not finite.
    skipped: whether it was not finite, so that no weight was changed; gradients is then this rank's report, else None.
    loss_scale: of the step's gradients. rows: this rank's, int64 [rows, tokens + 1], valid until the next step reads
    its rows. rate_multiplier: of all rates, by the schedule. seconds: wall time without the checks.
    replay_s, hashes_s: wall time of the checks of reliability.replay_every and hash_every, 0 if the step had none.
    work_s: seconds that this rank worked for its rows and in forward and backward passes, without waits for other ranks
    (parallel/work_time.py). requests: those that any rank made.
    """

    loss: float
    norm: float
    skipped: bool
    rate_multiplier: float
    seconds: float
    work_s: float
    requests: Requests
    loss_scale: float
    rows: torch.Tensor
    gradients: GradientReport | None
    replay_s: float
    hashes_s: float


def set_schedules(run: TrainingModel, step: int) -> float:
    """Sets all optimizers' rates, decay and momentum for the step; returns the rate multiplier."""
    plan = run.plan
    values = scheduled_values(run.config.optimizer, step, plan.steps)
    for group in run.engine.adamw.param_groups:
        name = RATE_OF_GROUP[group["name"]]
        rate = plan.rates[name] * values.multiplier(name)
        if run.graph:
            group["lr"].fill_(rate)  # the tensor that the graph reads
        else:
            group["lr"] = rate
    run.muon.set_hyper(
        lr=plan.rates["matrix"] * values.multiplier("matrix"),
        weight_decay=plan.weight_decay * values.decay,
        momentum=values.momentum,
    )
    for table in run.rows.tables.values():
        run.rows.set_lr(table.name, plan.rates[table.rate] * values.multiplier(table.rate))
    return values.rate


def micro_batches(rows: torch.Tensor, micro_rows: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields (ids, targets), each [micro_rows, tokens], from a rank's rows [count, tokens + 1] in order."""
    for chunk in rows.split(micro_rows):
        yield chunk[:, :-1].contiguous(), chunk[:, 1:].contiguous()


def optimizers_of(run: TrainingModel) -> Optimizers:
    """Returns what the optimizer step of the run updates."""
    settings = run.config.optimizer
    clip = partial(clip_scales, run.layers, run.engine.adamw, run.plan.dims, settings.qk_clip)
    return Optimizers(
        adamw=run.engine.adamw,
        muon=run.muon,
        rows=run.rows,
        mesh=run.mesh,
        sum_of_squares=run.kernels.norm.sum_of_squares,
        clip_norm=settings.clip_norm,
        graph=run.graph,
        after_update=clip if settings.qk_clip else None,
    )


def update(run: TrainingModel, rows: torch.Tensor, **this_step) -> tuple[torch.Tensor, StepOutcome]:
    """Trains on this rank's rows of a step, int64 [rows, tokens + 1]; all ranks call it.

    this_step: more arguments of optim.joint.optimizer_step. Returns the mean loss over tokens and ranks (0-d, nats) and
    the outcome.
    """
    step_optimizers = partial(optimizer_step, optimizers_of(run), **this_step)
    return run.engine.train_step(micro_batches(rows, run.plan.micro_rows), step_optimizers)


def train_step(
    run: Run, step: int, *, requests: Requests = NO_REQUESTS, before_update: Callable[[], object] | None = None
) -> StepResult:
    """Runs step `step`; all ranks call it."""
    progress = run.mesh.world.progress
    progress.work.start()
    progress.note(f"rows of step {step}")
    synchronize(run.mesh.device)  # before next(), which starts a copy that runs beside the step
    with profile_range("data"), progress.work.working():
        rows = next(run.loader)
    checks, replay_s, hashes_s = run.config.reliability, 0.0, 0.0
    begin = time.perf_counter()
    if checks.replay_every and step % checks.replay_every == 0:
        replay_micro_batch(run, rows, step, run.folder)
        synchronize(run.mesh.device)
        replay_s = time.perf_counter() - begin
    multiplier = set_schedules(run, step)
    reports: list[GradientReport] = []
    loss_tensor, outcome = update(
        run,
        rows,
        requests=requests,
        before_update=before_update,
        inspect_discarded=lambda: reports.append(gradient_report(run)),
    )
    progress.note(f"loss of step {step}", waits=True)  # a GPU may still be working or waiting for other ranks
    loss = loss_tensor.item()
    if checks.hash_every and (step + 1) % checks.hash_every == 0:
        synchronize(run.mesh.device)
        hashes_begin = time.perf_counter()
        compare_replicas(run, step + 1, run.folder)
        hashes_s = time.perf_counter() - hashes_begin
    synchronize(run.mesh.device)
    progress.note(f"after step {step}")
    seconds = time.perf_counter() - begin - replay_s - hashes_s
    return StepResult(
        loss=loss,
        norm=outcome.norm,
        skipped=outcome.skipped,
        rate_multiplier=multiplier,
        seconds=seconds,
        work_s=progress.work.finish(),
        requests=outcome.requests,
        loss_scale=outcome.loss_scale,
        rows=rows,
        gradients=reports[0] if reports else None,
        replay_s=replay_s,
        hashes_s=hashes_s,
    )
