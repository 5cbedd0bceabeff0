"""What `megachat verify --dry` does: walks a training step of a layout's ranks on this machine, without the ranks, and
checks that the collectives of all ranks meet and that bytes, FLOPs and memory are those of the plan.
"""

import multiprocessing
import os
from collections.abc import Iterable

import torch

from megachat.activity import Progress
from megachat.config import Config, config_from_values
from megachat.errors import UserError, summary
from megachat.job.launch import become_rank
from megachat.planning.call_order import Call, find_mismatch, planned_bytes, planned_flops, sums, walked_bytes
from megachat.planning.dimensions import passed_tensors
from megachat.planning.layouts import layout_name
from megachat.planning.memory import memory_of_stages
from megachat.planning.plan import Layout, Plan, resolve_without_text
from megachat.planning.row_tables import row_bytes
from megachat.planning.stage_state import stage_parameters
from megachat.planning.step_time import planned_dtype
from megachat.programs.walk import Walk, walk
from megachat.text import text_table

TOLERANCE, UNPLANNED_BYTES = 0.01, 2**16  # ids, sums of norms and padding are not planned
PEAK = "memory: peak"


def coordinates(layout: Layout, rank: int) -> tuple[int, int, int]:
    """Returns (stage, data, tensor) of a world rank: pipeline slowest, tensor fastest."""
    stage, rest = divmod(rank, layout.data * layout.tensor)
    return stage, *divmod(rest, layout.tensor)


def world_rank(layout: Layout, stage: int, data: int, tensor: int) -> int:
    """Returns the world rank at the coordinates."""
    return (stage * layout.data + data) * layout.tensor + tensor


