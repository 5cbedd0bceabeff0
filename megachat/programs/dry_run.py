"""`pretrain --dry-run`: what a job would be, from its config alone. Nothing is started."""

import dataclasses

import torch

from megachat.config import Config
from megachat.data.tokenizer import load_tokenizer
from megachat.device import choose_compute_dtype, memory_bytes, this_device
from megachat.planning.explain import describe_config, describe_plan, plan_values, setting_warnings
from megachat.planning.manifest import describe_ownership, ownership
from megachat.planning.memory import FILLS, Memory, describe_memory, format_bytes, memory_of_stages, memory_warning
from megachat.planning.plan import Plan, resolve
from megachat.programs.preflight import Check, describe_checks, preflight
from megachat.train.lookup_rows import planned_lookup


def describe_job(config: Config, world: int, memory_gb: float | None = None, *, verbose: bool = False) -> str:
    """Returns the verdict of the job on `world` ranks: estimated memory, warnings and checks of this machine.

    Reads the data folder's footers, the tokenizer, and the CORE bundle and an existing allocation of lookup rows, if
    configured. memory_gb: of the GPUs planned for; default: this machine's. verbose: also config, plan, and owners of
    every parameter. Raises UserError for a plan that does not exist, and for a bundle that cannot be used.
    """
    plan = _resolve(config, world)
    stages, dtype, device_bytes = _stage_memory(config, plan, memory_gb)
    warnings = _warnings(config, plan, stages, dtype, device_bytes)
    checks = preflight(config, plan)
    lines = [
        _verdict(stages, device_bytes, checks),
        f"{describe_memory(stages, device_bytes)}; computed in {str(dtype).removeprefix('torch.')}",
        *warnings,
        *describe_checks(checks),
    ]
    parts = ["\n".join(lines)]
    if verbose:
        parts += [describe_config(config), describe_plan(plan), describe_ownership(ownership(config, plan))]
    else:
        layout = f"data {plan.layout.data} x tensor {plan.layout.tensor} x pipeline {plan.layout.pipeline}"
        batch = f"{plan.micro_rows} rows x {plan.accumulation} micro-batches per rank"
        parts.append(
            f"layout = {layout}; {plan.steps:,} steps of {plan.tokens_per_step:,} tokens ({batch})\n"
            "--verbose shows every setting, every derived number with its formula, and the owners of all parameters"
        )
    return "\n\n".join(parts)


def _verdict(stages: list[Memory], device_bytes: int | None, checks: list[Check]) -> str:
    """Returns the first line: whether the job fits the device, and how many checks of this machine have a problem."""
    most, problems = max(stage.total for stage in stages), sum(check.problem for check in checks)
    fit = f"needs {format_bytes(most)} per rank"
    if device_bytes:
        fits = most <= FILLS * device_bytes
        fit = f"{'fits' if fits else 'does not fit'}: {format_bytes(most)} of {format_bytes(device_bytes)} per rank"
    on_machine = (
        f"{problems} problem{'s' * (problems > 1)} on this machine" if problems else "no problem on this machine"
    )
    return f"{fit}; {on_machine}"


def job_values(config: Config, world: int, memory_gb: float | None = None) -> dict:
    """Returns the same as JSON values; memory: of a rank of each pipeline stage, in bytes."""
    plan = _resolve(config, world)
    stages, dtype, device_bytes = _stage_memory(config, plan, memory_gb)
    return {
        "config": config.model_dump(mode="json"),
        "plan": plan_values(plan),
        "parameters": [dataclasses.asdict(line) for line in ownership(config, plan)],
        "checks": [check._asdict() for check in preflight(config, plan)],
        "memory": [dataclasses.asdict(stage) for stage in stages],
        "device_bytes": device_bytes,
        "compute_dtype": str(dtype).removeprefix("torch."),
        "warnings": _warnings(config, plan, stages, dtype, device_bytes),
    }


def _resolve(config: Config, world: int) -> Plan:
    vocab_size = config.model.vocab_size or load_tokenizer(config.data.tokenizer).vocab_size
    return resolve(config, world, vocab_size, planned_lookup(config, vocab_size))


def _stage_memory(config: Config, plan: Plan, memory_gb: float | None) -> tuple[list[Memory], torch.dtype, int | None]:
    """Returns the estimate for each stage, the compute dtype, and the device's bytes; in bfloat16 on GPUs unless
    configured.
    """
    this = this_device()
    on_gpu, precision = memory_gb is not None or this.type == "cuda", config.precision.compute
    dtype = torch.bfloat16 if on_gpu and precision == "auto" else choose_compute_dtype(precision, this)[0]
    device_bytes = int(memory_gb * 1e9) if memory_gb else memory_bytes(this, 1) if on_gpu else None
    return memory_of_stages(config, plan, dtype, on_gpu=on_gpu), dtype, device_bytes


def _warnings(
    config: Config, plan: Plan, stages: list[Memory], dtype: torch.dtype, device_bytes: int | None
) -> list[str]:
    warning = memory_warning(config, plan, dtype, device_bytes, stages=stages) if device_bytes else None
    return [*([warning] if warning else []), *setting_warnings(config, plan)]
