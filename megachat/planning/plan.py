"""What was derived: resolve(config, world) -> Plan. Every number once, with its formula in words; pure."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from megachat.config import Config
from megachat.errors import UserError
from megachat.planning.dimensions import (
    FP8_LEAST_SIDE,
    FP8_TILES,
    Dimensions,
    fits_fp8,
    flops_per_token,
    layer_costs,
    linear_shapes,
    parameter_counts,
    scaling_parameters,
    up_to_multiple,
    window_sizes,
)

REFERENCE_DEPTH = 12  # nanochat tunes its settings there and carries them to other depths
REFERENCE_TOKENS = 2**19  # best batch at the reference depth
BATCH_EXPONENT = 0.383  # Power Lines, arXiv 2505.13738
REFERENCE_WIDTH = 768
LARGEST_AUTO_MICRO_ROWS = 16
AUTO_MICRO_BATCHES_A_STAGE = 4  # keeps the pipeline's bubble below a fifth


@dataclass(frozen=True)
class Layout:
    """Ranks along each axis."""

    data: int
    tensor: int
    pipeline: int

    @property
    def world(self) -> int:
        return self.data * self.tensor * self.pipeline


@dataclass(frozen=True)
class Plan:
    """Derived numbers of one run. `why` has the formula of each, by field name; rates are before the schedule's multiplier."""

    dims: Dimensions
    layout: Layout
    stages: tuple[
        tuple[int, int], ...
    ]  # layers [first, last) of each pipeline stage; layer 0 embeds, then the blocks, then the head
    bubble: float  # share of a step that the ranks of a pipeline wait for each other, from FLOPs alone
    tokens_per_step: int
    rows_per_step: int
    micro_rows: int
    accumulation: int
    steps: int
    stop_step: int
    total_tokens: int
    flops_per_token: int
    total_flops: float
    rates: Mapping[str, float]  # matrix, unembedding, embedding, value_embedding, resid, x0, smear
    weight_decay: float  # Muon's, before its cosine
    evaluation_rows: int
    parameters: Mapping[str, int]
    why: Mapping[str, str]


