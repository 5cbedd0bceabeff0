"""Predicts the seconds of a training step by part, and the hours of a run, from config, plan and machine. Pure; no
torch, no measurement: a prediction is no result.
"""

import math
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

from megachat.config import Config
from megachat.planning.dimensions import passed_tensors, up_to_multiple
from megachat.planning.hardware import Machine
from megachat.planning.plan import Plan, stream_tokens
from megachat.planning.probe import Probe
from megachat.planning.speeds import SheetSpeeds, Speeds
from megachat.planning.step_work import ITEMSIZE, Gemm, Work, muon_dtype, optimizer_work, stage_matrices, stage_work

# In the order in which they are shown. They are exclusive: hidden communication is in StepTime.hidden.
PARTS = (
    "matrix products",
    "attention",
    "elementwise",
    "head and loss",
    "optimizer",
    "data axis",
    "tensor axis",
    "pipeline axis",
    "pipeline bubble",
    "host",
)
UNTIMED_STEPS = 11  # 0 to 10, as nanochat: the speedrun's clock starts after them
FORWARD_SHARE = 1 / 3  # of a micro-batch's time
# Bytes per element of the optimizer's elementwise work: momentum, directions and decay of Muon's shard; the moments and
# masters of AdamW's share; sums and copies of AdamW's whole gradients; squares of all reduced gradients.
MUON_BYTES, ADAMW_BYTES, REDUCED_BYTES, NORM_BYTES = 60, 36, 16, 4
BLOCKS_PER_BUCKET = 4  # typical of the Muon partition: the last bucket's collective is not hidden
EVALUATION_SHARE = 1 / 3  # of a training step's time per token: the forward pass
SAVE_BYTES_PER_SEC = 1e9  # of a rank that writes a checkpoint to storage; assumed


@dataclass(frozen=True)
class Rules:
    """How an implementation differs in what takes time.

    logit_bytes: that the loss moves per logit. matrix_wire: bytes per element of matrices in the reduction and in the
    gather. table_reduce: bytes per element of tables (by their itemsize) that are reduced, as an all-reduce or a
    reduce-scatter. overlapped: whether the data axis communicates during the backward pass and the next forward.
    stacked: whether matrices of a shape are stacked and padded to a multiple of the ranks.
    """

    name: str
    logit_bytes: float
    matrix_wire: tuple[int, int] | None
    table_wire: int | None
    table_all_reduce: bool
    overlapped: bool
    stacked: bool


MEGACHAT = Rules("megachat", 92, None, 4, True, True, False)
# nanochat 92d63d4: float32 gradients and weights of matrices, stacked by shape and padded to the ranks; tables in their
# dtype, reduced and gathered within the optimizer step. Its loss is compiled.
NANOCHAT = Rules("nanochat", 24, (4, 4), None, False, False, True)


class ProductTime(NamedTuple):
    """The products of one shape in a step: on the rank with most work."""

    product: Gemm
    seconds: float


class StepTime(NamedTuple):
    """A predicted step. parts: seconds by name, in the order of PARTS; they add up to total. hidden: communication
    that computing hides, which is not in parts. error: relative, of the model. products: by shape and dtype.
    """

    parts: dict[str, float]
    hidden: dict[str, float]
    total: float
    error: float
    products: tuple[ProductTime, ...]


class RunTime(NamedTuple):
    """Predicted hours. clock_hours: by the speedrun's rule, steps after step 10 only. wall_hours: with the first
    steps, validations and saves, roughly; without start-up, compiling, samples and CORE.
    """

    step: StepTime
    clock_hours: float
    wall_hours: float


class _StageTime(NamedTuple):
    """Seconds of a stage's micro-batch by part."""

    parts: dict[str, float]
    products: list[ProductTime]
    total: float


def speeds_of(machine: Machine | Probe | Speeds, world: int) -> Speeds:
    """Returns the speeds of `world` ranks: by the data sheet of a machine, or as a probe measured them."""
    if isinstance(machine, Machine):
        return SheetSpeeds(machine)
    return machine.speeds(world) if isinstance(machine, Probe) else machine


def planned_dtype(config: Config) -> str:
    """Returns the compute dtype on a GPU: bfloat16 unless configured."""
    return "bfloat16" if config.precision.compute == "auto" else config.precision.compute


