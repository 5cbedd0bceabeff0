"""What the planner counts and predicts for a run that exists: memory, time per step, and who holds what."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megachat.config import config_from_values
from megachat.device import DTYPES
from megachat.errors import UserError
from megachat.planning.hardware import known_gpu, parse_gpus
from megachat.planning.manifest import Ownership, ownership
from megachat.planning.memory import Memory, memory_of_stages
from megachat.planning.plan import Layout, resolve_without_text
from megachat.planning.probe import read_probe
from megachat.planning.step_time import RunTime, predict_run
from megachat.studies.runs import RunRecord, newest_start, read_starts


@dataclass(frozen=True)
class Predicted:
    """A run's prediction, by the version of megachat that reads it.

    time: of the steps that are done; None where no speeds are known. source: what the time is from, or why there is
    none. units: what a price is paid for, per hour: GPUs, or one machine.
    """

    memory: Sequence[Memory]  # per pipeline stage
    owners: Sequence[Ownership]
    time: RunTime | None
    source: str
    units: int
    on_gpu: bool


def predict(run: RunRecord, probe: Path | None = None) -> Predicted:
    """Returns the prediction for a run on the device that it last trained on.

    probe: a file of `megachat probe` of that device; default: log.probe of the run, if the file exists, else the data
    sheet of a known GPU. Raises UserError if this version cannot plan the run's config, or for an unreadable probe.
    """
    start = newest_start(run.folder)
    config = config_from_values(dict(run.config), str(run.folder))
    world = Layout(**run.plan["layout"]).world
    # rows of lookup tables are allocated as an example: what a rank holds does not depend on it
    plan = resolve_without_text(config, world, run.plan["dims"]["vocab_size"])
    name = str(start.get("compute_dtype", "torch.float32")).removeprefix("torch.")
    on_gpu = bool(start.get("device_count"))
    plan = dataclasses.replace(plan, stop_step=run.step)
    time, source = None, "not known: `megachat probe` measures this device, --probe gives its file"
    path = probe or (Path(config.log.probe) if config.log.probe and Path(config.log.probe).exists() else None)
    gpu = known_gpu(str(start.get("device"))) if on_gpu else None
    local = (start.get("launch") or {}).get("local_size") or 1
    if path:
        time, source = predict_run(config, plan, read_probe(path), dtype=name), f"probe {path}"
    elif gpu and world <= local:
        time = predict_run(config, plan, parse_gpus(f"1x{local}x{gpu.name}"), dtype=name)
        source = f"data sheet of {gpu.name}"
    memory = memory_of_stages(config, plan, DTYPES[name], on_gpu=on_gpu)
    return Predicted(memory, ownership(config, plan), time, source, world if on_gpu else 1, on_gpu)


def try_predict(run: RunRecord, probe: Path | None = None) -> tuple[Predicted | None, str]:
    """Returns the prediction, or None and why there is none: a run of another version may have settings that this one
    does not know. A probe that cannot be read is an error still.
    """
    try:
        return predict(run, probe), ""
    except (UserError, KeyError, TypeError) as error:
        if probe:
            raise
        return None, f"no prediction: {str(error).splitlines()[0]}"


def predicted_run_rows(
    predicted: Predicted, run: RunRecord, step_s: float | None, price: float | None
) -> list[tuple[str, str, str, str]]:
    """Returns (label, predicted, measured, difference) of a step, the speedrun's clock, the wall clock with its price,
    and rank 0's memory. step_s: measured median. price: of a GPU-hour, on a CPU of the machine's hour.
    """
    rows, time = [], predicted.time
    clock = (
        next((line["total_training_time"] for line in reversed(run.lines) if "total_training_time" in line), 0) / 3600
    )
    wall = sum(wall_clock(run.lines, read_starts(run.folder)).values()) / 3600
    if time and step_s:
        text = f"{1000 * time.step.total:,.0f} ms +-{time.step.error:.0%}"
        rows.append(("time per step", text, f"{1000 * step_s:,.0f} ms (median)", _off(time.step.total, step_s)))
    for label, hours, measured in (
        ("steps after step 10", time and time.clock_hours, clock),
        ("wall clock", time and time.wall_hours, wall),
    ):
        if hours and measured:
            rows.append((label, _hours(hours), _hours(measured), _off(hours, measured)))
    if price and wall:
        rate, unit = price * predicted.units, "GPU" if predicted.on_gpu else "machine"
        hours = time.wall_hours if time else None
        cells = (f"{rate * hours:,.2f}", _off(hours, wall)) if hours else ("-", "-")
        rows.append((f"price at {price:g} per {unit}-hour", cells[0], f"{rate * wall:,.2f}", cells[1]))
    if peaks := run.values("train/peak_memory_bytes"):
        count = predicted.memory[0].total
        off = _off(count, max(peaks)) if predicted.on_gpu else "whole process"
        rows.append(("memory of rank 0", f"{count / 1e9:.2f} GB", f"{max(peaks) / 1e9:.2f} GB (peak)", off))
    return rows


def _off(predicted: float, measured: float) -> str:
    return f"{predicted / measured - 1:+.1%}" if measured else "-"


def _hours(hours: float) -> str:
    return f"{hours:.2f} h" if hours >= 1 else f"{60 * hours:.1f} min"


def wall_clock(lines: Sequence[dict], starts: Sequence[dict] = ()) -> dict[str, float]:
    """Returns the seconds of a run's wall clock by what they went to, from the time stamps of its lines; {} without
    time stamps. "checkpoints" is what blocked the training. "rest" is the start of a job, data, samples and what no
    line shows.

    starts: of its jobs; the time between a job's last line and the start of the next is left out.
    """
    seconds = dict.fromkeys(("training steps", "validation", "CORE", "checkpoints", "rest"), 0.0)
    begins = [start["time"] for start in starts if "time" in start]
    before: dict[str, Any] | None = None
    for line in lines:
        if "time" not in line:
            continue
        start = max([begin for begin in begins if begin <= line["time"]], default=line["time"])
        first = before is None or before["time"] < start < line["time"]  # of its job: the gap contains its start
        gap = max(0.0, line["time"] - (start if first or before is None else before["time"]))
        if "train/dt" in line:
            steps = line["step"] - before["step"] + ("train/dt" not in before) if before else 1
            seconds["training steps"] += (used := min(gap, max(1, steps) * line["train/dt"]))
            gap -= used
        for key, kind in (("val/bpb", "validation"), ("centered_results", "CORE")):
            if key in line and not first:
                seconds[kind] += gap
                gap = 0.0
        if "checkpoint/blocked_s" in line:
            seconds["checkpoints"] += (used := min(gap, line["checkpoint/blocked_s"]))
            gap -= used
        seconds["rest"] += gap
        before = line
    return {kind: value for kind, value in seconds.items() if value > 0}
