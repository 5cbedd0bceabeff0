"""What was derived: resolve(config, world) -> Plan. Every number once, with its formula in words; pure."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from megachat.config import Config
from megachat.counts import Dimensions, flops_per_token, parameter_counts, scaling_parameters, up_to_multiple, window_sizes
from megachat.errors import UserError

REFERENCE_DEPTH = 12  # nanochat tunes its settings there and carries them to other depths
REFERENCE_TOKENS = 2**19  # best batch at the reference depth
BATCH_EXPONENT = 0.383  # Power Lines, arXiv 2505.13738
REFERENCE_WIDTH = 768
LARGEST_AUTO_MICRO_ROWS = 16


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
    layout = resolve_layout(config, world)
    dims = resolve_dimensions(config, vocab_size, why=why)
    target_tokens, reference_tokens = _token_horizon(config, dims, vocab_size, why)
    asked = _asked_tokens(config, dims, layout, target_tokens, reference_tokens, why)
    rows, micro_rows, accumulation = _solve_batch(config, dims.sequence_len, layout.data, asked, why)
    tokens = rows * dims.sequence_len
    steps = _steps(config, dims, tokens, target_tokens, why)
    stop = min(steps, config.horizon.stop_step or steps)
    rates, decay = _rates(config, dims, tokens, target_tokens, reference_tokens, why)
    flops = flops_per_token(dims)
    evaluation_rows = max(1, (config.evaluate.tokens or 20 * tokens) // dims.sequence_len)
    why["total_tokens"] = f"steps * tokens_per_step = {steps} * {tokens}"
    why["flops_per_token"] = "6 * (block matrices + lm_head + smear gate) + sum of 12 * heads * head_size * min(window, sequence_len)"
    why["total_flops"] = f"flops_per_token * total_tokens = {flops:.4g} * {steps * tokens:.4g}"
    why["evaluation_rows"] = "evaluate.tokens / sequence_len" if config.evaluate.tokens else "20 batches"
    return Plan(
        dims=dims,
        layout=layout,
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


def resolve_layout(config: Config, world: int) -> Layout:
    """The axes of a world of `world` ranks. Raises UserError when they do not fit, or are not built yet."""
    tensor, pipeline = config.parallel.tensor, config.parallel.pipeline
    for name, size in (("tensor", tensor), ("pipeline", pipeline)):
        if size > 1:
            raise UserError(f"parallel.{name} is {size}, but this version has the data axis only: set parallel.{name}=1")
    return Layout(world // (tensor * pipeline), tensor, pipeline)


def resolve_dimensions(config: Config, vocab_size: int, *, depth: int | None = None, why: dict[str, str] | None = None) -> Dimensions:
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
        raise UserError(f"model.kv_heads is {kv_heads}, which does not divide {heads} heads (depth {depth}): the nearest that does is {near}")
    if width < 24:
        raise UserError(f"width {width} is below the 24 channels that the smear gate reads: raise model.depth or model.aspect_ratio")
    why["width"] = f"depth * aspect_ratio up to whole heads = {depth} * {model.aspect_ratio} up to a multiple of {model.head_size}"
    why["heads"] = f"width / head_size = {width} / {model.head_size}"
    why["windows"] = f"{model.window_pattern} tiled over {depth} blocks, the last L; S = sequence_len / 4 up to a multiple of 128"
    windows = window_sizes(model.window_pattern, depth, model.sequence_len)
    return Dimensions(depth, width, heads, kv_heads, model.head_size, model.sequence_len, vocab_size, windows)


def _token_horizon(config: Config, dims: Dimensions, vocab_size: int, why: dict[str, str]) -> tuple[float, float]:
    """(tokens the ratio asks for, tokens it asks for at the reference depth): the scaling rules compare the two."""
    ratio = config.horizon.ratio
    reference = resolve_dimensions(config, vocab_size, depth=REFERENCE_DEPTH)
    target, target_reference = int(ratio * scaling_parameters(dims)), ratio * scaling_parameters(reference)
    why["target_tokens"] = f"ratio * (block matrices + lm_head) = {ratio:g} * {scaling_parameters(dims):,} = {target:,}"
    return target, target_reference


def _asked_tokens(config: Config, dims: Dimensions, layout: Layout, target: float, reference: float, why: dict[str, str]) -> int | None:
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


def _solve_batch(config: Config, sequence_len: int, ranks: int, tokens: int | None, why: dict[str, str]) -> tuple[int, int, int]:
    """(rows a step, rows a micro-batch, micro-batches a step); any two of the three settle the third."""
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
    micro = max(n for n in range(1, LARGEST_AUTO_MICRO_ROWS + 1) if share % n == 0)
    why["micro_rows"] = f"largest divisor of the {share} rows of a rank up to {LARGEST_AUTO_MICRO_ROWS}"
    return rows, micro, share // micro


def _nearest_batches(tokens: int, sequence_len: int, ranks: int, micro: int | None, accumulation: int | None, unit: int) -> str:
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
        why["steps"] = f"flops / (flops_per_token * tokens_per_step) = {horizon.flops:g} / ({flops_per_token(dims)} * {tokens})"
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


def _rates(config: Config, dims: Dimensions, tokens: int, target: float, reference: float, why: dict[str, str]) -> tuple[dict[str, float], float]:
    asked = config.optimizer
    batch = math.sqrt(tokens / REFERENCE_TOKENS) if asked.scale_to_batch else 1.0
    shape = (dims.width / REFERENCE_WIDTH) ** -0.5
    horizon = reference / target if asked.scale_to_batch else 1.0
    by_batch = f"sqrt(tokens_per_step / 2^19) = {batch:.4g}" if asked.scale_to_batch else "1 (optimizer.scale_to_batch is off)"
    why["rates.matrix"] = (
        f"matrix_lr * {by_batch}; times each matrix's multiplier ({asked.muon_multiplier if isinstance(asked.muon_multiplier, str) else 'by name'})"
    )
    for name, source in (("unembedding", "unembedding_lr"), ("embedding", "embedding_lr"), ("value_embedding", "embedding_lr / 2")):
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
    return rates, asked.weight_decay * batch * horizon
