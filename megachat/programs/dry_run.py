"""`pretrain --dry-run`: what a job would be, from its config alone. Nothing is started."""

import torch

from megachat.config import Config
from megachat.data.tokenizer import load_tokenizer
from megachat.device import choose_compute_dtype, memory_bytes, this_device
from megachat.evals.core_bundle import describe_bundle, open_configured_bundle
from megachat.evals.core_download import BUNDLE_PATH
from megachat.planning.explain import describe_config, describe_plan, setting_warnings
from megachat.planning.manifest import describe_ownership, ownership
from megachat.planning.memory import describe_memory, memory_of_stages, memory_warning
from megachat.planning.plan import Plan, resolve
from megachat.train.lookup_rows import planned_lookup


def describe_job(config: Config, world: int, memory_gb: float | None = None) -> str:
    """Returns config, plan, owners of every parameter and estimated memory of the job on `world` ranks.

    Reads no data but the CORE bundle and an existing allocation of lookup rows, if configured. memory_gb: of the GPUs
    planned for; default: this machine's.
    """
    vocab_size = config.model.vocab_size or load_tokenizer(config.data.tokenizer).vocab_size
    plan: Plan = resolve(config, world, vocab_size, planned_lookup(config, vocab_size))
    parts = [
        describe_config(config),
        describe_plan(plan),
        describe_ownership(ownership(config, plan)),
        _planned_memory(config, plan, memory_gb),
    ]
    if config.evaluate.core_every and config.evaluate.core_bundle is None and not BUNDLE_PATH.exists():
        parts.append(f"CORE bundle: downloaded to {BUNDLE_PATH} when the job starts")
    elif bundle := open_configured_bundle(config.evaluate):
        parts.append(describe_bundle(bundle))
    return "\n\n".join(parts)


def _planned_memory(config: Config, plan: Plan, memory_gb: float | None) -> str:
    """Returns the estimated memory per rank, and a warning if it is too much; in bfloat16 on GPUs unless configured."""
    this = this_device()
    on_gpu, precision = memory_gb is not None or this.type == "cuda", config.precision.compute
    dtype = torch.bfloat16 if on_gpu and precision == "auto" else choose_compute_dtype(precision, this)[0]
    device_bytes = int(memory_gb * 1e9) if memory_gb else memory_bytes(this, 1) if on_gpu else None
    stages = memory_of_stages(config, plan, dtype, on_gpu=on_gpu)
    warning = memory_warning(config, plan, dtype, device_bytes, stages=stages) if device_bytes else None
    estimate = describe_memory(stages, device_bytes)
    line = f"{estimate}; computed in {str(dtype).removeprefix('torch.')}"
    return "\n".join([line, *([warning] if warning else []), *setting_warnings(config, plan)])