def predict_step(
    config: Config, plan: Plan, machine: Machine | Probe | Speeds, *, dtype: str | None = None, rules: Rules = MEGACHAT
) -> StepTime:
    """Returns the predicted time of a step on the busiest ranks. dtype: of activations; default as on a GPU.

    The micro-batches pass the stages in 1F1B order: the slowest stage works on all of them, and the bubble is what the
    others add at both ends (arXiv 2006.09503). Muon's gradients travel during the last backward pass and its weights
    during the next forward pass, as far as these last; AdamW's do not overlap.
    """
    speeds, dtype = speeds_of(machine, plan.layout.world), dtype or planned_dtype(config)
    stages = range(plan.layout.pipeline)
    times = [_stage_time(config, plan, stage, dtype, speeds, rules) for stage in stages]
    slowest = max(stages, key=lambda stage: times[stage].total)
    batches = plan.accumulation
    parts = dict.fromkeys(PARTS, 0.0)
    for name, seconds in times[slowest].parts.items():
        parts[name] = batches * seconds
    parts["pipeline bubble"] = sum(time.total for time in times) - times[slowest].total
    ends = [_end_of_step(plan, stage, times[stage].total, speeds, dtype, rules) for stage in stages]
    exposed, hidden = max(ends, key=lambda end: sum(end[0].values()))
    for name, seconds in exposed.items():
        parts[name] += seconds
    products = tuple(
        ProductTime(product._replace(count=product.count * batches), seconds * batches)
        for product, seconds in times[slowest].products
    )
    return StepTime(parts, hidden, sum(parts.values()), speeds.error, products)


