"""The config that `megachat verify` runs on a layout. Imports no torch: a wrong layout is refused at once."""

import math

from megachat.config import Config, config_from_values
from megachat.planning.dimensions import up_to_multiple
from megachat.planning.plan import resolve_plan

VERIFY_STEPS = 2
HEAD_MULTIPLE = 16  # channels per head of a model that is scaled down


def verification_config(
    config: Config, *, data: int, tensor: int, pipeline: int, depth: int | None, rows_per_rank: int
) -> Config:
    """Returns the config to run on a layout: float32, micro-batches of one row (the same shape on every layout), a
    short horizon.

    Another depth scales the model with its numbers of heads kept, so that it can be cut over every tensor axis that
    fits the config's model.
    """
    sections = config.model_dump(mode="json")
    if depth and depth != config.model.depth:
        model = config.model
        heads = -(-model.depth * model.aspect_ratio // model.head_size)
        scaled = depth * model.aspect_ratio // heads // HEAD_MULTIPLE * HEAD_MULTIPLE
        # at least the number of blocks: aspect_ratio times depth is rounded up to the width
        head_size = max(scaled, up_to_multiple(depth, HEAD_MULTIPLE))
        sections["model"] |= {"depth": depth, "head_size": head_size, "aspect_ratio": heads * head_size // depth}
    last = (depth or config.model.depth) - 1
    sections["lookup"] |= {"after_blocks": sorted({min(block, last) for block in config.lookup.after_blocks})}
    sections["precision"] |= {"compute": "float32", "compile": False, "fp8": "off", "attention": "auto"}
    sections["parallel"] |= {"tensor": tensor, "pipeline": pipeline}
    if tensor == 1:
        sections["parallel"]["sequence"] = False
    sections["batch"] |= {"tokens": None, "micro_rows": 1, "accumulation": rows_per_rank}
    sections["horizon"] |= {"steps": 20 * VERIFY_STEPS, "flops": None, "stop_step": None}
    return config_from_values(sections, "the scaled config")


def on_layout(config: Config, layout: dict[str, int]) -> Config:
    """Returns the config, in its size, on a layout, as of parse_layout. Raises UserError if settings contradict it."""
    values = config.model_dump(mode="json")
    values["parallel"] |= {"tensor": layout["tensor"], "pipeline": layout["pipeline"]}
    return config_from_values(values, "verify --dry")


def check_layout(config: Config, layout: dict[str, int], vocab_size: int, *, depth: int | None, dry: bool) -> None:
    """Raises UserError if a layout does not fit. layout: as of parse_layout. dry: the config keeps its own size."""
    config = on_layout(config, layout) if dry else verification_config(config, **layout, depth=depth, rows_per_rank=1)
    resolve_plan(config, math.prod(layout.values()), vocab_size)
