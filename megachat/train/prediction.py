"""The predicted step in a training's log: before the first step, and beside the measured step at the end."""

import contextlib
import statistics
from pathlib import Path
from typing import NamedTuple

import torch

from megachat.config import Config
from megachat.device import device_name, dtype_name
from megachat.files import readable_metrics
from megachat.planning.hardware import known_gpu, parse_gpus
from megachat.planning.plan import Plan
from megachat.planning.probe import read_probe
from megachat.planning.step_time import StepTime, predict_step
from megachat.train.build import Run, TrainingModel

UNMEASURED_STEPS = 2
_LISTED_SHARE = 0.02  # parts below this share of the step are not listed


class Prediction(NamedTuple):
    """A predicted step and what it is from."""

    step: StepTime
    source: str


def predict_training(
    config: Config, plan: Plan, device: torch.device, dtype: torch.dtype, local_ranks: int
) -> Prediction | None:
    """Returns the predicted step with the probe in log.probe, else by the data sheet of a known GPU; None without
    either, and for several nodes without a probe, because the network is unknown.

    local_ranks: on this node. Raises UserError for a probe that cannot be read or measured fewer ranks.
    """
    name = dtype_name(dtype)
    if config.log.probe:
        step = predict_step(config, plan, read_probe(Path(config.log.probe)), dtype=name)
        return Prediction(step, f"probe {config.log.probe}")
    gpu = known_gpu(device_name(device)) if device.type == "cuda" else None
    if gpu is None or plan.layout.world > local_ranks:
        return None
    machine = parse_gpus(f"1x{local_ranks}x{gpu.name}")
    return Prediction(predict_step(config, plan, machine, dtype=name), f"data sheet of {gpu.name}")


def measured_seconds(run_folder: Path, first_step: int) -> list[float]:
    """Returns the seconds of the logged steps of a job that began after `first_step`, from metrics.jsonl, without its
    first two, which allocate and compile. Lines that cannot be read are left out."""
    seconds = []
    for line in readable_metrics(run_folder):
        with contextlib.suppress(ValueError, TypeError, LookupError):
            if line["step"] > first_step + UNMEASURED_STEPS:
                seconds.append(float(line["train/dt"]))
    return seconds


def predicted_lines(run: TrainingModel, local_ranks: int) -> list[str]:
    """Returns the line for the start of the log, if there is a prediction."""
    prediction = predict_training(run.config, run.plan, run.mesh.device, run.compute_dtype, local_ranks)
    if prediction is None:
        return []
    step = prediction.step
    parts = sorted(step.parts.items(), key=lambda part: -part[1])
    listed = ", ".join(f"{name} {sec / step.total:.0%}" for name, sec in parts if sec > _LISTED_SHARE * step.total)
    text = f"predicted step: {1000 * step.total:,.0f} ms +-{step.error:.0%}, not measured, by the {prediction.source}"
    return [f"{text} ({listed})"]


def predicted_step_rows(run: Run, first_step: int, local_ranks: int) -> list[tuple[str, str]]:
    """Returns (label, text) for the end of the log of a job that began after `first_step`: the predicted beside the
    median measured step, if there are both."""
    prediction = predict_training(run.config, run.plan, run.mesh.device, run.compute_dtype, local_ranks)
    seconds = measured_seconds(run.folder, first_step) if prediction else []
    if prediction is None or not seconds:
        return []
    predicted, error, measured = prediction.step.total, prediction.step.error, statistics.median(seconds)
    off = predicted / measured - 1
    outside = "" if abs(off) <= error else f", outside of its +-{error:.0%}"
    text = f"{1000 * predicted:,.0f} ms predicted, {1000 * measured:,.0f} ms measured (median), {off:+.1%}{outside}"
    return [("step", text)]