def predict_run(
    config: Config,
    plan: Plan,
    machine: Machine | Probe | Speeds,
    *,
    dtype: str | None = None,
    rules: Rules = MEGACHAT,
    checkpoint_bytes: float = 0.0,
) -> RunTime:
    """Returns the predicted hours to the horizon. checkpoint_bytes: that one rank writes, for the wall clock."""
    step = predict_step(config, plan, machine, dtype=dtype, rules=rules)
    timed = max(0, plan.stop_step - UNTIMED_STEPS)
    every = config.evaluate.every
    validations = (1 + plan.stop_step // every if every else 0) + 1
    per_token = EVALUATION_SHARE * step.total / plan.tokens_per_step
    evaluating = validations * plan.evaluation_rows * plan.dims.sequence_len * per_token
    saves = (plan.stop_step // config.checkpoint.every if config.checkpoint.every else 0) + 1
    saving = saves * checkpoint_bytes / SAVE_BYTES_PER_SEC * (0.05 if config.checkpoint.background else 1.0)
    wall = plan.stop_step * step.total + evaluating + saving
    return RunTime(step, timed * step.total / 3600, wall / 3600)


def _stage_time(config: Config, plan: Plan, stage: int, dtype: str, speeds: Speeds, rules: Rules) -> _StageTime:
    body, head = stage_work(config, plan, stage, dtype)
    tensor_bytes = plan.micro_tokens * plan.dims.width * ITEMSIZE[dtype]
    products = _product_times(body, speeds)
    parts = {
        "matrix products": sum(time.seconds for time in products),
        "attention": sum(speeds.attention(attention) for attention in body.attention),
        "elementwise": speeds.moved(body.moved, tensor_bytes, body.kernels) + speeds.streamed(body.streamed),
        "head and loss": 0.0,
        "tensor axis": 0.0,
        "data axis": 0.0,
        "pipeline axis": _pipeline_sec(config, plan, stage, dtype, speeds),
    }
    for kind, size, axis, count in (*body.collectives, *head.collectives):
        parts["tensor axis" if axis == "tensor" else "data axis"] += count * _axis_sec(plan, speeds, kind, size, axis)
    if head.logits:
        head_products = _product_times(head, speeds)
        parts["head and loss"] = sum(time.seconds for time in head_products)
        parts["head and loss"] += speeds.moved(head.moved, tensor_bytes, head.kernels) + speeds.streamed(head.streamed)
        parts["head and loss"] += speeds.logits(head.logits, plan.micro_tokens, rules.logit_bytes)
        products += head_products
    parts = {name: speeds.factor(name) * seconds for name, seconds in parts.items()}
    busy = sum(parts.values())
    parts["host"] = max(0.0, speeds.host(body.kernels + head.kernels, 0) - busy)
    return _StageTime(parts, products, busy + parts["host"])


def _product_times(work: Work, speeds: Speeds) -> list[ProductTime]:
    shapes: dict[tuple, float] = {}
    for product in work.products:
        shapes[product[:4]] = shapes.get(product[:4], 0) + product.count
    products = [Gemm._make((*shape, count)) for shape, count in shapes.items()]
    return [ProductTime(product, speeds.product(product)) for product in products]


def _axis_sec(plan: Plan, speeds: Speeds, kind, size: float, axis: str) -> float:
    """Returns the seconds of a collective over an axis. World ranks: pipeline slowest, then data, tensor fastest."""
    layout = plan.layout
    ranks, stride = {
        "tensor": (layout.tensor, 1),
        "data": (layout.data, layout.tensor),
        "stage": (layout.data * layout.tensor, 1),
        "world": (layout.world, 1),
    }[axis]
    return speeds.collective(kind, size, ranks, stride) if ranks > 1 else 0.0


def _pipeline_sec(config: Config, plan: Plan, stage: int, dtype: str, speeds: Speeds) -> float:
    """Returns the seconds in which a stage sends and receives the stream and its gradient in a micro-batch."""
    layout, dims = plan.layout, plan.dims
    if layout.pipeline == 1:
        return 0.0
    size = stream_tokens(config, plan) * dims.width * ITEMSIZE[dtype]
    first, last = plan.stages[stage]
    seconds = 0.0
    for layer, earlier in ((first, stage - 1), (last, stage)):
        if 0 < layer < dims.depth + 2:
            stride = layout.data * layout.tensor
            seconds += 2 * passed_tensors(dims, layer) * speeds.collective("send", size, 2, stride, earlier * stride)
    return seconds


def stacked_padding(plan: Plan, stage: int) -> float:
    """Returns the elements of stacks of equal matrices, padded to a multiple of the data ranks, per element."""
    shapes = stage_matrices(plan.dims, *plan.stages[stage])
    counts = Counter(shapes).items()
    padded = sum(up_to_multiple(count, plan.layout.data) * math.prod(shape) for shape, count in counts)
    return padded / sum(map(math.prod, shapes))


def _end_of_step(
    plan: Plan, stage: int, micro_sec: float, speeds: Speeds, dtype: str, rules: Rules
) -> tuple[dict[str, float], dict[str, float]]:
    """Returns the exposed seconds of a stage's optimizer step by part, and the hidden ones. micro_sec: of a
    micro-batch."""
    work = optimizer_work(plan, stage, dtype)
    size = ITEMSIZE[muon_dtype(dtype)]
    gradient_bytes, weight_bytes = rules.matrix_wire or (size, size)
    padding = stacked_padding(plan, stage) if rules.stacked else 1.0
    reduce = _axis_sec(plan, speeds, "reduce_scatter", gradient_bytes * work.reduced * padding, "data")
    gather = _axis_sec(plan, speeds, "all_gather", weight_bytes * work.reduced * padding, "data")
    buckets = max(1, plan.dims.depth // plan.layout.pipeline // BLOCKS_PER_BUCKET)
    hides = speeds.overlap if rules.overlapped else 0.0
    hidden_reduce = min(reduce * (1 - 1 / buckets), micro_sec * (1 - FORWARD_SHARE)) * hides
    hidden_gather = min(gather * (1 - 1 / buckets), micro_sec * FORWARD_SHARE) * hides
    tables = 0.0
    for itemsize, elements in work.adamw.items():
        kind = "all_reduce" if rules.table_all_reduce else "reduce_scatter"
        tables += _axis_sec(plan, speeds, kind, (rules.table_wire or itemsize) * elements, "data")
        tables += _axis_sec(plan, speeds, "all_gather", itemsize * elements, "data")
    exchange = work.exchanged and _axis_sec(plan, speeds, "all_to_all", work.exchanged, "stage")
    adamw = sum(work.adamw.values())
    optimizer = sum(count * speeds.polar(rows, columns, muon_dtype(dtype)) for rows, columns, count in work.matrices)
    optimizer += speeds.streamed(
        (MUON_BYTES + NORM_BYTES) * work.shard
        + (ADAMW_BYTES + NORM_BYTES) * adamw / plan.layout.data
        + REDUCED_BYTES * adamw
    )
    norm = _axis_sec(plan, speeds, "all_reduce", 16, "world")
    exposed = {
        "optimizer": speeds.factor("optimizer") * optimizer,
        "data axis": reduce + gather - hidden_reduce - hidden_gather + tables + exchange + norm,
        "host": speeds.host(0, 1),
    }
    return exposed, {"data axis, reduce": hidden_reduce, "data axis, gather": hidden_gather}