def representative(layout: Layout, rank: int) -> int:
    """Returns the rank that is walked for this one: of its stage, and on each axis the first, the second or the last,
    because only ends of an axis are treated in a way of their own.
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
    activity = f"walking {len(ranks)} of {plan.layout.world} ranks"
    with (
        multiprocessing.get_context("fork").Pool(len(os.sched_getaffinity(0)), maxtasksperchild=1) as pool,
        Progress(activity, len(ranks), "") as bar,
    ):
        for rank, result, problem in pool.imap_unordered(_walk_rank, work, chunksize=1):
            if result is None:
                raise UserError(f"rank {rank} of {layout_name(vars(plan.layout))} failed in its step: {problem}")
            walks[rank] = result
            bar.update(1)
    return walks


def verify_dry(config: Config, layout: dict[str, int], vocab_size: int, *, every_rank: bool) -> dict:
    """Walks one layout, prints the verdict, and returns its certificate. layout: as of parse_layout.

    every_rank: else the ranks of representative(). Raises UserError if the layout does not fit.
    """
    values = config.model_dump()
    values["parallel"] |= {"tensor": layout["tensor"], "pipeline": layout["pipeline"]}
    values["precision"]["compute"] = planned_dtype(config)
    config = config_from_values(values, "verify --dry")
    ranks = layout["data"] * layout["tensor"] * layout["pipeline"]
    plan = resolve_without_text(config, ranks, vocab_size)
    print(
        f"{layout_name(layout)}: {ranks} ranks, depth {plan.dims.depth}, {plan.parameters['total']:,} parameters, "
        f"{plan.micro_rows} rows x {plan.accumulation} micro-batches per data rank, {values['precision']['compute']}",
        flush=True,
    )
    kind = {rank: rank if every_rank else representative(plan.layout, rank) for rank in range(ranks)}
    walks = walk_ranks(config, plan, sorted(set(kind.values())))
    calls = {
        rank: walks[rank].calls if every_rank else transferred(plan.layout, walks[kind[rank]].calls, rank)
        for rank in range(ranks)
    }
    mismatch = find_mismatch(calls)
    rows, problems = [], [mismatch] if mismatch else []
    for stage in range(plan.layout.pipeline):
        stage_rows, stage_problems = _compare_stage(config, plan, stage, walks)
        rows += stage_rows
        problems += stage_problems
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
    dtype = getattr(torch, planned_dtype(config))
    memory = memory_of_stages(config, plan, dtype)[stage]
    parameters = stage_parameters(plan.dims, plan.stages[stage], dtype) if plan.dims.ngram else []
    return {
        "state": memory.state + memory.host,
        "gradients": memory.gradients - row_bytes(config, plan, parameters, dtype).gradients,
        "activations": memory.activations,
        "peak": memory.total + memory.host,
    }


def received_bytes(config: Config, plan: Plan, stage: int) -> float:
    """Returns the bytes of the streams that a stage has received for its micro-batches in flight."""
    first, dims, dtype = plan.stages[stage][0], plan.dims, planned_dtype(config)
    streams = passed_tensors(dims, first) if first else 0
    tokens = plan.micro_rows * dims.sequence_len // (plan.layout.tensor if config.parallel.sequence else 1)
    in_flight = min(plan.layout.pipeline - stage, plan.accumulation)
    return float(in_flight * streams * tokens * dims.width * getattr(torch, dtype).itemsize)


def _compare_stage(config: Config, plan: Plan, stage: int, walks: dict[int, Walk]) -> tuple[list[dict], list[str]]:
    """Returns rows of what was planned and walked on the stage's ranks, and a sentence on each that differs."""
    here = {rank: result for rank, result in walks.items() if coordinates(plan.layout, rank)[0] == stage}
    planned = planned_bytes(config, plan, stage) | {"products": planned_flops(config, plan, stage)}
    planned |= {f"memory: {kind}": size for kind, size in planned_memory(config, plan, stage).items()}
    walked = {rank: _walked(result) for rank, result in here.items()}
    # DeepSpeed holds what a stage received beside its copies: the plan has that in its workspace, which is an estimate
    more = {"memory: activations": received_bytes(config, plan, stage), PEAK: TOLERANCE * planned[PEAK]}
    rows, problems = [], []
    for name, expected in planned.items():
        each = {rank: values[name] for rank, values in walked.items()}
        low, high = min(each.values()), max(each.values())
        rows.append({"stage": stage, "what": name, "planned": expected, "least": low, "most": high})
        allowed = TOLERANCE * expected + UNPLANNED_BYTES
        # the peak may be below the plan: gradients and activations of one micro-batch never meet
        below = 0.0 if name == PEAK else expected - low
        if below > allowed or high - expected > allowed + more.get(name, 0.0):
            rank = max(each, key=lambda rank: abs(each[rank] - expected))
            problems.append(f"stage {stage}, {name}: planned {expected:.6g}, but rank {rank} has {each[rank]:.6g}")
    return rows, problems


def _walked(result: Walk) -> dict[str, int]:
    memory = result.memory
    state = sum(memory[kind] for kind in ("weights", "masters", "moments"))
    sizes = {"state": state} | {kind: memory[kind] for kind in ("gradients", "activations", "peak")}
    walked = walked_bytes(result.calls) | {"products": result.product_flops}
    return walked | {f"memory: {kind}": size for kind, size in sizes.items()}


def _print(plan: Plan, walks: dict[int, Walk], rows: list[dict], problems: list[str]) -> None:
    table = [("stage", "per rank and step", "planned", "walked")]
    for row in rows:
        scale, name = (1e12, "TFLOPs") if row["what"] == "products" else (1e9, "GB")
        walked = sorted({f"{row[key] / scale:.3f}" for key in ("least", "most")}, key=float)
        table.append((str(row["stage"]), row["what"], f"{row['planned'] / scale:.3f} {name}", " to ".join(walked)))
    print("\n".join("  " + line for line in text_table(table)))
    count = {rank: len(result.calls) for rank, result in walks.items()}
    for problem in problems:
        print(f"  DIFFERENT: {problem}")
    if not problems:
        print(
            f"  passed: {min(count.values())} to {max(count.values())} collectives per rank; on all "
            f"{plan.layout.world} ranks each meets its partners in order"
        )
