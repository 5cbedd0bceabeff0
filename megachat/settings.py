"""The settings of a run by section, frozen and strict, each with its default, bounds and meaning."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator
from pydantic_core import PydanticCustomError

from megachat import config_checks
from megachat.config_checks import BATCH, RANKS, RATE, SECONDS, STEPS, THREADS, TOKENS, UNSUPPORTED_FP8, WIDTH, Most
from megachat.planning.dimensions import LARGEST_ORDER, NORM_EPSILON, QK_SCALE, ROTARY_BASE


class Section(BaseModel):
    """Frozen, strict settings; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _refuse_nul(cls, value):
        texts = value if isinstance(value, tuple) else (value,)
        if any(isinstance(text, str) and "\0" in text for text in texts):
            raise PydanticCustomError("nul", "must not contain the character NUL")
        return value


def _setting(default: Any, description: str, most: Most | None = None, **limits: Any) -> Any:
    if most:
        limits |= {"le": most.value, "json_schema_extra": {"reason": most.reason}}
    return Field(default, description=description, **limits)


class RunConfig(Section):
    """Name and folder of the run."""

    name: str | None = _setting(
        None, "name of the run folder; none: the config file's name", min_length=1, max_length=200
    )
    folder: str = _setting("runs", "parent of the run folders")

    _check_name = field_validator("name")(config_checks.check_run_name)
    seed: int = _setting(
        42, "seed of initial weights and sampling", ge=0, most=Most(2**63 - 1, "torch's generators take 63 bits")
    )


class ModelConfig(Section):
    """Sizes of the model; nearly all follow from depth."""

    depth: int = _setting(
        12,
        "number of blocks; width, heads, batch, steps and rates follow from it",
        ge=1,
        most=Most(
            128, "the rules for width and rates are known up to depth 32, and counting memory would take seconds"
        ),
    )
    aspect_ratio: int = _setting(64, "width per block before rounding up to whole heads", ge=1, most=WIDTH)
    head_size: int = _setting(128, "channels per head", ge=2, multiple_of=2, most=WIDTH)
    kv_heads: int | None = _setting(None, "key/value heads; none: as many as query heads", ge=1, most=TOKENS)
    sequence_len: int = _setting(2048, "tokens per row", ge=2, most=TOKENS)
    vocab_size: int | None = _setting(None, "tokens in the vocabulary; none: the tokenizer's", ge=1, most=TOKENS)
    window_pattern: str = _setting(
        "SSSL", "attention windows tiled over blocks: S quarter, L whole; the last is always L", pattern="^[SL]+$"
    )
    rotary: Literal["slices", "chunk"] = _setting("slices", "how a head is split in halves; same result")
    rotary_base: float = _setting(
        ROTARY_BASE,
        "base of the rotary frequencies",
        gt=1,
        most=Most(1e12, "positions would have equal angles in float32"),
    )
    qk_scale: float = _setting(
        QK_SCALE, "factor on normed queries and keys", gt=0, most=Most(1000, "attention would see one key only")
    )
    norm_epsilon: float = _setting(
        NORM_EPSILON,
        "added to the mean square in every norm",
        gt=0,
        most=Most(0.1, "a norm would depend on it more than on the values"),
    )
    value_embeddings: bool = _setting(True, "gated value embeddings on every other block")
    lambdas: Literal["learned", "neutral"] = _setting(
        "learned", "residual mix, smear and backout; neutral: no effect, not trained, as transformers' NanoChat"
    )


