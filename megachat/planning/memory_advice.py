"""What to do about a run that does not fit a device: a warning with the settings that help, or an error."""

import contextlib
from collections.abc import Iterator

import torch

from megachat.config import Config
from megachat.errors import UserError
from megachat.planning.memory import FILLS, Memory, format_bytes, memory_of_stages
from megachat.planning.plan import Plan, resolve_plan
from megachat.settings.training import RECOMPUTE


def memory_warning(
    config: Config,
    plan: Plan,
    dtype: torch.dtype,
    device_bytes: int,
    *,
    on_gpu: bool = True,
    stages: list[Memory] | None = None,
) -> str | None:
    """Returns a warning for a run that will not fit, with what each setting that helps would reduce it to; None if it
    fits. stages: its memory_of_stages, if it is known.
    """
    stages = stages or memory_of_stages(config, plan, dtype, on_gpu=on_gpu, device_bytes=device_bytes)
    largest = max(stage.total for stage in stages)
    if largest <= FILLS * device_bytes:
        return None
    fitting: dict[str, str] = {}  # setting -> its first value that is enough
    lightest: dict[str, str] = {}  # setting -> its value that needs least
    for setting, value, changed, other in lighter_plans(config, plan):
        others = memory_of_stages(changed, other, dtype, on_gpu=on_gpu, device_bytes=device_bytes)
        total = max(stage.total for stage in others)
        if total < largest:
            lightest[setting] = f"{setting}={value} ({format_bytes(total)})"
            if total <= FILLS * device_bytes:
                fitting.setdefault(setting, lightest[setting])
    advice = "use more ranks, or a smaller model"
    if fitting:
        advice = f"set {', or '.join(fitting.values())}"
    elif lightest:
        advice = f"not enough alone is {', or '.join(lightest.values())}; set several of them, or use more ranks"
    return (
        f"WARNING: estimated memory per rank is {format_bytes(largest)}, but the device has "
        f"{format_bytes(device_bytes)}. The run will run out of memory: {advice}"
    )


def lighter_settings(config: Config, plan: Plan) -> list[tuple[str, str, object]]:
    """Returns (section, key, value) of the settings that need less memory, the cheapest in time first."""
    fewer = [rows for rows in range(plan.micro_rows // 2, 0, -1) if plan.micro_rows % rows == 0]
    recompute = RECOMPUTE[RECOMPUTE.index(config.batch.recompute) + 1 :]
    return [
        *(("batch", "micro_rows", rows) for rows in fewer),
        *(("batch", "recompute", kind) for kind in recompute),
        ("parallel", "tensor", plan.layout.tensor * 2),
        ("parallel", "pipeline", plan.layout.pipeline * 2),
    ]


def lighter_plans(config: Config, plan: Plan) -> Iterator[tuple[str, object, Config, Plan]]:
    """Yields (section.key, value, config with it, its plan) for the lighter_settings that are allowed."""
    for section, key, value in lighter_settings(config, plan):
        solved = {"accumulation": None} if key == "micro_rows" else {}  # from the rows
        changed = config.changed(section, **{key: value}, **solved)
        with contextlib.suppress(UserError):
            yield (
                f"{section}.{key}",
                value,
                changed,
                resolve_plan(changed, plan.layout.world, plan.dims.vocab_size, plan.dims.lookup),
            )


def check_state_fits(stages: list[Memory], device_bytes: int, host_bytes: int | None = None) -> None:
    """Raises UserError if weights and optimizer state alone exceed the device: then no batch is small enough. Also if
    sparse tables in host memory exceed this rank's share of it, host_bytes.
    """
    most = max(stage.host for stage in stages)
    if host_bytes is not None and most > host_bytes:
        raise UserError(
            f"the n-gram tables and their optimizer state need {format_bytes(most)} of host memory per rank, but a "
            f"rank's share is {format_bytes(host_bytes)}: use more ranks, or lower ngram.rows or ngram.width"
        )
    fullest = max(stages, key=lambda stage: stage.state)
    if fullest.state > device_bytes:
        with_tables = f" ({format_bytes(fullest.tables)} of them for n-gram tables)" if fullest.tables else ""
        raise UserError(
            f"weights and optimizer state need {format_bytes(fullest.state)} per rank on stage {fullest.stage}"
            f"{with_tables}, but the device has {format_bytes(device_bytes)}: use more ranks, raise parallel.tensor "
            f"or parallel.pipeline, or lower {'ngram.rows, ngram.width or ' if with_tables else ''}model.depth"
        )
