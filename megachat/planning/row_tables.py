"""Counts the bytes of sparse tables on one rank: rows, optimizer state, gradients and what travels in a step."""

import math
from dataclasses import dataclass

import torch

from megachat.config import Config
from megachat.device import gradient_wire
from megachat.model.gpt import ModelOptions
from megachat.optim.groups import group_of
from megachat.optim.row_tables import ROWS_PER_UPDATE
from megachat.optim.row_update import row_state_shapes
from megachat.parallel.rectangles import MASTER
from megachat.place import place_of
from megachat.planning.plan import Plan
from megachat.planning.stage_state import stage_parameters


@dataclass(frozen=True)
class RowBytes:
    """Bytes of a pipeline stage's sparse tables on the rank with most rows; all zero without tables.

    masters, moments: in host memory if on_host. gradients: at most, of a step's distinct rows. workspace: while
    gradients are added or rows updated. wire: sent to other ranks in a step, at most, if no row is read twice.
    """

    masters: int = 0
    moments: int = 0
    gradients: int = 0
    workspace: int = 0
    wire: int = 0
    on_host: bool = False


def row_bytes(config: Config, plan: Plan, stage: int, dtype: torch.dtype) -> RowBytes:
    """Returns the bytes of a stage. dtype: of activations."""
    layout, settings = plan.layout, config.ngram
    ranks, tokens = layout.data * layout.tensor, plan.micro_tokens
    row_bytes_sent = ModelOptions(compute_dtype=dtype).table_dtype.itemsize
    gradient_bytes_sent = gradient_wire(config.optimizer.gradient_wire, dtype).itemsize
    masters = moments = gradients = largest = wire = update = 0
    parameters = stage_parameters(plan.dims, plan.stages[stage], dtype) if plan.dims.ngram else ()
    for parameter in parameters:
        place = place_of(parameter)
        if group_of(place.name).optimizer != "rows":
            continue
        rows, width = place.whole
        local = -(-rows // ranks)
        shapes = row_state_shapes(settings.optimizer, local, width)
        masters += 4 * math.prod(shapes.pop(MASTER))
        moments += 4 * sum(math.prod(shape) for shape in shapes.values())
        distinct = min(local, -(-plan.tokens_per_step // ranks))
        collected = distinct * (4 * width + 8)
        # those of later micro-batches wait until they are as many
        gradients += collected * (2 if plan.accumulation > 1 else 1)
        largest = max(largest, collected)
        update = max(update, 7 * 4 * width * min(distinct, ROWS_PER_UPDATE))
        columns = width // layout.tensor if width == plan.dims.kv_width else width
        most = plan.accumulation * min(tokens, rows) * (ranks - 1) // ranks
        wire += most * (8 + columns * (row_bytes_sent + gradient_bytes_sent))
    return RowBytes(masters, moments, gradients, max(2 * largest, update), wire, settings.storage == "host")