class LookupConfig(Section):
    """Lookup layers (L3): attention of each token over table rows that belong to its id."""

    after_blocks: tuple[Annotated[int, Field(ge=0)], ...] = _setting(
        (), "blocks, counted from 0, that end with a lookup layer; empty: none"
    )
    rows: int | None = _setting(
        None, "rows of each layer's table; none: 4 per token of the vocabulary", ge=1, most=TOKENS
    )
    max_rows_per_token: int = _setting(
        512, "most rows that one token gets", ge=1, most=Most(2**16, "a read of so many rows costs more than attention")
    )
    up_width: int | None = _setting(
        None, "channels between W_up and W_mix; none: 4 per channel of the model", ge=1, most=WIDTH
    )
    tied: bool = _setting(True, "one table for keys and values")
    allocation: Literal["lzw", "lzw_published", "frequency", "uniform"] = _setting(
        "lzw", "how rows are allocated to tokens, from a sample of the training text; published: with the paper's scan"
    )
    allocation_file: str | None = _setting(
        None, "file of tools/allocate_lookup.py to use; none: allocate at the first start"
    )
    sample_tokens: int = _setting(
        10_000_000, "tokens of training text in the sample", ge=1, most=Most(10**10, "the scan would take days")
    )
    score_scale: Literal["none", "sqrt"] = _setting("none", "factor on scores; none: 1, sqrt: 1 / sqrt(width)")

    _check_blocks = field_validator("after_blocks")(config_checks.check_unique)


class NgramConfig(Section):
    """Hashed n-gram values: rows of tables for the last ids, added to the attention values through a gate."""

    blocks: tuple[Annotated[int, Field(ge=0)], ...] = _setting(
        (), "blocks, counted from 0, whose attention values get n-gram rows; empty: none"
    )
    orders: tuple[Annotated[int, Field(ge=2, le=LARGEST_ORDER)], ...] = _setting(
        (2, 3), "lengths of the n-grams, 2 to 8; each has a table in each block"
    )
    rows: int | None = _setting(
        None,
        "rows of each table; none: 4 per token of the vocabulary",
        ge=1,
        most=Most(2**31, "the hash chooses a row with 32 bits"),
    )
    width: int | None = _setting(
        None, "channels of a row; none: those of all key/value heads; fewer are projected up", ge=1, most=WIDTH
    )
    sign_trick: bool = _setting(True, "multiply a row by +1 and -1 from a second hash, so that n-grams can share it")
    storage: Literal["device", "host"] = _setting(
        "device", "where a rank keeps its rows and their optimizer state: device or host memory"
    )
    optimizer: Literal["adamw", "rowwise"] = _setting(
        "adamw", "of the rows; rowwise: one second moment per row and no first, a third of the memory"
    )
    seed: int = _setting(
        0,
        "seed of the hashes; not run.seed, which may change for sampling while the tables stay",
        ge=0,
        most=Most(2**63 - 1, "seeds have 63 bits"),
    )
    bos: int | None = _setting(
        None,
        "id that begins a document; none: the first of nanochat's 9 special tokens at the vocabulary's end",
        ge=0,
        most=TOKENS,
    )

    _check_blocks = field_validator("blocks", "orders")(config_checks.check_unique)


class DataConfig(Section):
    """Source and order of the training rows."""

    folder: str = _setting("data/python", "parquet shards with a text column; the last is validation")
    tokenizer: str = _setting("data/tokenizer", "folder with the rank file and its JSON")
    streams: int = _setting(8, "packing streams; they fix the order of rows, on every layout", ge=1, most=RANKS)
    buffer_documents: int = _setting(
        1000, "documents that a stream chooses from", ge=1, most=Most(10**7, "they are kept in memory")
    )
    shuffle: bool = _setting(False, "visit row groups in a seeded order that changes each epoch")
    tokenizer_threads: int = _setting(2, "threads that tokenize ahead", ge=1, most=THREADS)
    prefetch_steps: int = _setting(
        2, "steps packed ahead in the background", ge=1, most=Most(1000, "they are kept in memory")
    )
    on_bad_text: Literal["refuse", "skip"] = _setting(
        "refuse", "texts that are not UTF-8: end with the file and row, or leave them out, counted and logged"
    )
    resume: Literal["exact", "restart"] = _setting(
        "exact", "if a resume cannot continue with the next document: fail, or restart with the first document"
    )


