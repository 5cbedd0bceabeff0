"""Derives a model's sizes from its config."""

from megachat.config import Config
from megachat.errors import UserError
from megachat.planning.dimensions import (
    NORMS,
    SMEAR_CHANNELS,
    WINDOW_TILE,
    Dimensions,
    LookupDimensions,
    NgramDimensions,
    up_to_multiple,
    window_sizes,
)

LOOKUP_ROWS_PER_TOKEN = 4  # the paper's largest models have 3.9 (arXiv 2601.21461)
LOOKUP_UP_RATIO = 4
NGRAM_ROWS_PER_TOKEN = 4  # as lookup tables; modded-nanogpt began with 5 (its pull request 201)
SPECIAL_TOKEN_COUNT = 9  # of nanochat's vocabularies; they come last, and the first of them is BOS


def resolve_dimensions(
    config: Config,
    vocab_size: int,
    *,
    depth: int | None = None,
    why: dict[str, str] | None = None,
    allocated: LookupDimensions | None = None,
) -> Dimensions:
    """Returns the model's sizes for its depth, or for another `depth` of the same family, which has no tables.

    allocated: lookup layers whose rows are allocated (of a checkpoint, or made for this run). Without them, or if they
    have another number of rows, the rows of the model's lookup layers are not allocated yet.
    """
    model = config.model
    why = {} if why is None else why
    depth = depth or model.depth
    width = up_to_multiple(depth * model.aspect_ratio, model.head_size)
    heads = width // model.head_size
    kv_heads = model.kv_heads if model.kv_heads and depth == model.depth else heads
    if heads % kv_heads:
        divisors = [n for n in range(1, heads + 1) if heads % n == 0]
        near = min(divisors, key=lambda n: (abs(n - kv_heads), n))
        raise UserError(
            f"model.kv_heads is {kv_heads}, which does not divide {heads} heads (depth {depth}): "
            f"the nearest that does is {near}"
        )
    if width < SMEAR_CHANNELS:
        raise UserError(
            f"width {width} is below the {SMEAR_CHANNELS} channels that the smear gate reads: "
            "raise model.depth or model.aspect_ratio"
        )
    up_to = f"= {depth} * {model.aspect_ratio} up to a multiple of {model.head_size}"
    why["width"] = f"depth * aspect_ratio up to whole heads {up_to}"
    why["heads"] = f"width / head_size = {width} / {model.head_size}"
    tiled = f"{model.window_pattern} tiled over {depth} blocks, the last L"
    why["windows"] = f"{tiled}; S = sequence_len * {model.short_window:g} up to a multiple of {WINDOW_TILE}"
    return Dimensions(
        depth=depth,
        width=width,
        heads=heads,
        kv_heads=kv_heads,
        head_size=model.head_size,
        sequence_len=model.sequence_len,
        vocab_size=vocab_size,
        windows=window_sizes(model.window_pattern, depth, model.sequence_len, model.short_window),
        rotary_base=model.rotary_base,
        qk_scale=model.qk_scale,
        norm_epsilon=model.norm_epsilon,
        value_embeddings=model.value_embeddings,
        lambdas=model.lambdas,
        norm_scales=tuple(norm for norm in NORMS if norm in model.norm_scales),
        lookup=_resolve_lookup(config, vocab_size, width, why, allocated) if depth == model.depth else None,
        ngram=_resolve_ngram(config, vocab_size, kv_heads * model.head_size, why) if depth == model.depth else None,
    )


def _check_blocks(key: str, blocks: tuple[int, ...], config: Config) -> None:
    """Raises UserError if the model does not have all of the blocks that the setting `key` names."""
    depth = config.model.depth
    if max(blocks) >= depth:
        raise UserError(
            f"{key} has {max(blocks)}, but the {depth} blocks are numbered 0 to {depth - 1}: choose among these"
        )


def _resolve_lookup(
    config: Config, vocab_size: int, width: int, why: dict[str, str], allocated: LookupDimensions | None
) -> LookupDimensions | None:
    """Returns the sizes of the lookup layers, None without any. Raises UserError for sizes that do not fit."""
    settings = config.lookup
    if not settings.after_blocks:
        return None
    _check_blocks("lookup.after_blocks", settings.after_blocks, config)
    rows, most = settings.rows or LOOKUP_ROWS_PER_TOKEN * vocab_size, settings.max_rows_per_token
    if not vocab_size <= rows <= vocab_size * most:
        raise UserError(
            f"lookup.rows is {rows:,}, but {vocab_size:,} tokens with 1 to {most:,} rows each "
            f"(lookup.max_rows_per_token) take {vocab_size:,} to {vocab_size * most:,}: change one of the two"
        )
    why["lookup.rows"] = "lookup.rows" if settings.rows else f"{LOOKUP_ROWS_PER_TOKEN} * vocabulary"
    why["lookup.up_width"] = "lookup.up_width" if settings.up_width else f"{LOOKUP_UP_RATIO} * width"
    why["lookup.mean_rows"] = "rows of a token of the sample, on average"
    known = allocated if allocated and allocated.rows == rows else None
    if known is None:
        why["lookup.mean_rows"] = "the most that a token may have, until a sample of the text decides"
    return LookupDimensions(
        blocks=tuple(sorted(settings.after_blocks)),
        rows=rows,
        up_width=settings.up_width or LOOKUP_UP_RATIO * width,
        tied=settings.tied,
        score_scale=settings.score_scale,
        mean_rows=known.mean_rows if known else float(min(most, rows - vocab_size + 1)),
        rows_per_token=known.rows_per_token if known else "",
    )


def _resolve_ngram(config: Config, vocab_size: int, kv_width: int, why: dict[str, str]) -> NgramDimensions | None:
    """Returns the sizes of the n-gram values, None without any. Raises UserError for sizes that do not fit."""
    settings = config.ngram
    if not settings.blocks:
        return None
    _check_blocks("ngram.blocks", settings.blocks, config)
    if not settings.orders:
        raise UserError("ngram.orders is empty, but ngram.blocks is not: give lengths of n-grams, such as [2,3]")
    if settings.width and settings.width > kv_width:
        raise UserError(
            f"ngram.width is {settings.width}, but the key/value heads have {kv_width} channels, to which the rows are "
            f"added: set it to {kv_width} or less"
        )
    bos = max(0, vocab_size - SPECIAL_TOKEN_COUNT) if settings.bos is None else settings.bos
    if bos >= vocab_size:
        raise UserError(f"ngram.bos is {bos}, but the vocabulary has the ids 0 to {vocab_size - 1}: give BOS's id")
    why["ngram.rows"] = "ngram.rows" if settings.rows else f"{NGRAM_ROWS_PER_TOKEN} * vocabulary, as lookup tables"
    why["ngram.width"] = "ngram.width" if settings.width else "kv_heads * head_size"
    why["ngram.bos"] = "ngram.bos" if settings.bos is not None else f"vocabulary - {SPECIAL_TOKEN_COUNT} special tokens"
    return NgramDimensions(
        blocks=tuple(sorted(settings.blocks)),
        orders=tuple(sorted(settings.orders)),
        rows=settings.rows or NGRAM_ROWS_PER_TOKEN * vocab_size,
        width=settings.width or kv_width,
        sign_trick=settings.sign_trick,
        seed=settings.seed,
        bos=bos,
    )
