"""Searches the layouts of a run on a machine: which fit, and how long a step takes on each. Pure; no tensor is made.

The search varies the settings in SEARCHED and leaves tokens per step as they are, so every layout trains the same
model (FP8 rounds differently). The list is the same every time: equal times are ordered by the settings.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from megachat.config import Config
from megachat.device import DTYPES
from megachat.errors import UserError
from megachat.planning.dimensions import Dimensions
from megachat.planning.hardware import Machine, load_hardware
from megachat.planning.memory import FILLS, memory_of_stages
from megachat.planning.memory_advice import lighter_plans
from megachat.planning.plan import Plan, resolve_plan
from megachat.planning.sizes import resolve_dimensions
from megachat.planning.speeds import Speeds
from megachat.planning.stage_state import estimated_stage_state, stage_state
from megachat.planning.step_time import StepTime, planned_dtype, predict_step, speeds_of
from megachat.settings.training import RECOMPUTE

SEARCHED = (
    *("parallel.tensor", "parallel.pipeline", "parallel.sequence"),
    *("batch.micro_rows", "batch.recompute", "precision.fp8"),
)
MOST_NODES = 64
SURELY = 0.85  # of what is usable: below it, the exact count fits too, although the estimate has smaller Muon buckets
_MICRO_ROWS = (1, 2, 4, 8, 16, 32, 64)  # and what divides a batch that is no power of two


@dataclass(frozen=True)
class Candidate:
    """One layout. bytes: of the fullest rank; of state, exact only in `Layouts.ranked`."""

    config: Config
    plan: Plan
    bytes: int
    step: StepTime

    @property
    def settings(self) -> dict[str, object]:
        """Returns the searched settings."""
        sections = self.config.model_dump()
        return {key: sections[key.split(".")[0]][key.split(".")[1]] for key in SEARCHED}


@dataclass(frozen=True)
class Layouts:
    """The result of a search. ranked: that fit, fastest first, as many as were requested. fitting: how many fit by the
    estimate. too_large: the smallest variant of each tensor x pipeline size of which none fits, the fastest first.
    refused: (layout, reason) of sizes that the model or the batch does not allow.
    """

    ranked: tuple[Candidate, ...]
    fitting: int
    too_large: tuple[Candidate, ...]
    refused: tuple[tuple[str, str], ...]


def free_settings(fixed: set[str]) -> frozenset[str]:
    """Returns the settings that the search varies. fixed: those that the user has set to one value."""
    return frozenset(SEARCHED) - fixed


def search(
    config: Config,
    machine: Machine,
    vocab_size: int,
    free: frozenset[str],
    *,
    speeds: Speeds | None = None,
    on_gpu: bool = True,
    top: int = 10,
) -> Layouts:
    """Returns the layouts of a machine, fastest first. free: of SEARCHED, the settings that may vary.

    speeds: of a probe; default: of the data sheet. on_gpu: False for a probe of a CPU.
    """
    limit, speeds = FILLS * machine.gpu.memory_bytes, speeds or speeds_of(machine, machine.world)
    dims = resolve_dimensions(config, vocab_size)
    fits: list[Candidate] = []
    too_large: list[Candidate] = []
    refused: dict[str, str] = {}
    for tensor, pipeline in _axes(config, machine.world, dims, free):
        name = f"tp={tensor},pp={pipeline}"
        surely_fit: set[tuple] = set()  # variants that need not recompute more, which only costs time
        over_limit: list[tuple[int, Config, Plan]] = []
        fitting_before = len(fits)
        for variant in _variants(config, tensor, pipeline, free, machine):
            key = variant.parallel.sequence, variant.batch.micro_rows, variant.precision.fp8
            if key in surely_fit:
                continue
            try:
                plan = resolve_plan(variant, machine.world, vocab_size)
            except UserError as error:
                refused.setdefault(name, str(error))
                continue
            size = _fullest(variant, plan, machine.gpu.memory_bytes, exact=False, on_gpu=on_gpu)
            if size > limit:
                over_limit.append((size, variant, plan))
                continue
            if size <= SURELY * limit:
                surely_fit.add(key)
            fits.append(Candidate(variant, plan, size, predict_step(variant, plan, speeds)))
        if surely_fit or over_limit:
            refused.pop(name, None)
        if over_limit and len(fits) == fitting_before:
            size, variant, plan = min(over_limit, key=lambda one: one[0])
            too_large.append(Candidate(variant, plan, size, predict_step(variant, plan, speeds)))
    ranked: list[Candidate] = []
    for candidate in sorted(fits, key=_order):
        size = _fullest(candidate.config, candidate.plan, machine.gpu.memory_bytes, on_gpu=on_gpu)
        exact = replace(candidate, bytes=size)
        if exact.bytes <= limit:
            ranked.append(exact)
        else:
            too_large.append(exact)
        if len(ranked) == top:
            break
    return Layouts(tuple(ranked), len(fits), tuple(sorted(too_large, key=_order)), tuple(refused.items()))


def _order(candidate: Candidate) -> tuple:
    layout, config = candidate.plan.layout, candidate.config
    kind = RECOMPUTE.index(config.batch.recompute)
    rest = layout.tensor, layout.pipeline, config.parallel.sequence, kind, -candidate.plan.micro_rows
    return candidate.step.total, *rest, config.precision.fp8


def _axes(config: Config, world: int, dims: Dimensions, free: frozenset[str]) -> Iterator[tuple[int, int]]:
    tensors = range(1, min(world, dims.kv_heads) + 1) if "parallel.tensor" in free else [config.parallel.tensor]
    for tensor in tensors:
        if "parallel.tensor" in free and (world % tensor or dims.heads % tensor or dims.kv_heads % tensor):
            continue
        stages = range(1, dims.depth + 1) if "parallel.pipeline" in free else [config.parallel.pipeline]
        for pipeline in stages:
            if "parallel.pipeline" not in free or world % (tensor * pipeline) == 0:
                yield tensor, pipeline


def _variants(config: Config, tensor: int, pipeline: int, free: frozenset[str], machine: Machine) -> Iterator[Config]:
    """Yields the configs of one tensor and pipeline size; some may be refused."""
    batch, parallel, precision = config.batch, config.parallel, config.precision
    by_rows = batch.tokens is None and batch.micro_rows and batch.accumulation  # the batch depends on both
    rows: list[int | None] = [batch.micro_rows]
    if "batch.micro_rows" in free and not by_rows:
        share = (batch.tokens or 0) // config.model.sequence_len // max(1, machine.world // (tensor * pipeline))
        others = [n for n in range(1, _MICRO_ROWS[-1]) if share and share % n == 0]
        rows = [*sorted({*_MICRO_ROWS, *others, *([batch.micro_rows] if batch.micro_rows else [])})]
    fp8 = [precision.fp8]
    if "precision.fp8" in free and "float8" in machine.gpu.flops and precision.compute in ("auto", "bfloat16"):
        fp8 = ["off", "tensorwise"]
    sequences = [False, *([True] if tensor > 1 else [])] if "parallel.sequence" in free else [parallel.sequence]
    kinds = RECOMPUTE if "batch.recompute" in free else (batch.recompute,)
    axes = [
        parallel.model_copy(update={"tensor": tensor, "pipeline": pipeline, "sequence": sequence})
        for sequence in sequences
    ]
    solved: dict[str, object] = {"accumulation": None} if "batch.micro_rows" in free and not by_rows else {}
    for axis_sizes, micro, recipe, kind in product(axes, rows, fp8, kinds):
        yield config.model_copy(
            update={
                "parallel": axis_sizes,
                "batch": batch.model_copy(update={"micro_rows": micro, "recompute": kind} | solved),
                "precision": precision.model_copy(update={"fp8": recipe}),
            }
        )


def _fullest(
    config: Config, plan: Plan, device_bytes: int | None = None, *, exact: bool = True, on_gpu: bool = True
) -> int:
    dtype, state_of = DTYPES[planned_dtype(config)], stage_state if exact else estimated_stage_state
    stages = memory_of_stages(config, plan, dtype, on_gpu=on_gpu, state_of=state_of, device_bytes=device_bytes)
    return max(stage.total for stage in stages)


def savings(candidate: Candidate, *, on_gpu: bool = True) -> list[tuple[str, int]]:
    """Returns (setting=value, bytes saved) of each change that makes a layout smaller, the largest saving first."""
    changes: dict[str, tuple[str, int]] = {}
    for setting, value, config, plan in lighter_plans(candidate.config, candidate.plan):
        saved = candidate.bytes - _fullest(config, plan, exact=False, on_gpu=on_gpu)
        if saved > changes.get(setting, ("", 0))[1]:
            changes[setting] = f"{setting}={value}", saved
    return sorted(changes.values(), key=lambda change: -change[1])


def scaling(config: Config, machine: Machine, vocab_size: int, free: frozenset[str]) -> list[tuple[Machine, Layouts]]:
    """Returns the best layout on 1, 2, 4 ... 64 nodes."""
    machines = [machine.with_nodes(1 << power) for power in range(MOST_NODES.bit_length())]
    return [(one, search(config, one, vocab_size, free, top=1)) for one in machines]


def least_hardware(config: Config, machine: Machine, vocab_size: int, free: frozenset[str]) -> list[Machine]:
    """Returns machines on which a config fits: the fewest nodes of the same kind, and one node of the smallest other
    GPU with more memory."""
    free |= frozenset(SEARCHED) - {"precision.fp8"}
    machines: list[Machine] = []
    for nodes in (machine.nodes << power for power in range(1, MOST_NODES.bit_length())):
        if search(config, machine.with_nodes(nodes), vocab_size, free, top=1).ranked:
            machines.append(machine.with_nodes(nodes))
            break
    gpus = {gpu.name: gpu for gpu in load_hardware()[0].values() if gpu.memory_bytes > machine.gpu.memory_bytes}
    for gpu in sorted(gpus.values(), key=lambda gpu: (gpu.memory_bytes, gpu.name)):
        if config.precision.fp8 != "off" and "float8" not in gpu.flops:
            continue
        other = Machine(gpu, machine.nodes, machine.gpus_per_node, machine.network)
        if search(config, other, vocab_size, free, top=1).ranked:
            return [*machines, other]
    return machines
