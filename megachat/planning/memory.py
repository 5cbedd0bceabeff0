"""Bytes that one rank holds while it trains, by what they are for, from the plan alone: no tensor is made.

Weights, masters, optimizer state and gradients are exact. Activations are what eager torch keeps for the backward pass, with an attention kernel
that keeps no scores and norms that keep their input; workspace is an estimate of what exists beside them at the fullest moment.
"""

import math
from dataclasses import dataclass

import torch

from megachat.config import Config
from megachat.errors import UserError
from megachat.kernels.cross_entropy import CHUNK_BYTES, GPU_CHUNK_BYTES
from megachat.model.gpt import ModelOptions, build_layers
from megachat.model.parameters import placed_parameters
from megachat.optim.groups import GROUPS, assign
from megachat.optim.matrix import Matrix
from megachat.optim.partition_plan import PartitionPlan, make_plan
from megachat.parallel.tensor import cut_shape
from megachat.place import place_of
from megachat.planning.dimensions import MLP_RATIO, Dimensions, fits_fp8, linear_shapes
from megachat.planning.plan import Plan, resolve
from megachat.planning.zero import zero1_share

FILLS = 0.92  # of a device's memory; the rest is CUDA's and NCCL's own, and what lies between tensors
_NEWTON_SCHULZ_BYTES = 24  # an element of the matrix at work: float32 copies, and the factors of the iteration


@dataclass(frozen=True)
class Memory:
    """Bytes of the fullest rank of a pipeline stage."""

    stage: int
    weights: int
    masters: int
    moments: int
    gradients: int
    activations: int
    workspace: int

    @property
    def state(self) -> int:
        """What is held whatever the batch: weights, masters, moments."""
        return self.weights + self.masters + self.moments

    @property
    def total(self) -> int:
        """Everything."""
        return self.state + self.gradients + self.activations + self.workspace


def memory_of_stages(config: Config, plan: Plan, dtype: torch.dtype, *, on_gpu: bool = True) -> list[Memory]:
    """Of the fullest rank of each pipeline stage. dtype: of activations. on_gpu: the head works in larger pieces there than on a CPU."""
    options = ModelOptions(compute_dtype=dtype)
    with torch.device("meta"):
        layers = build_layers(plan.dims, options)
    return [
        _stage_memory(config, plan, options, stage, layers[first:last], on_gpu)
        for stage, (first, last) in enumerate(plan.stages)
    ]


def _stage_memory(config: Config, plan: Plan, options: ModelOptions, stage: int, layers, on_gpu: bool) -> Memory:
    data, tensor, dtype = plan.layout.data, plan.layout.tensor, options.compute_dtype
    parameters = placed_parameters(layers)
    groups = assign([place_of(parameter) for parameter in parameters])
    held = {"weights": 0, "masters": 0, "moments": 0, "gradients": 0}
    largest = {"tensor": 0, "group": 0}
    for group in GROUPS:
        own = [parameter for parameter in parameters if groups[place_of(parameter).name] is group]
        if group.optimizer != "adamw" or not own:
            continue
        # the first rank of a tensor axis that does not divide the vocabulary has more of it than the others
        sizes = [
            math.prod(cut_shape(tuple(parameter.shape), place_of(parameter).cut, tensor, 0)[0]) for parameter in own
        ]
        share = zero1_share(sum(sizes), data)
        held["weights"] += own[0].dtype.itemsize * data * share
        held["masters"] += 4 * share
        held["moments"] += 8 * share
        held["gradients"] += 4 * sum(sizes)
        largest = {"tensor": max(largest["tensor"], *sizes), "group": max(largest["group"], share)}
    places = dict.fromkeys(
        place_of(parameter) for parameter in parameters if groups[place_of(parameter).name].optimizer == "muon"
    )
    matrices = [Matrix(where.name, where.whole, where.block, 1.0, where.cut) for where in places]
    partition = make_plan(matrices, data, tensor=tensor)
    shards = sum(bucket.shard for bucket in partition.buckets)
    narrow = dtype == torch.bfloat16
    held["weights"] += (2 if narrow else 4) * data * shards
    held["masters"] += 4 * shards if narrow else 0  # float32 weights are their own masters
    held["moments"] += max(
        sum(partition.state_bytes(place)[kind] for kind in ("momentum", "second_moment"))
        for place in range(partition.grid_size)
    )
    held["gradients"] += 4 * data * shards
    activations = stage_activations(config, plan, stage, dtype)
    forward = _forward_workspace(config, plan, stage, dtype, on_gpu) + _pipeline_buffers(config, plan, stage, dtype)
    forward += 4 * largest["tensor"]  # DeepSpeed's buffer for reducing
    if narrow and data > 1:  # gradients of two buckets on the wire, as sent and as received
        forward += 2 * 2 * 2 * data * max((bucket.shard for bucket in partition.buckets), default=0)
    update = _update_workspace(partition, largest["group"], narrow)
    return Memory(stage, **held, activations=activations, workspace=max(forward, update - activations))


