"""Derives the plan of a run from its config: `resolve_plan` is a pure function that gives each number its formula."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import NamedTuple

from megachat.config import Config
from megachat.errors import UserError
from megachat.planning.dimensions import (
    Dimensions,
    LookupDimensions,
    bubble_share,
    flops_per_token,
    layer_costs,
    parameter_counts,
    resolve_stages,
    scaling_parameters,
)
from megachat.planning.execution import check_execution, check_fp8, nearest_multiples
from megachat.planning.sizes import resolve_dimensions
from megachat.schedule import check_schedule

REFERENCE_DEPTH = 12  # nanochat tunes its settings at this depth and scales them to others
REFERENCE_TOKENS = 2**19  # best batch at the reference depth
BATCH_EXPONENT = 0.383  # Power Lines, arXiv 2505.13738
REFERENCE_WIDTH = 768
LARGEST_AUTO_MICRO_ROWS = 16
AUTO_MICRO_BATCHES_PER_STAGE = 4  # keeps the pipeline's bubble below a fifth


class RateRule(NamedTuple):
    """How a learning rate follows from a setting of the optimizer section: times factor, times the root of the batch
    (by_batch), times width^-0.5 (by_width). meaning: for `megachat explain`."""

    setting: str
    meaning: str
    factor: float = 1.0
    by_batch: bool = True
    by_width: bool = False

    def width_factor(self, dims: Dimensions) -> float:
        """Returns the factor on the rate for the model's width."""
        return (dims.width / REFERENCE_WIDTH) ** -0.5 if self.by_width else 1.0


RATES = {  # by Group.rate (optim/groups.py)
    "matrix": RateRule("matrix_lr", "Muon's learning rate"),
    "unembedding": RateRule("unembedding_lr", "rate of lm_head", by_width=True),
    "embedding": RateRule("embedding_lr", "rate of wte", by_width=True),
    "value_embedding": RateRule("embedding_lr", "rate of the value embeddings", 0.5, by_width=True),
    "resid": RateRule("scalar_lr", "rate of the residual lambdas", 0.01),
    "x0": RateRule("scalar_lr", "rate of the x0 lambdas"),
    "smear": RateRule("smear_lr", "rate of smear and backout", by_batch=False),
    "norm_scale": RateRule("norm_scale_lr", "rate of the learned scales of norms"),
}


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
    """The derived numbers of one run.

    stages: layers [first, last) of each pipeline stage; layer 0 embeds, the blocks follow, then the head. bubble: share
    of a step that pipeline ranks wait for each other, from FLOPs alone. rates: by Group.rate (optim/groups.py), before
    the schedule's multiplier. weight_decay: Muon's, before its cosine. why: the formula of each number, by field name.
    """

    dims: Dimensions
    layout: Layout
    stages: tuple[tuple[int, int], ...]
    bubble: float
    tokens_per_step: int
    rows_per_step: int
    micro_rows: int
    accumulation: int
    steps: int
    stop_step: int
    total_tokens: int
    flops_per_token: int
    total_flops: float
    rates: Mapping[str, float]
    weight_decay: float
    evaluation_rows: int
    parameters: Mapping[str, int]
    why: Mapping[str, str]

    @property
    def flops_per_step(self) -> int:
        return self.flops_per_token * self.tokens_per_step

    @property
    def micro_tokens(self) -> int:
        """Returns the tokens of a micro-batch on one rank of the data axis."""
        return self.micro_rows * self.dims.sequence_len


def stream_tokens(config: Config, plan: Plan) -> int:
    """Returns the tokens of a micro-batch that the stream has on one rank: parallel.sequence divides them."""
    return plan.micro_tokens // plan.layout.tensor if config.parallel.sequence else plan.micro_tokens


