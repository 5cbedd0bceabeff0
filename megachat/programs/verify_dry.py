"""What `megachat verify --dry` does: walks a training step of a layout's ranks on this machine, without the ranks. It
checks that the collectives of all ranks meet, and that bytes, FLOPs and memory are those of the plan.
"""

import gc
import math
import multiprocessing
import os
from collections.abc import Iterable

from megachat.activity import ProgressBar
from megachat.config import Config
from megachat.device import DTYPES
from megachat.errors import UserError, summary
from megachat.job.launch import become_rank
from megachat.planning.call_order import Call, find_mismatch, planned_bytes, planned_flops, sums, walked_bytes
from megachat.planning.layouts import layout_name
from megachat.planning.memory import memory_of_stages
from megachat.planning.plan import Layout, Plan, resolve_without_text
from megachat.planning.row_tables import row_bytes
from megachat.planning.step_time import planned_dtype
from megachat.programs.verify_config import on_layout
from megachat.programs.walk import Walk, walk
from megachat.text import number_ranges, plural, text_table

WALK_TOLERANCE, UNPLANNED_BYTES = 0.01, 2**16  # ids, sums of norms and padding are not planned
PEAK, PRODUCT_FLOPS = "memory: peak", "products"


def coordinates(layout: Layout, rank: int) -> tuple[int, int, int]:
    """Returns (stage, data, tensor) of a world rank: pipeline slowest, tensor fastest."""
    stage, rest = divmod(rank, layout.data * layout.tensor)
    return stage, *divmod(rest, layout.tensor)


def world_rank(layout: Layout, stage: int, data: int, tensor: int) -> int:
    """Returns the world rank at the coordinates."""
    return (stage * layout.data + data) * layout.tensor + tensor


def representative(layout: Layout, rank: int) -> int:
    """Returns the rank that is walked for this one. It is of its stage, and on each axis the first, the second or the
    last rank, because only the ends of an axis are treated in a way of their own.
    """
    stage, data, tensor = coordinates(layout, rank)
    at = [index if index in (0, size - 1) else 1 for index, size in ((data, layout.data), (tensor, layout.tensor))]
    return world_rank(layout, stage, *at)


def transferred(layout: Layout, calls: Iterable[Call], rank: int) -> list[Call]:
    """Returns the calls of a representative as another rank of its kind makes them: in the groups of that rank.

    An all-to-all loses its counts, which differ between ranks.
    """
    stage, data, tensor = coordinates(layout, rank)
    groups = {
        "data": tuple(world_rank(layout, stage, other, tensor) for other in range(layout.data)),
        "tensor": tuple(world_rank(layout, stage, data, other) for other in range(layout.tensor)),
        "pipeline": tuple(world_rank(layout, other, data, tensor) for other in range(layout.pipeline)),
        "stage": tuple(range(world_rank(layout, stage, 0, 0), world_rank(layout, stage + 1, 0, 0))),
        "world": tuple(range(layout.world)),
    }
    moved = []
    for call in calls:
        peer = None if call.peer is None else world_rank(layout, coordinates(layout, call.peer)[0], data, tensor)
        moved.append(call._replace(ranks=groups[call.axis], peer=peer, received=(), sent=()))
    return moved


def _walk_rank(work: tuple[Config, int, int, int]) -> tuple[int, Walk | None, str]:
    config, world, vocab_size, rank = work
    become_rank(rank, world, 1)
    try:
        return rank, walk(config, resolve_without_text(config, world, vocab_size), rank), ""
    except Exception as error:  # of any kind: it is reported with the rank
        return rank, None, summary(error)


def walk_ranks(config: Config, plan: Plan, ranks: list[int]) -> dict[int, Walk]:
    """Walks each rank in a process of its own, as many at a time as there are cores. Raises UserError."""
    walks: dict[int, Walk] = {}
    work = [(config, plan.layout.world, plan.dims.vocab_size, rank) for rank in ranks]
    gc.freeze()  # else each process goes through all of torch's objects again
    try:
        with (
            multiprocessing.get_context("fork").Pool(len(os.sched_getaffinity(0)), maxtasksperchild=1) as pool,
            ProgressBar(f"walking {plural(len(ranks), 'rank')} of {plan.layout.world}", len(ranks), "") as bar,
        ):
            for rank, result, error in pool.imap_unordered(_walk_rank, work, chunksize=1):
                if result is None:
                    raise UserError(f"rank {rank} of {layout_name(vars(plan.layout))} failed in its step: {error}")
                walks[rank] = result
                bar.update(1)
    finally:
        gc.unfreeze()
    return walks


def setup(config: Config, layout: dict[str, int], vocab_size: int) -> tuple[Config, Plan]:
    """Returns the config and the plan of a layout, as of parse_layout. Raises UserError if it does not fit."""
    config = on_layout(config, layout).changed("precision", compute=planned_dtype(config))
    return config, resolve_without_text(config, math.prod(layout.values()), vocab_size)