def kept_bytes_per_block(
    dims: Dimensions,
    block: int,
    tokens: int,
    *,
    itemsize: int = 2,
    tensor: int = 1,
    sequence=False,
    fp8: str = "off",
    recompute: str = "none",
) -> int:
    """Bytes that a block keeps of a micro-batch of `tokens` tokens for its backward pass, its input included, on one rank.

    itemsize: of the compute dtype. tensor, sequence: how the tensor axis cuts the block. fp8, recompute: as precision.fp8, batch.recompute.
    """
    own = tokens // tensor if sequence else tokens  # of the stream
    width, heads, kv_heads = dims.width, dims.heads // tensor, dims.kv_heads // tensor
    if recompute == "block":
        return own * width * itemsize
    inner, kv_inner = heads * dims.head_size, kv_heads * dims.head_size
    values = 3 * own * width  # the stream as it came, after the residual mix, and after attention
    values += tokens * (
        3 * inner + 3 * kv_inner
    )  # queries and keys before and after their norms, values, attention's result
    if dims.has_value_embedding(block):
        values += tokens * (kv_inner + 2 * kv_heads)
    kept = values * itemsize + 4 * (
        own + tokens * (2 * heads + kv_heads)
    )  # the factor of every norm, and attention's sums
    shapes = linear_shapes(dims, tensor)
    rounded = {name for name, shape in shapes.items() if fp8 != "off" and fits_fp8(*shape, fp8)}
    together = [("attn.c_q", "attn.c_k", "attn.c_v"), ("attn.c_proj",)]
    if recompute == "none":  # the MLP's: its norm's factor, what is squared, and what its linears take
        kept += 4 * own + tokens * MLP_RATIO * width // tensor * itemsize
        together += [("mlp.c_fc",), ("mlp.c_proj",)]
    for names in together:
        columns = shapes[names[0]][1]
        if names != ("attn.c_proj",) and not rounded.issuperset(names):
            kept += tokens * columns * itemsize  # one tensor for all; that of attn.c_proj is attention's result
        for name in rounded.intersection(names):  # a byte for each number of input and weight
            kept += tokens * columns + math.prod(shapes[name])
    return kept