def resolve_plan(config: Config, world: int, vocab_size: int, allocated: LookupDimensions | None = None) -> Plan:
    """Derives every number of a run on `world` ranks with a vocabulary of `vocab_size` tokens.

    allocated: see resolve_dimensions. Raises UserError for a layout or batch that does not fit, with the nearest values
    that do.
    """
    check_schedule(config.optimizer)
    why: dict[str, str] = {}  # each function adds the formulas of its numbers
    dims = resolve_dimensions(config, vocab_size, why=why, allocated=allocated)
    _check_qk_clip(config, dims)
    layout = resolve_layout(config, dims, world)
    check_execution(config, layout.data * layout.tensor)
    stages = resolve_stages(dims, layout.pipeline, layout.data * layout.tensor)
    target_tokens, reference_tokens = _token_horizon(config, dims, vocab_size, why)
    step_tokens = _step_tokens(config, dims, layout, target_tokens / reference_tokens, why)
    rows, micro_rows, accumulation = _solve_batch(config, dims.sequence_len, layout, step_tokens, why)
    check_fp8(config, dims, layout.tensor, micro_rows)
    tokens = rows * dims.sequence_len
    steps = _steps(config, dims, tokens, target_tokens, why)
    rates, weight_decay = _rates(config, dims, tokens, reference_tokens / target_tokens, why)
    flops = flops_per_token(dims)
    stage_flops = [sum(flops for _, flops in layer_costs(dims)[first:last]) for first, last in stages]
    return Plan(
        dims=dims,
        layout=layout,
        stages=stages,
        bubble=bubble_share(stage_flops, accumulation),
        tokens_per_step=tokens,
        rows_per_step=rows,
        micro_rows=micro_rows,
        accumulation=accumulation,
        steps=steps,
        stop_step=min(steps, config.horizon.stop_step or steps),
        total_tokens=steps * tokens,
        flops_per_token=flops,
        total_flops=float(flops) * steps * tokens,
        rates=MappingProxyType(rates),
        weight_decay=weight_decay,
        evaluation_rows=max(1, (config.evaluate.tokens or 20 * tokens) // dims.sequence_len),
        parameters=MappingProxyType(parameter_counts(dims)),
        why=MappingProxyType(why | _formulas_of_totals(config, dims, steps, tokens)),
    )


def _formulas_of_totals(config: Config, dims: Dimensions, steps: int, tokens: int) -> dict[str, str]:
    """Returns the formulas of the numbers that follow from all others. tokens: per step."""
    flops = flops_per_token(dims)
    lookup = " + 12 * mean_rows * width per lookup layer" if dims.lookup else ""
    return {
        "stages": "contiguous layers that minimize the largest stage's share of FLOPs plus its share of parameters",
        "bubble": "1 - m * sum / p / ((m - 1) * max + sum) of the p stages' FLOPs over m micro-batches; "
        "(p - 1) / (m + p - 1) if all are equal",
        "total_tokens": f"steps * tokens_per_step = {steps} * {tokens}",
        "flops_per_token": "6 * (block matrices + lm_head + smear gate) "
        f"+ sum of 12 * heads * head_size * min(window, sequence_len){lookup}",
        "total_flops": f"flops_per_token * total_tokens = {flops:.4g} * {steps * tokens:.4g}",
        "evaluation_rows": "evaluate.tokens / sequence_len" if config.evaluate.tokens else "20 batches",
    }


def resolve_without_text(config: Config, world: int, vocab_size: int) -> Plan:
    """Returns the plan for checks and benchmarks on random tokens: the rows of lookup tables are allocated unevenly,
    the first tokens have the most.
    """
    plan = resolve_plan(config, world, vocab_size)
    lookup = plan.dims.lookup
    if lookup is None:
        return plan
    left, rows, most = lookup.rows - vocab_size, list[int](), int(lookup.mean_rows)
    for token in range(vocab_size):
        share = max(min(most - 1, (left + 1) // 2), left - (vocab_size - token - 1) * (most - 1))
        rows.append(1 + share)
        left -= share
    example = replace(lookup, mean_rows=lookup.rows / vocab_size, rows_per_token=" ".join(map(str, rows)))
    return resolve_plan(config, world, vocab_size, example)


def usable_world(config: Config, world: int, vocab_size: int) -> int:
    """Returns the largest number of ranks, up to `world`, on which the run fits with its tensor and pipeline axes and
    its global batch.

    For a job that lost hosts: fewer data-parallel ranks take more micro-batches each. Raises UserError if no number
    fits, with the reason on `world` ranks, or if the batch is configured per rank.
    """
    if config.batch.tokens is None and config.batch.micro_rows and config.batch.accumulation:
        raise UserError(
            "batch.micro_rows and batch.accumulation without batch.tokens make the batch depend on the number of "
            "ranks: set batch.tokens instead"
        )
    unit = config.parallel.tensor * config.parallel.pipeline
    for ranks in range(world // unit * unit, 0, -unit):
        try:
            resolve_plan(config, ranks, vocab_size)
        except UserError:
            continue
        return ranks
    return resolve_plan(config, world, vocab_size).layout.world  # raises the reason


def resolve_layout(config: Config, dims: Dimensions, world: int) -> Layout:
    """Returns the axes of a world of `world` ranks.

    Raises UserError if they do not fit, with the nearest sizes that do.
    """
    tensor, pipeline = config.parallel.tensor, config.parallel.pipeline
    if world % (tensor * pipeline):
        started = f"{world} ranks that were started" if world > 1 else "1 rank that was started"
        raise UserError(
            f"parallel.tensor {tensor} x parallel.pipeline {pipeline} does not divide the {started}: "
            f"start {nearest_multiples(world, tensor * pipeline)} ranks, or lower one of the two"
        )
    for what, count in (("query heads", dims.heads), ("key/value heads", dims.kv_heads)):
        if count % tensor:
            sizes = [size for size in range(1, tensor) if dims.heads % size == 0 and dims.kv_heads % size == 0]
            near = max(size for size in sizes if world // pipeline % size == 0)
            more = f", or to {sizes[-1]} on a multiple of {sizes[-1] * pipeline} ranks" if sizes[-1] > near else ""
            raise UserError(
                f"parallel.tensor is {tensor}, which does not divide the model's {count} {what}: "
                f"set parallel.tensor to {near}{more}"
            )
    if dims.lookup and dims.lookup.up_width % tensor:
        raise UserError(
            f"lookup.up_width is {dims.lookup.up_width}, which parallel.tensor {tensor} does not divide: set it to "
            f"{nearest_multiples(dims.lookup.up_width, tensor)}"
        )
    if config.parallel.sequence and tensor == 1:
        raise UserError("parallel.sequence requires parallel.tensor above 1: raise it, or set parallel.sequence=false")
    if config.parallel.sequence and dims.sequence_len % tensor:
        raise UserError(
            f"parallel.sequence requires model.sequence_len ({dims.sequence_len}) to be divisible by parallel.tensor "
            f"({tensor}): change one of them, or set parallel.sequence=false"
        )
    if pipeline > dims.depth:
        raise UserError(
            f"parallel.pipeline is {pipeline}, more stages than the model's {dims.depth} blocks: "
            f"set parallel.pipeline to {dims.depth} or less"
        )
    return Layout(world // (tensor * pipeline), tensor, pipeline)


def _check_qk_clip(config: Config, dims: Dimensions) -> None:
    """Raises UserError if QK clip is on and there are no learned scales that it could change."""
    if config.optimizer.qk_clip and not {"query", "key"} <= set(dims.norm_scales):
        raise UserError(
            f"optimizer.qk_clip is {config.optimizer.qk_clip:g}, but it can only change learned scales of queries and "
            "keys: without them no attention logit exceeds model.qk_scale^2 * sqrt(model.head_size) = "
            f"{dims.largest_logit:.3g}, because both are normed; add query and key to model.norm_scales, or set it to 0"
        )


def _token_horizon(config: Config, dims: Dimensions, vocab_size: int, why: dict[str, str]) -> tuple[float, float]:
    """Returns horizon.ratio's tokens for this model and for the reference depth, which the scaling rules compare."""
    ratio, scaling = config.horizon.ratio, scaling_parameters(dims)
    target = int(ratio * scaling)
    tables = ", without tables" if dims.lookup or dims.ngram else ""
    why["target_tokens"] = f"ratio * (block matrices + lm_head{tables}) = {ratio:g} * {scaling:,} = {target:,}"
    return target, ratio * scaling_parameters(resolve_dimensions(config, vocab_size, depth=REFERENCE_DEPTH))


def _step_tokens(
    config: Config, dims: Dimensions, layout: Layout, relative_horizon: float, why: dict[str, str]
) -> int | None:
    """Returns the tokens per step by the config or the scaling rule; None if micro_rows x accumulation is the batch."""
    batch = config.batch
    if batch.tokens:
        why["tokens_per_step"] = "batch.tokens"
        return batch.tokens
    if batch.micro_rows and batch.accumulation:
        factors = f"{batch.micro_rows} * {batch.accumulation} * {layout.data} * {dims.sequence_len}"
        why["tokens_per_step"] = f"micro_rows * accumulation * data ranks * sequence_len = {factors}"
        return None
    why["tokens_per_step"] = (
        f"2^round(log2(2^19 * (target_tokens / target_tokens at depth {REFERENCE_DEPTH})^{BATCH_EXPONENT})), "
        f"ratio {relative_horizon:.4g}"
    )
    return 2 ** round(math.log2(REFERENCE_TOKENS * relative_horizon**BATCH_EXPONENT))


def _solve_batch(
    config: Config, sequence_len: int, layout: Layout, tokens: int | None, why: dict[str, str]
) -> tuple[int, int, int]:
    """Returns (rows per step, rows per micro-batch, micro-batches per step); any two of them determine the third."""
    ranks, micro, accumulation = layout.data, config.batch.micro_rows, config.batch.accumulation
    why["rows_per_step"] = "tokens_per_step / sequence_len"
    why["micro_rows"] = "batch.micro_rows" if micro else "rows_per_step / (ranks * accumulation)"
    why["accumulation"] = "batch.accumulation" if accumulation else "rows_per_step / (micro_rows * ranks)"
    unit = ranks * (micro or 1) * (accumulation or 1)  # divides the rows; is equal to them if both are given
    if tokens is None:
        tokens = unit * sequence_len
    rows, left_over = divmod(tokens, sequence_len)
    if left_over or rows % unit or (micro and accumulation and rows != unit):
        raise UserError(_uneven_batch(tokens, sequence_len, ranks, micro, accumulation))
    share = rows // unit
    if micro:
        return rows, micro, accumulation or share
    if accumulation:
        return rows, share, accumulation
    most, reason = LARGEST_AUTO_MICRO_ROWS, ""
    if layout.pipeline > 1:
        most = min(most, max(1, share // (AUTO_MICRO_BATCHES_PER_STAGE * layout.pipeline)))
        reason = f", for {AUTO_MICRO_BATCHES_PER_STAGE} micro-batches per stage if there are enough rows"
    micro = max(n for n in range(1, most + 1) if share % n == 0)
    why["micro_rows"] = f"largest divisor of a rank's {share} rows up to {most}{reason}"
    return rows, micro, share // micro


def _uneven_batch(tokens: int, sequence_len: int, ranks: int, micro: int | None, accumulation: int | None) -> str:
    """Returns the error for a batch that the ranks cannot share, with the nearest batches that they can."""
    size = ranks * (micro or 1) * (accumulation or 1) * sequence_len
    exact = bool(micro and accumulation)
    below = [size * (tokens // size)] if tokens >= size else []
    candidates = [size] if exact else [*below, size * (tokens // size + 1)]
    near = " or ".join(f"{value} ({value // sequence_len} rows)" for value in candidates)
    factors = f"{ranks} data-parallel rank{'s' * (ranks > 1)}"
    factors += f" x {micro} rows per micro-batch" if micro else ""
    factors += f" x {accumulation} micro-batches" if accumulation else ""
    message = (
        f"a step of {tokens} tokens is {tokens / sequence_len:g} rows of {sequence_len}, which {factors} cannot share "
        f"evenly{' in one step' if exact else ''}: set batch.tokens to {near}"
    )
    if micro and not accumulation and tokens % (sequence_len * ranks) == 0:
        message += f", or batch.micro_rows to {_nearest_divisors(tokens // sequence_len // ranks, micro)}"
    if tokens % sequence_len == 0:
        message += f", or use a number of ranks that divides {tokens // sequence_len}"
    return message


def _nearest_divisors(value: int, near: int) -> str:
    below, above = ([n for n in side if value % n == 0] for side in (range(1, near), range(near + 1, value + 1)))
    return " or ".join(str(n) for n in (*below[-1:], *above[:1]))


def _steps(config: Config, dims: Dimensions, tokens: int, target_tokens: float, why: dict[str, str]) -> int:
    horizon = config.horizon
    if horizon.steps:
        why["steps"] = "horizon.steps"
        return horizon.steps
    if horizon.flops:
        factors = f"{horizon.flops:g} / ({flops_per_token(dims)} * {tokens})"
        why["steps"] = f"flops / (flops_per_token * tokens_per_step) = {factors}"
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
    config: Config, dims: Dimensions, tokens: int, horizon: float, why: dict[str, str]
) -> tuple[dict[str, float], float]:
    """Returns the learning rates by name in RATES, and Muon's weight decay. horizon: target tokens at the reference
    depth divided by this run's."""
    optimizer = config.optimizer
    batch, batch_formula = 1.0, "1 (optimizer.scale_to_batch is off)"
    if optimizer.scale_to_batch:
        batch = math.sqrt(tokens / REFERENCE_TOKENS)
        batch_formula = f"sqrt(tokens_per_step / 2^19) = {batch:.4g}"
    else:
        horizon = 1.0
    rates = {}
    for name, rule in RATES.items():
        if name == "norm_scale" and not dims.norm_scales:
            continue
        width = rule.width_factor(dims)
        rate = getattr(optimizer, rule.setting) * (batch if rule.by_batch else 1.0) * width * rule.factor
        formula = rule.setting + (f" / {1 / rule.factor:g}" if rule.factor < 1 else "")
        formula += f" * {batch_formula}" if rule.by_batch else ""
        formula += f" * (width / {REFERENCE_WIDTH})^-0.5 = {width:.4g}" if rule.by_width else ""
        if dims.lambdas == "neutral" and name in ("resid", "x0", "smear"):
            rate, formula = 0.0, "0 (model.lambdas is neutral)"
        rates[name], why[f"rates.{name}"] = rate, formula
    multiplier = optimizer.muon_multiplier if isinstance(optimizer.muon_multiplier, str) else "by name"
    why["rates.matrix"] += f"; times each matrix's multiplier ({multiplier})"
    why["weight_decay"] = (
        f"weight_decay * {batch_formula} * target_tokens at depth {REFERENCE_DEPTH} / target_tokens = {horizon:.4g}; "
        "a cosine takes it to 0"
    )
    if unknown := [name for name in optimizer.ramp_rates if name not in rates]:
        raise UserError(f"optimizer.ramp_rates has {unknown[0]}, which is none of {', '.join(rates)}")
    return rates, optimizer.weight_decay * batch * horizon
