"""Settings of the model: its sizes, lookup layers and n-gram values."""

from typing import Annotated, Literal

from pydantic import Field, field_validator

from megachat import config_checks
from megachat.config_checks import TOKENS, WIDTH, Most, Section, setting
from megachat.planning.dimensions import LARGEST_ORDER, NORM_EPSILON, NORMS, QK_SCALE, ROTARY_BASE, Norm

AllocationMethod = Literal["lzw", "lzw_published", "frequency", "uniform"]


class ModelConfig(Section):
    """Sizes of the model; nearly all follow from depth."""

    depth: int = setting(
        12,
        "number of blocks; width, heads, batch, steps and rates follow from it",
        ge=1,
        most=Most(
            128, "the rules for width and rates are known up to depth 32, and counting memory would take seconds"
        ),
    )
    aspect_ratio: int = setting(64, "width per block before rounding up to whole heads", ge=1, most=WIDTH)
    head_size: int = setting(128, "channels per head", ge=2, multiple_of=2, most=WIDTH)
    kv_heads: int | None = setting(None, "key/value heads; null: as many as query heads", ge=1, most=TOKENS)
    sequence_len: int = setting(2048, "tokens per row", ge=2, most=TOKENS)
    vocab_size: int | None = setting(None, "tokens in the vocabulary; null: the tokenizer's", ge=1, most=TOKENS)
    window_pattern: str = setting(
        "SSSL", "attention windows tiled over blocks: S short, L whole; the last is always L", pattern="^[SL]+$"
    )
    short_window: float = setting(0.25, "share of sequence_len in S windows, up to a multiple of 128", gt=0, le=1)
    rotary: Literal["slices", "chunk"] = setting(
        "slices", "how the channels of a head are paired for the rotation: two slices or torch.chunk; same result"
    )
    rotary_base: float = setting(
        ROTARY_BASE,
        "base of the rotary frequencies",
        gt=1,
        most=Most(1e12, "positions would have equal angles in float32"),
    )
    qk_scale: float = setting(
        QK_SCALE, "factor on normed queries and keys", gt=0, most=Most(1000, "attention would see one key only")
    )
    norm_epsilon: float = setting(
        NORM_EPSILON,
        "added to the mean square in every norm",
        gt=0,
        most=Most(0.1, "a norm would depend on it more than on the values"),
    )
    value_embeddings: bool = setting(True, "learned value embeddings of every other block, added through a gate")
    lambdas: Literal["learned", "neutral"] = setting(
        "learned", "residual mix, smear and backout; neutral: no effect and not trained, as transformers' NanoChat"
    )
    norm_scales: tuple[Norm, ...] = setting(
        (), f"norms with a learned scale per channel, among {', '.join(NORMS)}; empty: none, as nanochat"
    )

    _check_norms = field_validator("norm_scales")(config_checks.check_unique)


class LookupConfig(Section):
    """Lookup layers (L3): attention of each token over table rows that belong to its id."""

    after_blocks: tuple[Annotated[int, Field(ge=0)], ...] = setting(
        (), "blocks, counted from 0, that end with a lookup layer; empty: none"
    )
    rows: int | None = setting(
        None, "rows of each layer's table; null: 4 per token of the vocabulary", ge=1, most=TOKENS
    )
    max_rows_per_token: int = setting(
        512, "most rows that one token gets", ge=1, most=Most(2**16, "a read of so many rows costs more than attention")
    )
    up_width: int | None = setting(
        None, "channels between W_up and W_mix; null: 4 per channel of the model", ge=1, most=WIDTH
    )
    tied: bool = setting(True, "one table serves as keys and as values")
    allocation: AllocationMethod = setting(
        "lzw",
        "how rows are allocated to tokens, from a sample of the training text; lzw_published: with the paper's scan",
    )
    allocation_file: str | None = setting(
        None, "allocation that `megachat lookup` wrote; null: allocate at the first start"
    )
    sample_tokens: int = setting(
        10_000_000, "tokens of training text in the sample", ge=1, most=Most(10**10, "the scan would take days")
    )
    score_scale: Literal["none", "sqrt"] = setting(
        "none", "factor on the attention scores of a lookup layer; none: 1, sqrt: 1 / sqrt(width)"
    )

    _check_blocks = field_validator("after_blocks")(config_checks.check_unique)


class NgramConfig(Section):
    """Hashed n-gram values: rows of tables for the last ids, added to the attention values through a gate."""

    blocks: tuple[Annotated[int, Field(ge=0)], ...] = setting(
        (), "blocks, counted from 0, whose attention values get n-gram rows; empty: none"
    )
    orders: tuple[Annotated[int, Field(ge=2, le=LARGEST_ORDER)], ...] = setting(
        (2, 3), "lengths of the n-grams, 2 to 8; each has a table in each block"
    )
    rows: int | None = setting(
        None,
        "rows of each table; null: 4 per token of the vocabulary",
        ge=1,
        most=Most(2**31, "the hash chooses a row with 32 bits"),
    )
    width: int | None = setting(
        None, "channels of a row; null: those of all key/value heads; fewer are projected up", ge=1, most=WIDTH
    )
    sign_trick: bool = setting(True, "multiply a row by +1 and -1 from a second hash, so that n-grams can share it")
    storage: Literal["device", "host"] = setting(
        "device", "where a rank keeps its rows and their optimizer state: device or host memory"
    )
    optimizer: Literal["adamw", "rowwise"] = setting(
        "adamw", "optimizer of the rows; rowwise: one second moment per row and no first, a third of the memory"
    )
    seed: int = setting(
        0,
        "seed of the hashes; not run.seed, which may change for sampling while the tables stay",
        ge=0,
        most=Most(2**63 - 1, "seeds have 63 bits"),
    )
    bos: int | None = setting(
        None,
        "id that begins a document; null: the first of nanochat's 9 special tokens at the vocabulary's end",
        ge=0,
        most=TOKENS,
    )

    _check_blocks = field_validator("blocks", "orders")(config_checks.check_unique)
