"""The real step of a probe: measured by phases, and its prediction corrected by it."""

import time
from typing import Any

import torch

from megachat.config import Config
from megachat.device import synchronize
from megachat.optim.joint import optimizer_step
from megachat.planning.plan import Plan
from megachat.planning.probe import OF_PASSES, Probe
from megachat.planning.step_time import StepTime, predict_step
from megachat.train.build import TrainingModel
from megachat.train.step import micro_batches, optimizers_of, set_schedules

LEAST_ERROR = 0.05  # relative: steps of one run vary by as much


def random_rows(plan: Plan, data_rank: int = 0) -> torch.Tensor:
    """Returns a data rank's rows of a step, int64 [rows, tokens + 1]."""
    shape = plan.accumulation * plan.micro_rows, plan.dims.sequence_len + 1
    return torch.randint(0, plan.dims.vocab_size, shape, generator=torch.Generator().manual_seed(data_rank))


def timed_step(training: TrainingModel, rows: torch.Tensor) -> dict[str, float]:
    """Takes a step and returns the seconds of the optimizer step, and of all before it ("passes"). All ranks call
    it."""
    device, spent = training.mesh.device, 0.0

    def step_optimizers():
        nonlocal spent
        synchronize(device)
        begin = time.perf_counter()
        outcome = optimizer_step(optimizers_of(training))
        synchronize(device)
        spent = time.perf_counter() - begin
        return outcome

    begin = time.perf_counter()
    loss, _ = training.engine.train_step(micro_batches(rows, training.plan.micro_rows), step_optimizers)
    loss.item()
    synchronize(device)
    return {"passes": time.perf_counter() - begin - spent, "optimizer": spent}


def measure_step(training: TrainingModel, rounds: int) -> dict[str, float]:
    """Returns the seconds of the phases of the fastest of `rounds` steps, after one. All ranks call it."""
    set_schedules(training, 0)
    rows = random_rows(training.plan, training.mesh.data.rank)
    steps = [timed_step(training, rows) for _ in range(rounds + 1)][1:]
    return min(steps, key=lambda step: sum(step.values()))


def predicted_phases(step: StepTime) -> dict[str, float]:
    """Returns the predicted seconds of the phases that measure_step measures on one rank."""
    passes = sum(step.parts[name] for name in (*OF_PASSES, "host"))
    return {"passes": passes, "optimizer": step.parts["optimizer"]}


def calibrate(document: dict[str, Any], config: Config, plan: Plan, measured: dict[str, float]) -> None:
    """Sets the document's factors and error from a measured step of one rank (measure_step) and its prediction."""
    plain = Probe(document | {"factors": {}})
    predicted = predicted_phases(predict_step(config, plan, plain, dtype=document["dtype"]))
    total, expected = sum(measured.values()), sum(predicted.values())
    document["factors"] = {phase: measured[phase] / predicted[phase] for phase in measured}
    document["step"] = {"tokens": plan.tokens_per_step, "measured": measured, "predicted": predicted}
    document["error"] = max(LEAST_ERROR, abs(expected / total - 1))