class BatchConfig(Section):
    """Batch size: any two of tokens, micro_rows and accumulation settle the third."""

    tokens: int | None = _setting(
        None,
        "tokens per step over all ranks; none: from the horizon, or micro_rows x accumulation x ranks",
        ge=1,
        most=BATCH,
    )
    micro_rows: int | None = _setting(None, "rows per micro-batch on a rank; none: solved", ge=1, most=BATCH)
    accumulation: int | None = _setting(None, "micro-batches per step; none: solved", ge=1, most=BATCH)
    recompute: Literal["none", "selective", "block"] = _setting(
        "none", "what a block recomputes in the backward pass instead of keeping: nothing, its MLP, or all"
    )


class HorizonConfig(Section):
    """Length of the training."""

    steps: int | None = _setting(None, "optimizer steps; overrides flops", ge=1, most=STEPS)
    flops: float | None = _setting(
        None, "training FLOPs; overrides ratio", gt=0, most=Most(1e30, "the largest known training took 10^27")
    )
    ratio: float = _setting(
        12.0, "tokens per scaling parameter", ge=1e-3, most=Most(10**6, "10^4 is far beyond every known training")
    )
    stop_step: int | None = _setting(
        None, "stop and save at this step, with the schedules of the whole horizon", ge=1, most=STEPS
    )


class OptimizerConfig(Section):
    """nanochat's optimizer settings, before the plan's scaling rules."""

    matrix_lr: float = _setting(0.02, "Muon, before the batch and shape rules", ge=0, most=RATE)
    embedding_lr: float = _setting(0.3, "wte; value embeddings take half of it", ge=0, most=RATE)
    unembedding_lr: float = _setting(0.008, "lm_head", ge=0, most=RATE)
    scalar_lr: float = _setting(0.5, "x0 lambdas; resid lambdas take a hundredth of it", ge=0, most=RATE)
    smear_lr: float = _setting(0.2, "smear gate and lambda, backout lambda; not scaled by batch", ge=0, most=RATE)
    weight_decay: float = _setting(0.28, "Muon's cautious decay before the horizon rule", ge=0, most=RATE)
    scale_to_batch: bool = _setting(True, "scale rates and Muon's decay from d12's batch and horizon to this run's")
    muon_multiplier: Literal["rows_over_cols", "flipped"] | dict[str, Annotated[float, Field(ge=0, le=1000)]] = (
        _setting("rows_over_cols", "rate multiplier per matrix: a rule, or name pattern -> number")
    )
    gradient_wire: Literal["auto", "bfloat16", "float32"] = _setting(
        "auto", "dtype of Muon's gradients between ranks; auto: the compute dtype"
    )
    clip_norm: float = _setting(
        0.0, "clip the joint gradient norm; 0: off", ge=0, most=Most(1e9, "such a norm clips nothing; 0 is off")
    )
    warmup_steps: int = _setting(40, "steps of the rates' linear warm-up", ge=0, most=STEPS)
    warmdown_ratio: float = _setting(0.65, "share of steps in the final linear decay", ge=0, le=1)
    final_lr_fraction: float = _setting(0.05, "rate multiplier at the last step", ge=0, le=1)


class PrecisionConfig(Section):
    """Dtypes, kernels and compilation."""

    compute: Literal["auto", "bfloat16", "float16", "float32"] = _setting(
        "auto", "dtype of activations; auto: bfloat16 if the device has it"
    )
    loss_scale: float = _setting(
        65536.0, "initial loss scale of float16", gt=0, most=Most(2**40, "every float16 gradient would overflow")
    )
    loss_scale_window: int = _setting(
        1000, "steps without overflow before float16's loss scale doubles", ge=1, most=STEPS
    )
    compile: bool = _setting(False, "torch.compile the blocks; the first step takes long")
    fp8: Literal["off", "tensorwise", "blockwise"] = _setting(
        "off", "train in FP8 with one scale per tensor or per tile of 128 numbers; needs bfloat16"
    )
    fp8_backend: Literal["auto", "te", "torch"] = _setting(
        "auto", "Transformer Engine or torch; auto: te if it works; the log shows the reason"
    )
    fp8_head: bool = _setting(True, "with fp8: also for lm_head")
    attention: Literal["auto", "te", "flash3", "flash2", "flash4", "flex", "sdpa", "windowed"] = _setting(
        "auto", "attention kernel; auto: the fastest available exact one; the log shows the reason"
    )

    @field_validator("fp8", mode="before")
    @classmethod
    def _refuse_unsupported_recipe(cls, value):
        if isinstance(value, str) and value in UNSUPPORTED_FP8:
            raise PydanticCustomError("fp8_recipe", "{reason}", {"reason": UNSUPPORTED_FP8[value]})
        return value