def stage_activations(config: Config, plan: Plan, stage: int, dtype: torch.dtype) -> int:
    """Bytes that a stage keeps between forward and backward passes of all micro-batches that are under way in it (1F1B, arXiv 2006.09503)."""
    dims, layout, (first, last) = plan.dims, plan.layout, plan.stages[stage]
    tokens, size = plan.micro_rows * dims.sequence_len, dtype.itemsize
    sequence, table = config.parallel.sequence, dims.padded_vocab * dims.width // layout.tensor
    own = tokens // layout.tensor if sequence else tokens
    how = {"itemsize": size, "tensor": layout.tensor, "sequence": sequence, "fp8": config.precision.fp8}
    how |= {"recompute": config.batch.recompute}
    kept = sum(
        kept_bytes_per_block(dims, layer - 1, tokens, **how) for layer in range(first, last) if 0 < layer <= dims.depth
    )
    if dtype == torch.float16:  # weights are float32 and cast at each use
        kinds = {"none": ("attn", "mlp"), "selective": ("attn",), "block": ()}[config.batch.recompute]
        matrices = sum(
            math.prod(shape) for name, shape in linear_shapes(dims, layout.tensor).items() if name.startswith(kinds)
        )
        kept += size * matrices * (min(last, dims.depth + 1) - max(first, 1))
    under_way = min(layout.pipeline - stage, plan.accumulation)
    if first == 0:
        kept += 2 * tokens * dims.width * size + 4 * tokens  # the rows of the table and their norm
    else:
        kept += (_passing(dims, first) - 1) * own * dims.width * size  # x is counted as the first block's input
    if last == dims.depth + 2:
        kept += (
            own + 2 * tokens
        ) * dims.width * size + 4 * table  # the norm's input and result, and the gradients of result and table
    else:
        kept += own * dims.width * size  # what the last block gives to the next stage
    return under_way * kept


