"""`pretrain --dry-run`: what a job would be, from its config alone. Nothing is started."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from megachat.config import Config
from megachat.data.tokenizer import load_tokenizer
from megachat.device import choose_compute_dtype, device_name, dtype_name, memory_bytes, this_device
from megachat.errors import UserError
from megachat.planning.execution import describe_fp8_matrices
from megachat.planning.explain import describe_config, describe_plan, plan_values, setting_warnings
from megachat.planning.hardware import Machine, known_gpu, parse_gpus
from megachat.planning.layouts import describe_layout
from megachat.planning.manifest import describe_ownership, ownership
from megachat.planning.memory import FILLS, Memory, describe_memory, format_bytes, memory_of_stages
from megachat.planning.memory_advice import memory_warning
from megachat.planning.plan import Plan, resolve_plan
from megachat.planning.probe import Probe, read_probe
from megachat.planning.step_time import UNTIMED_STEPS, RunTime, predict_run
from megachat.programs.preflight import Check, describe_checks, preflight, rank_checkpoint_bytes
from megachat.text import plural
from megachat.train.lookup_rows import planned_lookup


class Hardware(NamedTuple):
    """What a job is planned for; default: this machine. memory_gb: of a GPU. gpu: its kind, or probe: the file of a
    probe, from which the time is predicted. price: of a GPU-hour, with a probe of a CPU of its hour.
    """

    memory_gb: float | None = None
    gpu: str | None = None
    probe: Path | None = None
    price: float | None = None


THIS_MACHINE = Hardware()


def describe_job(
    config: Config,
    world: int,
    hardware: Hardware = THIS_MACHINE,
    *,
    verbose: bool = False,
    made: Mapping[str, str] | None = None,
) -> str:
    """Returns the verdict of the job on `world` ranks: estimated memory, predicted time and price where the machine's
    speeds are known, warnings and checks of this machine.

    Reads the data folder's footers, the tokenizer, and the CORE bundle and an existing allocation of lookup rows, if
    configured. verbose: also config, plan, and owners of every parameter. made: checks that other commands answer, with
    what these do. Raises UserError for a plan that does not exist, for a bundle that cannot be used, and for a price
    where no time is known.
    """
    plan = _resolve(config, world)
    stages, dtype, device_bytes = _memory_here(config, plan, hardware.memory_gb)
    warnings = _warnings(config, plan, stages, dtype, device_bytes)
    time = predicted_time(config, plan, hardware, dtype)
    checks = preflight(config, plan, made or {})
    lines = [
        _job_verdict(stages, device_bytes, checks) + (f"; {plural(len(warnings), 'warning')}" if warnings else ""),
        *(describe_time(time) if time else [_no_time(world, hardware)]),
        f"{describe_memory(stages, device_bytes)}; computed in {dtype_name(dtype)}",
        *_fp8_line(config, plan),
        *warnings,
        *describe_checks(checks),
    ]
    parts = ["\n".join(lines)]
    if verbose:
        parts += [describe_config(config), describe_plan(plan), describe_ownership(ownership(config, plan))]
    else:
        batch = f"{plural(plan.micro_rows, 'row')} x {plural(plan.accumulation, 'micro-batch')} per rank"
        steps = f"{plan.steps:,} steps of {plan.tokens_per_step:,} tokens ({batch})"
        command = "--verbose" if made is None else "`megachat pretrain --dry-run --verbose`"
        parts.append(
            f"layout = {describe_layout(vars(plan.layout))}; {steps}\n"
            f"{command} shows every setting, every derived number with its formula, and the owners of all parameters"
        )
    return "\n\n".join(parts)


def _fp8_line(config: Config, plan: Plan) -> list[str]:
    recipe, head = config.precision.fp8, config.precision.fp8_head
    if recipe == "off":
        return []
    return [f"fp8 {recipe} for {describe_fp8_matrices(plan.dims, plan.layout.tensor, recipe, head=head)}"]


def _job_verdict(stages: list[Memory], device_bytes: int | None, checks: list[Check]) -> str:
    """Returns the first line: whether the job fits the device, and how many checks of this machine have a problem."""
    most, problems = max(stage.total for stage in stages), sum(check.problem for check in checks)
    fit = f"needs {format_bytes(most)} per rank"
    if device_bytes:
        fits = most <= FILLS * device_bytes
        fit = f"{'fits' if fits else 'does not fit'}: {format_bytes(most)} of {format_bytes(device_bytes)} per rank"
    return f"{fit}; {plural(problems, 'problem') if problems else 'no problem'} on this machine"


def predicted_time(config: Config, plan: Plan, hardware: Hardware, dtype: torch.dtype) -> dict | None:
    """Returns the predicted time and price as JSON values; None if the machine's speeds are not known.

    Raises UserError for a price without a time, and for a probe that does not fit the config.
    """
    path, world, this = hardware.probe, plan.layout.world, this_device()
    if not path and not hardware.gpu and config.log.probe:
        path = Path(config.log.probe)
    machine: Machine | Probe | None = None
    name, units, source = dtype_name(dtype), world, ""
    if path:
        machine = probe = read_probe(path)
        name = probe.config_for(config, plan.dims.vocab_size).precision.compute
        units, source = world if probe.on_gpu else 1, f"probe {path}"
    else:
        kind = parse_gpus(hardware.gpu).gpu if hardware.gpu else None
        if kind is None and this.type == "cuda" and hardware.memory_gb is None:
            kind = known_gpu(device_name(this))
        if kind and world <= kind.gpus_per_node:  # the network between nodes is not known
            machine, source = parse_gpus(f"1x{world}x{kind.name}"), f"data sheet of {kind.name}"
    if machine is None:
        if hardware.price is not None:
            raise UserError(
                f"--price needs a time, and that of {plural(world, 'rank')} on this machine is not known: give "
                "--gpus 8xH100 to `megachat plan`, --gpu KIND for one node, or --probe FILE"
            )
        return None
    run = predict_run(config, plan, machine, dtype=name, checkpoint_bytes=rank_checkpoint_bytes(config, plan))
    values = {"step_sec": run.step.total, "error": run.step.error, "steps": plan.stop_step, "source": source}
    values |= {"assumed": path is None, "clock_hours": run.clock_hours, "wall_hours": run.wall_hours}
    return values | price_values(run, units, hardware.price)


def _no_time(world: int, hardware: Hardware) -> str:
    """Returns why no time and price are predicted, and what to do about it."""
    where = f"of {hardware.gpu}" if hardware.gpu else "on this machine"
    return (
        f"time and price: not predicted, because the speed of {plural(world, 'rank')} {where} is not known; `megachat "
        "probe` measures it for --set log.probe=FILE, and `megachat plan --gpus 8xH100` plans for GPUs"
    )


def timed_plan(config: Config, world: int, hardware: Hardware = THIS_MACHINE) -> tuple[Plan, dict | None]:
    """Returns the plan of a job with its predicted time (see predicted_time)."""
    plan = _resolve(config, world)
    return plan, predicted_time(config, plan, hardware, _memory_here(config, plan, hardware.memory_gb)[1])


def price_values(run: RunTime, units: int, price: float | None) -> dict:
    """Returns the price of a run with its interval as JSON values, if there is one. units: that are paid per hour."""
    if price is None:
        return {}
    total = run.wall_hours * units * price
    return {"price": total, "price_interval": [total * (1 - run.step.error), total * (1 + run.step.error)]}


def describe_time(values: Mapping) -> list[str]:
    """Returns lines with predicted time and price."""
    origin = "assumed" if values["assumed"] else "error of the probe"
    by = f", by the {values['source']}" if values["source"] else ""
    lines = [
        f"time: {hours_text(values['wall_hours'])} for {values['steps']:,} steps of {values['step_sec']:.3f} s, "
        f"+-{values['error']:.0%} ({origin}); predicted, not measured{by}"
    ]
    if "price" in values:
        low, high = values["price_interval"]
        lines.append(f"price: {values['price']:,.2f}, between {low:,.2f} and {high:,.2f}")
    lines.append(
        f"by the speedrun's clock: {hours_text(values['clock_hours'])}, without the first {UNTIMED_STEPS} steps, "
        "evaluation and saving"
    )
    return lines


def hours_text(hours: float) -> str:
    """Returns hours for people; in minutes or seconds where two decimals of an hour would say little."""
    if hours >= 0.1:
        return f"{hours:,.2f} h"
    return f"{60 * hours:.1f} min" if hours >= 1 / 60 else f"{3600 * hours:.1f} s"


def job_values(config: Config, world: int, hardware: Hardware = THIS_MACHINE) -> dict:
    """Returns the same as JSON values; memory: of a rank of each pipeline stage, in bytes; time: null if not known."""
    plan = _resolve(config, world)
    stages, dtype, device_bytes = _memory_here(config, plan, hardware.memory_gb)
    return {
        "config": config.model_dump(mode="json"),
        "plan": plan_values(plan),
        "parameters": [dataclasses.asdict(line) for line in ownership(config, plan)],
        "checks": [check._asdict() for check in preflight(config, plan)],
        "memory": [dataclasses.asdict(stage) for stage in stages],
        "device_bytes": device_bytes,
        "time": predicted_time(config, plan, hardware, dtype),
        "compute_dtype": dtype_name(dtype),
        "warnings": _warnings(config, plan, stages, dtype, device_bytes),
    }


def _resolve(config: Config, world: int) -> Plan:
    vocab_size = config.model.vocab_size or load_tokenizer(config.data.tokenizer).vocab_size
    return resolve_plan(config, world, vocab_size, planned_lookup(config, vocab_size))


def _memory_here(config: Config, plan: Plan, memory_gb: float | None) -> tuple[list[Memory], torch.dtype, int | None]:
    """Returns the estimate for each stage, the compute dtype, and the device's bytes; in bfloat16 on GPUs unless
    configured.
    """
    this = this_device()
    on_gpu, precision = memory_gb is not None or this.type == "cuda", config.precision.compute
    dtype = torch.bfloat16 if on_gpu and precision == "auto" else choose_compute_dtype(precision, this)[0]
    device_bytes = int(memory_gb * 1e9) if memory_gb else memory_bytes(this, 1) if on_gpu else None
    stages = memory_of_stages(config, plan, dtype, on_gpu=on_gpu, device_bytes=device_bytes)
    return stages, dtype, device_bytes


def _warnings(
    config: Config, plan: Plan, stages: list[Memory], dtype: torch.dtype, device_bytes: int | None
) -> list[str]:
    warning = memory_warning(config, plan, dtype, device_bytes, stages=stages) if device_bytes else None
    return [*([warning] if warning else []), *setting_warnings(config, plan)]