class ParallelConfig(Section):
    """Axes of the mesh; the data axis gets the remaining ranks."""

    tensor: int = _setting(1, "ranks that share each matrix", ge=1, most=RANKS)
    sequence: bool = _setting(False, "each tensor rank keeps only its tokens between tensor-parallel regions")
    pipeline: int = _setting(1, "stages that share the blocks", ge=1, most=RANKS)
    stall_s: int = _setting(
        120,
        "seconds without progress while a rank waits for others, after which the job stops and reports where",
        ge=1,
        most=SECONDS,
    )
    rendezvous_s: int = _setting(
        120, "seconds that the first ranks wait for the others at start-up", ge=1, most=SECONDS
    )
    timeout_s: int = _setting(
        600,
        "torch's limit for one collective; start-up, evaluation and saving may take 90 % of it",
        ge=1,
        most=SECONDS,
    )


class EvaluateConfig(Section):
    """Evaluations during the training and at its end."""

    every: int = _setting(250, "steps between validations; 0: only at the end", ge=0, most=STEPS)
    tokens: int | None = _setting(
        None,
        "validation tokens, rounded down to whole rows; none: 20 batches",
        ge=1,
        most=Most(10**10, "the evaluation would take days"),
    )
    prompts: tuple[str, ...] = _setting(
        (
            "The capital of France is",
            "The chemical symbol of gold is",
            "If yesterday was Friday, then tomorrow will be",
            "The opposite of hot is",
            "The planets of the solar system are:",
            "My favorite color is",
            "If 5*x + 3 = 13, then x is",
        ),
        "prompts that samples continue; empty: no samples",
    )
    sample_tokens: int = _setting(16, "tokens per sample", ge=1, most=Most(10**5, "a longer sample takes hours"))
    core_every: int = _setting(0, "steps between CORE evaluations, with one at the end; 0: none", ge=0, most=STEPS)
    core_bundle: str | None = _setting(
        None, "folder or zip with CORE's tasks; none: nanochat's, downloaded once into data/"
    )
    core_max_per_task: int = _setting(
        500, "examples per task; the default is nanochat's during training", ge=1, most=STEPS
    )
    core_tasks: tuple[str, ...] | None = _setting(None, "labels of the tasks; none: all in the bundle", min_length=1)
    core_crop: bool = _setting(
        False, "crop prompts of CORE to model.sequence_len; false: up to ten times as long, as nanochat does"
    )
    core_unfit: Literal["refuse", "leave_out"] = _setting(
        "refuse", "questions of CORE that do not fit the model: refuse before anything starts, or leave out and count"
    )


class CheckpointConfig(Section):
    """When checkpoints are saved, and which are kept."""

    every: int = _setting(1000, "steps between checkpoints; 0: only at the end", ge=0, most=STEPS)
    keep_last: int | None = _setting(
        None,
        "newest checkpoints to keep when a new one is complete; none: keep all",
        ge=1,
        most=STEPS,
    )
    keep_every: int | None = _setting(
        None,
        "with keep_last: also keep checkpoints at multiples of this many steps",
        ge=1,
        most=STEPS,
    )
    background: bool = _setting(True, "write while training continues, from a copy of the state in host memory")
    stop_s: float = _setting(
        25.0,
        "seconds for step and save after SIGTERM before the job ends without; launchers kill after 30",
        gt=0,
        most=SECONDS,
    )


class LogConfig(Section):
    """What is logged, and where."""

    every: int = _setting(1, "steps between console lines and metrics", ge=1, most=STEPS)
    wandb: Literal["off", "online", "offline"] = _setting("off", "also send metrics to Weights & Biases")
    wandb_project: str = _setting("megachat", "Weights & Biases project")