def _passing(dims: Dimensions, layer: int) -> int:
    """Tensors as large as the stream that go into a layer from another stage: x, x0 unless only the head comes, x_backout after the middle."""
    return 1 + (layer <= dims.depth) + (layer - 1 > dims.depth // 2)


def _pipeline_buffers(config: Config, plan: Plan, stage: int, dtype: torch.dtype) -> int:
    """DeepSpeed's: what was received for each micro-batch under way and is being received, and gradients on both sides."""
    dims, layout, (first, last) = plan.dims, plan.layout, plan.stages[stage]
    tokens = plan.micro_rows * dims.sequence_len // (layout.tensor if config.parallel.sequence else 1)
    taken = (2 + max(2, min(layout.pipeline - stage, plan.accumulation))) * _passing(dims, first) if first else 0
    given = _passing(dims, last) if last < dims.depth + 2 else 0
    return (taken + given) * tokens * dims.width * dtype.itemsize


def _forward_workspace(config: Config, plan: Plan, stage: int, dtype: torch.dtype, on_gpu: bool) -> int:
    """The larger of what the head needs for its pieces of logits, and what a block's backward pass has beside its activations."""
    dims, tensor, size = plan.dims, plan.layout.tensor, dtype.itemsize
    tokens = plan.micro_rows * dims.sequence_len
    hidden = tokens * MLP_RATIO * dims.width // tensor
    block = (2 * hidden + 6 * tokens * dims.width) * size + 4 * MLP_RATIO * dims.width**2 // tensor
    if config.batch.recompute != "none":
        block += kept_bytes_per_block(
            dims, dims.depth - 1, tokens, itemsize=size, tensor=tensor, fp8=config.precision.fp8
        )
    if plan.stages[stage][1] != dims.depth + 2:
        return block
    table, logits = dims.padded_vocab * dims.width // tensor, GPU_CHUNK_BYTES if on_gpu else CHUNK_BYTES
    piece = min(logits, 4 * tokens * dims.padded_vocab // tensor)
    head = (
        table * size * 2 + 2 * piece + piece * size // 2
    )  # two float32 forms of the logits, and logits and gradient in the compute dtype
    return max(block, head, 4 * table)


def _update_workspace(partition: PartitionPlan, largest_group: int, narrow: bool) -> int:
    """The optimizer step, when no activation exists: a flat gradient of one group, or Muon's updates, directions and the matrix at work."""
    size = 2 if narrow else 4
    shards = sum(bucket.shard for bucket in partition.buckets)
    owned = [0] * partition.grid_size
    for matrix, owner in zip(partition.matrices, partition.owners, strict=True):
        owned[owner] += matrix.elements
    at_work = max((matrix.elements for matrix in partition.matrices), default=0) * _NEWTON_SCHULZ_BYTES
    exchanged = (2 if partition.grid_size > 1 else 1) * max(owned) * size
    return max(4 * largest_group, (shards * size if narrow else 0) + exchanged + at_work)


def describe_memory(stages: list[Memory], device_bytes: int | None) -> str:
    """One line: the fullest rank, its parts, and the device's memory where it is known."""
    fullest = max(stages, key=lambda stage: stage.total)
    kinds = ("weights", "masters", "moments", "gradients", "activations", "workspace")
    parts = ", ".join(f"{kind} {_told(getattr(fullest, kind))}" for kind in kinds)
    where = f"a rank of stage {fullest.stage}, the fullest" if len(stages) > 1 else "a rank"
    device = f"; the device has {_told(device_bytes)}" if device_bytes else ""
    return f"memory by the count {_told(fullest.total)} on {where}: {parts}{device}"


def memory_warning(
    config: Config, plan: Plan, dtype: torch.dtype, device_bytes: int, *, on_gpu: bool = True
) -> str | None:
    """The sentence for a run that will not fit, with what each setting that helps would bring it to; None when it fits."""
    worst = max(stage.total for stage in memory_of_stages(config, plan, dtype, on_gpu=on_gpu))
    if worst <= FILLS * device_bytes:
        return None
    fitting, lightest = {}, {}  # setting -> the first value that is enough, and the one that takes least
    for setting, value, changed in _lighter(config, plan):
        try:
            other = resolve(changed, plan.layout.world, plan.dims.vocab_size)
        except UserError:
            continue
        total = max(stage.total for stage in memory_of_stages(changed, other, dtype, on_gpu=on_gpu))
        if total < worst:
            lightest[setting] = f"{setting}={value} ({_told(total)})"
            if total <= FILLS * device_bytes:
                fitting.setdefault(setting, lightest[setting])
    advice = f"set {', or '.join(fitting.values())}" if fitting else "take more ranks, or a smaller model"
    if lightest and not fitting:
        advice = f"not enough alone is {', or '.join(lightest.values())}: set several, or take more ranks"
    needs = f"this run needs {_told(worst)} on a rank by the count, and the device has {_told(device_bytes)}"
    return f"WARNING: {needs}: it will run out of memory: {advice}"


def _lighter(config: Config, plan: Plan) -> list[tuple[str, str | int, Config]]:
    """(setting, value, the config with it) of what takes less memory, the cheapest in time first."""
    halves = [plan.micro_rows >> times for times in range(1, 8) if plan.micro_rows % 2**times == 0]
    asked = [("batch", "micro_rows", rows) for rows in halves]
    asked += [
        ("batch", "recompute", kind) for kind in ("selective", "block") if config.batch.recompute not in (kind, "block")
    ]
    asked += [("parallel", "tensor", plan.layout.tensor * 2), ("parallel", "pipeline", plan.layout.pipeline * 2)]
    found = []
    for section, key, value in asked:
        values = {key: value} | (
            {"accumulation": None} if key == "micro_rows" else {}
        )  # the micro-batches follow from the rows
        found.append(
            (
                f"{section}.{key}",
                value,
                config.model_copy(update={section: getattr(config, section).model_copy(update=values)}),
            )
        )
    return found


def check_state_fits(stages: list[Memory], device_bytes: int) -> None:
    """Raises UserError when weights and optimizer state alone are larger than the device: no batch is small enough then."""
    fullest = max(stages, key=lambda stage: stage.state)
    if fullest.state > device_bytes:
        raise UserError(
            f"weights and optimizer state take {_told(fullest.state)} on a rank of stage {fullest.stage} and the device has {_told(device_bytes)}: "
            "take more ranks, raise parallel.tensor or parallel.pipeline, or lower model.depth"
        )


def _told(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 5e7 else f"{count / 1e6:.1f} MB"