def resolve(config: Config, world: int, vocab_size: int) -> Plan:
    """Derive every number of a run on `world` ranks with a vocabulary of `vocab_size` tokens.

    Raises UserError for a layout or a batch that does not fit, with the nearest values that do.
    """
    why: dict[str, str] = {}
    dims = resolve_dimensions(config, vocab_size, why=why)
    layout = resolve_layout(config, dims, world)
    stages = resolve_stages(dims, layout.pipeline)
    target_tokens, reference_tokens = _token_horizon(config, dims, vocab_size, why)
    asked = _asked_tokens(config, dims, layout, target_tokens, reference_tokens, why)
    rows, micro_rows, accumulation = _solve_batch(config, dims.sequence_len, layout, asked, why)
    _check_fp8(config, dims, layout, micro_rows)
    tokens = rows * dims.sequence_len
    steps = _steps(config, dims, tokens, target_tokens, why)
    stop = min(steps, config.horizon.stop_step or steps)
    rates, decay = _rates(config, dims, tokens, target_tokens, reference_tokens, why)
    flops = flops_per_token(dims)
    evaluation_rows = max(1, (config.evaluate.tokens or 20 * tokens) // dims.sequence_len)
    why["stages"] = (
        "contiguous layers; the largest stage's share of FLOPs plus its share of parameters is as small as it can be"
    )
    why["bubble"] = (
        "1 - m * sum / p / ((m - 1) * max + sum) of the p stages' FLOPs over m micro-batches; (p - 1) / (m + p - 1) if all are equal"
    )
    why["total_tokens"] = f"steps * tokens_per_step = {steps} * {tokens}"
    why["flops_per_token"] = (
        "6 * (block matrices + lm_head + smear gate) + sum of 12 * heads * head_size * min(window, sequence_len)"
    )
    why["total_flops"] = f"flops_per_token * total_tokens = {flops:.4g} * {steps * tokens:.4g}"
    why["evaluation_rows"] = "evaluate.tokens / sequence_len" if config.evaluate.tokens else "20 batches"
    return Plan(
        dims=dims,
        layout=layout,
        stages=stages,
        bubble=bubble_share(
            [sum(flops for _, flops in layer_costs(dims)[first:last]) for first, last in stages], accumulation
        ),
        tokens_per_step=tokens,
        rows_per_step=rows,
        micro_rows=micro_rows,
        accumulation=accumulation,
        steps=steps,
        stop_step=stop,
        total_tokens=steps * tokens,
        flops_per_token=flops,
        total_flops=float(flops) * steps * tokens,
        rates=MappingProxyType(rates),
        weight_decay=decay,
        evaluation_rows=evaluation_rows,
        parameters=MappingProxyType(parameter_counts(dims)),
        why=MappingProxyType(why),
    )


def usable_world(config: Config, world: int, vocab_size: int) -> int:
    """The largest number of ranks, up to `world`, on which the run fits with its tensor and pipeline axes and the same global batch.

    For a job that lost hosts: fewer data-parallel ranks take more micro-batches each. Raises UserError when no number fits, with what is wrong
    on `world` ranks, and when the batch was given per rank.
    """
    if config.batch.tokens is None and config.batch.micro_rows and config.batch.accumulation:
        raise UserError(
            "batch.micro_rows and batch.accumulation without batch.tokens make the batch depend on the ranks: set batch.tokens instead"
        )
    unit = config.parallel.tensor * config.parallel.pipeline
    for ranks in range(world // unit * unit, 0, -unit):
        try:
            resolve(config, ranks, vocab_size)
        except UserError:
            continue
        return ranks
    return resolve(config, world, vocab_size).layout.world  # which tells what does not fit


def resolve_layout(config: Config, dims: Dimensions, world: int) -> Layout:
    """The axes of a world of `world` ranks. Raises UserError when they do not fit the world or the model, with the nearest sizes that do."""
    tensor, pipeline = config.parallel.tensor, config.parallel.pipeline
    if world % (tensor * pipeline):
        unit = tensor * pipeline
        near = " or ".join(str(count) for count in (world // unit * unit, -(-world // unit) * unit) if count)
        started = f"{world} ranks that were started" if world > 1 else "1 rank that was started"
        raise UserError(
            f"parallel.tensor {tensor} x parallel.pipeline {pipeline} does not divide the {started}: start {near} ranks, or lower one of the two"
        )
    for what, count in (("query heads", dims.heads), ("key/value heads", dims.kv_heads)):
        if count % tensor:
            near = max(size for size in range(1, tensor) if dims.heads % size == 0 and dims.kv_heads % size == 0)
            raise UserError(
                f"parallel.tensor is {tensor}, which does not divide the model's {count} {what}: set parallel.tensor to {near}"
            )
    if config.parallel.sequence and (tensor == 1 or dims.sequence_len % tensor):
        wanted = (
            "parallel.tensor above 1"
            if tensor == 1
            else f"a model.sequence_len that {tensor} divides, and {dims.sequence_len} is not"
        )
        raise UserError(f"parallel.sequence needs {wanted}: change that, or set parallel.sequence=false")
    if pipeline > dims.depth:
        told = f"parallel.pipeline is {pipeline}, more stages than the model's {dims.depth} blocks"
        raise UserError(f"{told}: set parallel.pipeline to {dims.depth} or less")
    return Layout(world // (tensor * pipeline), tensor, pipeline)


def _check_fp8(config: Config, dims: Dimensions, layout: Layout, micro_rows: int) -> None:
    """Raises UserError when FP8 was asked for and the dtype, the micro-batch or every matrix is one that it cannot do."""
    recipe, compute = config.precision.fp8, config.precision.compute
    if recipe == "off":
        return
    if compute not in ("auto", "bfloat16"):
        raise UserError(
            f"precision.fp8 is {recipe}, which needs bfloat16, and precision.compute is {compute}: set that to bfloat16, or fp8 to off"
        )
    tile, length = FP8_TILES[recipe], dims.sequence_len
    if micro_rows * length % tile:
        unit = tile // math.gcd(tile, length)
        rows = " or ".join(
            str(count) for count in (micro_rows // unit * unit, up_to_multiple(micro_rows, unit)) if count
        )
        lengths = " or ".join(str(count) for count in (length // tile * tile, up_to_multiple(length, tile)) if count)
        raise UserError(
            f"precision.fp8={recipe} needs a multiple of {tile} tokens in a micro-batch, and {micro_rows} rows of {length} are "
            f"{micro_rows * length}: set batch.micro_rows to {rows}, or model.sequence_len to {lengths}"
        )
    if not any(fits_fp8(*shape, recipe) for shape in linear_shapes(dims, layout.tensor).values()):
        cut = f" cut in {layout.tensor}" if layout.tensor > 1 else ""
        raise UserError(
            f"precision.fp8={recipe} would change nothing: no matrix of width {dims.width}{cut} has sides of at least {FP8_LEAST_SIDE} in "
            f"multiples of {tile}: set precision.fp8=off, or a wider model"
        )


def resolve_stages(dims: Dimensions, stages: int) -> tuple[tuple[int, int], ...]:
    """Layers [first, last) of each pipeline stage, so that the largest cost of a stage is least; cost is the share of all FLOPs plus the share
    of all parameters, because the busiest stage sets the time and the fullest one must fit its memory."""
    costs = layer_costs(dims)
    all_parameters, all_flops = (sum(cost[kind] for cost in costs) for kind in (0, 1))
    shares = [parameters / all_parameters + flops / all_flops for parameters, flops in costs]
    sums = [0.0]
    for share in shares:
        sums.append(sums[-1] + share)
    # best[count][last]: (the least largest stage when layers [0, last) form `count` stages, where the last of these begins)
    best = [{0: (0.0, 0)}]
    for count in range(1, stages + 1):
        best.append({})
        for last in range(count, len(costs) - (stages - count) + 1):
            best[count][last] = min(
                (max(best[count - 1][first][0], sums[last] - sums[first]), first)
                for first in best[count - 1]
                if first < last
            )
    cuts = [len(costs)]
    for count in range(stages, 0, -1):
        cuts.append(best[count][cuts[-1]][1])
    cuts.reverse()
    return tuple(zip(cuts, cuts[1:], strict=False))


def bubble_share(stage_flops: list[int], micro_batches: int) -> float:
    """The share of a 1F1B step (PipeDream, arXiv 2006.09503) in which a rank waits, averaged over stages, if time were FLOPs alone."""
    total = sum(stage_flops)
    return 1 - micro_batches * total / len(stage_flops) / ((micro_batches - 1) * max(stage_flops) + total)


def resolve_dimensions(
    config: Config, vocab_size: int, *, depth: int | None = None, why: dict[str, str] | None = None
) -> Dimensions:
    """The model's sizes from the depth dial; another `depth` gives that member of the same family."""
    model = config.model
    why = {} if why is None else why
    depth = depth or model.depth
    width = up_to_multiple(depth * model.aspect_ratio, model.head_size)
    heads = width // model.head_size
    kv_heads = model.kv_heads if model.kv_heads and depth == model.depth else heads
    if heads % kv_heads:
        fits = [n for n in range(1, heads + 1) if heads % n == 0]
        near = min(fits, key=lambda n: (abs(n - kv_heads), n))
        raise UserError(
            f"model.kv_heads is {kv_heads}, which does not divide {heads} heads (depth {depth}): the nearest that does is {near}"
        )
    if width < 24:
        raise UserError(
            f"width {width} is below the 24 channels that the smear gate reads: raise model.depth or model.aspect_ratio"
        )
    why["width"] = (
        f"depth * aspect_ratio up to whole heads = {depth} * {model.aspect_ratio} up to a multiple of {model.head_size}"
    )
    why["heads"] = f"width / head_size = {width} / {model.head_size}"
    why["windows"] = (
        f"{model.window_pattern} tiled over {depth} blocks, the last L; S = sequence_len / 4 up to a multiple of 128"
    )
    windows = window_sizes(model.window_pattern, depth, model.sequence_len)
    choices = {"rotary_base": model.rotary_base, "qk_scale": model.qk_scale, "norm_epsilon": model.norm_epsilon}
    choices |= {"value_embeddings": model.value_embeddings, "lambdas": model.lambdas}
    return Dimensions(
        depth, width, heads, kv_heads, model.head_size, model.sequence_len, vocab_size, windows, **choices
    )


def _token_horizon(config: Config, dims: Dimensions, vocab_size: int, why: dict[str, str]) -> tuple[float, float]:
    """(tokens the ratio asks for, tokens it asks for at the reference depth): the scaling rules compare the two."""
    ratio = config.horizon.ratio
    reference = resolve_dimensions(config, vocab_size, depth=REFERENCE_DEPTH)
    target, target_reference = int(ratio * scaling_parameters(dims)), ratio * scaling_parameters(reference)
    why["target_tokens"] = f"ratio * (block matrices + lm_head) = {ratio:g} * {scaling_parameters(dims):,} = {target:,}"
    return target, target_reference


def _asked_tokens(
    config: Config, dims: Dimensions, layout: Layout, target: float, reference: float, why: dict[str, str]
) -> int | None:
    """Tokens a step that the user or the scaling rule asks for; None when micro_rows x accumulation say it."""
    batch = config.batch
    if batch.tokens:
        why["tokens_per_step"] = "batch.tokens"
        return batch.tokens
    if batch.micro_rows and batch.accumulation:
        why["tokens_per_step"] = (
            f"micro_rows * accumulation * data ranks * sequence_len = {batch.micro_rows} * {batch.accumulation} * {layout.data} * {dims.sequence_len}"
        )
        return None
    tokens = 2 ** round(math.log2(REFERENCE_TOKENS * (target / reference) ** BATCH_EXPONENT))
    why["tokens_per_step"] = (
        f"2^round(log2(2^19 * (target_tokens / target_tokens at depth {REFERENCE_DEPTH})^{BATCH_EXPONENT})), ratio {target / reference:.4g}"
    )
    return tokens


def _solve_batch(
    config: Config, sequence_len: int, layout: Layout, tokens: int | None, why: dict[str, str]
) -> tuple[int, int, int]:
    """(rows a step, rows a micro-batch, micro-batches a step); any two of the three settle the third."""
    ranks = layout.data
    micro, accumulation = config.batch.micro_rows, config.batch.accumulation
    why["rows_per_step"] = "tokens_per_step / sequence_len"
    why["micro_rows"] = "batch.micro_rows" if micro else "rows_per_step / (ranks * accumulation)"
    why["accumulation"] = "batch.accumulation" if accumulation else "rows_per_step / (micro_rows * ranks)"
    if tokens is None:
        return ranks * micro * accumulation, micro, accumulation
    unit = ranks * (micro or 1) * (accumulation or 1)  # rows must be a multiple of this; exactly it when both are given
    rows, left_over = divmod(tokens, sequence_len)
    fits = not left_over and rows % unit == 0 and (rows == unit or not (micro and accumulation))
    if not fits:
        raise UserError(_nearest_batches(tokens, sequence_len, ranks, micro, accumulation, unit))
    share = rows // unit
    if micro and accumulation:
        return rows, micro, accumulation
    if micro:
        return rows, micro, share
    if accumulation:
        return rows, share, accumulation
    most = LARGEST_AUTO_MICRO_ROWS
    if layout.pipeline > 1:
        most = min(most, max(1, share // (AUTO_MICRO_BATCHES_A_STAGE * layout.pipeline)))
    micro = max(n for n in range(1, most + 1) if share % n == 0)
    why["micro_rows"] = f"largest divisor of the {share} rows of a rank up to {most}" + (
        f", {AUTO_MICRO_BATCHES_A_STAGE} micro-batches a stage if there are so many rows" if layout.pipeline > 1 else ""
    )
    return rows, micro, share // micro


def _nearest_batches(
    tokens: int, sequence_len: int, ranks: int, micro: int | None, accumulation: int | None, unit: int
) -> str:
    parts = [
        f"{ranks} data-parallel rank{'s' * (ranks > 1)}",
        *([f"{micro} rows a micro-batch"] if micro else []),
        *([f"{accumulation} micro-batches"] if accumulation else []),
    ]
    size = unit * sequence_len
    exact = bool(micro and accumulation)
    below = [] if exact else [size * (tokens // size)] * (tokens >= size)
    candidates = [size] if exact else [*below, size * (tokens // size + 1)]
    near = " or ".join(f"{value} ({value // sequence_len} rows)" for value in candidates)
    whole = f"{tokens / sequence_len:g} rows of {sequence_len}"
    alone = " in one step" if exact else ""
    advice = f"set batch.tokens to {near}" + (
        f", or use a number of ranks that divides {tokens // sequence_len}" if tokens % sequence_len == 0 else ""
    )
    return f"a step of {tokens} tokens is {whole}, which {' x '.join(parts)} cannot share evenly{alone}: {advice}"


def _steps(config: Config, dims: Dimensions, tokens: int, target_tokens: float, why: dict[str, str]) -> int:
    horizon = config.horizon
    if horizon.steps:
        why["steps"] = "horizon.steps"
        return horizon.steps
    if horizon.flops:
        why["steps"] = (
            f"flops / (flops_per_token * tokens_per_step) = {horizon.flops:g} / ({flops_per_token(dims)} * {tokens})"
        )
        steps = round(horizon.flops / (flops_per_token(dims) * tokens))
    else:
        why["steps"] = f"target_tokens / tokens_per_step = {int(target_tokens):,} / {tokens:,}"
        steps = int(target_tokens // tokens)
    if steps < 1:
        raise UserError(
            f"the horizon is shorter than one step of {tokens} tokens: set horizon.steps, or raise "
            f"horizon.{'flops' if horizon.flops else 'ratio'}, or lower batch.tokens"
        )
    return steps


def _rates(
    config: Config, dims: Dimensions, tokens: int, target: float, reference: float, why: dict[str, str]
) -> tuple[dict[str, float], float]:
    asked = config.optimizer
    batch = math.sqrt(tokens / REFERENCE_TOKENS) if asked.scale_to_batch else 1.0
    shape = (dims.width / REFERENCE_WIDTH) ** -0.5
    horizon = reference / target if asked.scale_to_batch else 1.0
    by_batch = (
        f"sqrt(tokens_per_step / 2^19) = {batch:.4g}" if asked.scale_to_batch else "1 (optimizer.scale_to_batch is off)"
    )
    why["rates.matrix"] = (
        f"matrix_lr * {by_batch}; times each matrix's multiplier ({asked.muon_multiplier if isinstance(asked.muon_multiplier, str) else 'by name'})"
    )
    for name, source in (
        ("unembedding", "unembedding_lr"),
        ("embedding", "embedding_lr"),
        ("value_embedding", "embedding_lr / 2"),
    ):
        why[f"rates.{name}"] = f"{source} * {by_batch} * (width / 768)^-0.5 = {shape:.4g}"
    why["rates.resid"] = f"scalar_lr / 100 * {by_batch}"
    why["rates.x0"] = f"scalar_lr * {by_batch}"
    why["rates.smear"] = "smear_lr"
    why["weight_decay"] = (
        f"weight_decay * {by_batch} * target_tokens at depth {REFERENCE_DEPTH} / target_tokens = {horizon:.4g}; a cosine takes it to 0"
    )
    rates = {
        "matrix": asked.matrix_lr * batch,
        "unembedding": asked.unembedding_lr * batch * shape,
        "embedding": asked.embedding_lr * batch * shape,
        "value_embedding": asked.embedding_lr * batch * shape * 0.5,
        "resid": asked.scalar_lr * batch * 0.01,
        "x0": asked.scalar_lr * batch,
        "smear": asked.smear_lr,
    }
    if dims.lambdas == "neutral":
        rates |= {name: 0.0 for name in ("resid", "x0", "smear")}
        why |= {f"rates.{name}": "0 (model.lambdas is neutral)" for name in ("resid", "x0", "smear")}
    return rates, asked.weight_decay * batch * horizon