def verify_dry(config: Config, layout: dict[str, int], vocab_size: int, *, every_rank: bool) -> dict:
    """Walks one layout, prints the verdict, and returns its certificate. layout: as of parse_layout.

    every_rank: else the ranks of representative(). Raises UserError if the layout does not fit.
    """
    config, plan = setup(config, layout, vocab_size)
    ranks = range(plan.layout.world)
    print(
        f"{layout_name(layout)}: {plural(len(ranks), 'rank')}, depth {plan.dims.depth}, "
        f"{plan.parameters['total']:,} parameters, {plural(plan.micro_rows, 'row')} x "
        f"{plural(plan.accumulation, 'micro-batch')} per data rank, {config.precision.compute}",
        flush=True,
    )
    kind = {rank: rank if every_rank else representative(plan.layout, rank) for rank in ranks}
    walks = walk_ranks(config, plan, sorted(set(kind.values())))
    calls = {
        rank: walks[rank].calls if every_rank else transferred(plan.layout, walks[kind[rank]].calls, rank)
        for rank in ranks
    }
    rows = [row for stage in range(plan.layout.pipeline) for row in _compare_stage(config, plan, stage, walks)]
    problems = list(filter(None, (find_mismatch(calls), *map(problem, rows))))
    _print(plan, walks, rows, problems)
    return {
        "layout": layout,
        "passed": not problems,
        "problems": problems,
        "walked": sorted(walks),
        "compared": rows,
        "calls": {
            rank: [[axis, kind, *total] for (axis, kind), total in sums(walks[rank].calls).items()] for rank in walks
        },
    }


def planned_memory(config: Config, plan: Plan, stage: int) -> dict[str, float]:
    """Returns the bytes of the stage's fullest rank on a GPU: what lasts, gradients, activations, and all at a time.

    The gradients of rows of sparse tables are left out: they depend on how often ids repeat.
    """
    dtype = DTYPES[planned_dtype(config)]
    memory = memory_of_stages(config, plan, dtype)[stage]
    return {
        "state": memory.state + memory.host,
        "gradients": memory.gradients - row_bytes(config, plan, stage, dtype).gradients,
        "activations": memory.activations,
        "peak": memory.total + memory.host,
    }


def planned_of_stage(config: Config, plan: Plan, stage: int) -> dict[str, float]:
    """Returns what the planner counts for a rank of the stage: bytes of its collectives in a step by purpose, FLOPs of
    its products, and bytes of its memory.
    """
    planned = planned_bytes(config, plan, stage) | {PRODUCT_FLOPS: planned_flops(config, plan, stage)}
    return planned | {f"memory: {kind}": size for kind, size in planned_memory(config, plan, stage).items()}


def _compare_stage(config: Config, plan: Plan, stage: int, walks: dict[int, Walk]) -> list[dict]:
    """Returns a row for everything that is planned: what is allowed, the least and most of the stage's ranks, and the
    farthest rank.
    """
    walked = {rank: _walked(each) for rank, each in walks.items() if coordinates(plan.layout, rank)[0] == stage}
    rows = []
    for what, planned in planned_of_stage(config, plan, stage).items():
        each = {rank: values[what] for rank, values in walked.items()}
        low, high = allowed(what, planned)
        farthest = max(each, key=lambda rank: max(low - each[rank], each[rank] - high))
        ends = {"least": min(each.values()), "most": max(each.values())}
        row = {"stage": stage, "what": what, "planned": planned, "allowed": (low, high)}
        rows.append(row | ends | {"rank": farthest})
    return rows


def allowed(what: str, planned: float) -> tuple[float, float]:
    """Returns the least and the most that passes.

    The peak may be below the plan: with one micro-batch, gradients and activations never meet.
    """
    more = WALK_TOLERANCE * planned + UNPLANNED_BYTES
    return 0.0 if what == PEAK else planned - more, planned + more


def problem(row: dict) -> str | None:
    """Returns a sentence on a row of _compare_stage that is not as planned, else None."""
    low, high = allowed(row["what"], row["planned"])
    if low <= row["least"] and row["most"] <= high:
        return None
    walked = max(row["least"], row["most"], key=lambda value: max(low - value, value - high))
    return (
        f"stage {row['stage']}, {row['what']}: planned {_amount(row, row['planned'])}, but rank {row['rank']} has "
        f"{_amount(row, walked)}"
    )


def _amount(row: dict, value: float) -> str:
    scale, unit = (1e12, "TFLOPs") if row["what"] == PRODUCT_FLOPS else (1e9, "GB")
    return f"{value / scale:.3f} {unit}"


def _walked(result: Walk) -> dict[str, int]:
    memory = result.memory
    state = sum(memory[kind] for kind in ("weights", "masters", "moments"))
    sizes = {"state": state} | {kind: memory[kind] for kind in ("gradients", "activations", "peak")}
    walked = walked_bytes(result.calls) | {PRODUCT_FLOPS: result.product_flops}
    return walked | {f"memory: {kind}": size for kind, size in sizes.items()}


def _print(plan: Plan, walks: dict[int, Walk], rows: list[dict], problems: list[str]) -> None:
    table = [("stage", "per rank and step", "planned", "walked", "allowed")]
    for row in rows:
        if not row["planned"] and not row["most"]:
            continue
        walked = dict.fromkeys(_amount(row, row[end]) for end in ("least", "most"))
        within = f"{'at most +' if row['what'] == PEAK else 'within '}{100 * WALK_TOLERANCE:g} %"
        table.append((str(row["stage"]), row["what"], _amount(row, row["planned"]), " to ".join(walked), within))
    print("\n".join("  " + line for line in text_table(table)))
    for each in problems:
        print(f"  DIFFERENT: {each}")
    if not problems:
        counts, world = number_ranges(sorted({len(result.calls) for result in walks.values()})), plan.layout.world
        print(f"  passed: {counts} collectives per rank; on all {world} ranks each meets its partners in order")
