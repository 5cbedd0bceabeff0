"""`pretrain --dry-run`: what a job would be, from its config alone. Nothing is started."""

import dataclasses

import torch

from megachat.config import Config
from megachat.data.tokenizer import load_tokenizer
from megachat.device import choose_compute_dtype, memory_bytes, this_device
from megachat.evals.core_bundle import describe_bundle, open_configured_bundle
from megachat.evals.core_download import BUNDLE_PATH
from megachat.planning.explain import describe_config, describe_plan, plan_values, setting_warnings
from megachat.planning.manifest import describe_ownership, ownership
from megachat.planning.memory import Memory, describe_memory, memory_of_stages, memory_warning
from megachat.planning.plan import Plan, resolve
from megachat.train.lookup_rows import planned_lookup


def describe_job(config: Config, world: int, memory_gb: float | None = None) -> str:
    """Returns config, plan, owners of every parameter and estimated memory of the job on `world` ranks.

    Reads no data but the CORE bundle and an existing allocation of lookup rows, if configured. memory_gb: of the GPUs
    planned for; default: this machine's.
    """
    plan = _resolve(config, world)
    stages, dtype, device_bytes = _stage_memory(config, plan, memory_gb)
    estimate = f"{describe_memory(stages, device_bytes)}; computed in {str(dtype).removeprefix('torch.')}"
    warnings = _warnings(config, plan, stages, dtype, device_bytes)
    parts = [
        describe_config(config),
        describe_plan(plan),
        describe_ownership(ownership(config, plan)),
        "\n".join([estimate, *warnings]),
    ]
    if config.evaluate.core_every and config.evaluate.core_bundle is None and not BUNDLE_PATH.exists():
        parts.append(f"CORE bundle: downloaded to {BUNDLE_PATH} when the job starts")
    elif bundle := open_configured_bundle(config.evaluate):
        parts.append(describe_bundle(bundle))
    return "\n\n".join(parts)


def job_values(config: Config, world: int, memory_gb: float | None = None) -> dict:
    """Returns the same as JSON values; memory: of a rank of each pipeline stage, in bytes."""
    plan = _resolve(config, world)
    stages, dtype, device_bytes = _stage_memory(config, plan, memory_gb)
    return {
        "config": config.model_dump(mode="json"),
        "plan": plan_values(plan),
        "parameters": [dataclasses.asdict(line) for line in ownership(config, plan)],
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
