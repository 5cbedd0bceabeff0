"""The settings of a run by section, frozen and strict, each with its default, bounds and meaning."""

from typing import Annotated, Literal

from pydantic import Field, field_validator
from pydantic_core import PydanticCustomError

from megachat import config_checks
from megachat.config_checks import (
    BATCH,
    MOMENT,
    RANKS,
    RATE,
    SECONDS,
    STEPS,
    THREADS,
    TOKENS,
    WIDTH,
    Most,
    Section,
    setting,
)
from megachat.planning.dimensions import LARGEST_ORDER, NORM_EPSILON, QK_SCALE, ROTARY_BASE


class RunConfig(Section):
    """Name and folder of the run."""

    name: str | None = setting(
        None, "name of the run folder; null: the config file's name", min_length=1, max_length=200
    )
    folder: str = setting("runs", "parent of the run folders")

    _check_name = field_validator("name")(config_checks.check_run_name)
    seed: int = setting(
        42, "seed of initial weights and sampling", ge=0, most=Most(2**63 - 1, "torch's generators take 63 bits")
    )


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
    allocation: Literal["lzw", "lzw_published", "frequency", "uniform"] = setting(
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


class DataConfig(Section):
    """Source and order of the training rows."""

    folder: str = setting(
        "data/python", "folder of parquet shards with a text column; the last shard is for validation"
    )
    tokenizer: str = setting("data/tokenizer", "folder of the tokenizer")
    streams: int = setting(
        8, "packing streams; their number fixes the order of rows, equal on every layout", ge=1, most=RANKS
    )
    buffer_documents: int = setting(
        1000,
        "documents that a stream keeps to choose from when it packs a row",
        ge=1,
        most=Most(10**7, "they are kept in memory"),
    )
    shuffle: bool = setting(False, "visit row groups in a seeded order that changes each epoch")
    tokenizer_threads: int = setting(2, "threads that tokenize ahead of training", ge=1, most=THREADS)
    prefetch_steps: int = setting(
        2, "steps whose rows are packed ahead", ge=1, most=Most(1000, "they are kept in memory")
    )
    on_bad_text: Literal["refuse", "skip"] = setting(
        "refuse", "texts that are not UTF-8: end with the file and row, or leave them out, counted and logged"
    )
    resume: Literal["exact", "restart"] = setting(
        "exact", "if a resume cannot continue with the next document: fail, or restart with the first document"
    )


class BatchConfig(Section):
    """Batch size: any two of tokens, micro_rows and accumulation settle the third."""

    tokens: int | None = setting(
        None,
        "tokens per step over all ranks; null: from micro_rows and accumulation, or by a rule from the horizon",
        ge=1,
        most=BATCH,
    )
    micro_rows: int | None = setting(
        None, "rows per micro-batch on a data rank; null: solved from the other two", ge=1, most=BATCH
    )
    accumulation: int | None = setting(
        None, "micro-batches per step; null: solved from the other two", ge=1, most=BATCH
    )
    recompute: Literal["none", "selective", "block"] = setting(
        "none", "what a block recomputes in the backward pass instead of keeping: nothing, its MLP, or all"
    )


class HorizonConfig(Section):
    """Length of the training."""

    steps: int | None = setting(None, "optimizer steps; null: from flops or ratio", ge=1, most=STEPS)
    flops: float | None = setting(
        None,
        "training FLOPs that give the number of steps; overrides ratio; null: from ratio",
        gt=0,
        most=Most(1e30, "the largest known training took 10^27"),
    )
    ratio: float = setting(
        12.0,
        "training tokens per scaling parameter (matrices of the blocks and lm_head)",
        ge=1e-3,
        most=Most(10**6, "10^4 is far beyond every known training"),
    )
    stop_step: int | None = setting(
        None,
        "stop and save at this step, with the schedules of the whole horizon; null: train to the end",
        ge=1,
        most=STEPS,
    )


_Beta = Annotated[float, Field(ge=0, lt=1)]
Betas = tuple[_Beta, _Beta]


class OptimizerConfig(Section):
    """nanochat's optimizer settings, before the plan's scaling rules."""

    matrix_lr: float = setting(0.02, "rate of Muon, before the rules for batch and shape", ge=0, most=RATE)
    embedding_lr: float = setting(0.3, "rate of the embedding (wte); value embeddings take half of it", ge=0, most=RATE)
    unembedding_lr: float = setting(0.008, "rate of the head (lm_head)", ge=0, most=RATE)
    scalar_lr: float = setting(0.5, "rate of the x0 lambdas; resid lambdas take a hundredth of it", ge=0, most=RATE)
    smear_lr: float = setting(0.2, "rate of smear gate, smear and backout lambda; not scaled by batch", ge=0, most=RATE)
    weight_decay: float = setting(
        0.28, "Muon's cautious weight decay, before the rules for batch and horizon", ge=0, most=RATE
    )
    scale_to_batch: bool = setting(True, "scale rates and Muon's decay from d12's batch and horizon to this run's")
    muon_multiplier: Literal["rows_over_cols", "flipped"] | dict[str, Annotated[float, Field(ge=0, le=1000)]] = setting(
        "rows_over_cols",
        "multiplier of Muon's rate for each matrix: a rule on its shape, or an object of name pattern -> number",
    )
    gradient_wire: Literal["auto", "bfloat16", "float32"] = setting(
        "auto", "dtype of gradients of matrices and tables between ranks; auto: the compute dtype"
    )
    clip_norm: float = setting(
        0.0,
        "clip the norm of the whole gradient to this value; 0: off",
        ge=0,
        most=Most(1e9, "such a norm clips nothing; 0 is off"),
    )
    resid_betas: Betas = setting((0.8, 0.95), "AdamW's betas for the resid lambdas")
    x0_betas: Betas = setting((0.96, 0.95), "AdamW's betas for the x0 lambdas")
    smear_betas: Betas = setting((0.8, 0.95), "AdamW's betas for smear gate, smear and backout lambda")
    unembedding_betas: Betas = setting((0.8, 0.96), "AdamW's betas for the head (lm_head)")
    embedding_betas: Betas = setting((0.8, 0.995), "AdamW's betas for the embedding, value embeddings and all tables")
    adamw_epsilon: float = setting(1e-10, "added to the root of AdamW's second moment", gt=0, le=1)
    muon_beta2: float = setting(0.9, "decay of Muon's second moment, one number per row or column", ge=0, most=MOMENT)
    momentum_start: float = setting(0.85, "Muon's momentum at the first step", ge=0, most=MOMENT)
    momentum_top: float = setting(0.97, "Muon's momentum from its warm-up to the warm-down", ge=0, most=MOMENT)
    momentum_end: float = setting(0.90, "Muon's momentum at the last step", ge=0, most=MOMENT)
    momentum_warmup_steps: int = setting(400, "steps in which Muon's momentum rises to its top", ge=0, most=STEPS)
    warmup_steps: int = setting(40, "steps of the rates' linear warm-up", ge=0, most=STEPS)
    warmup_ratio: float | None = setting(None, "share of steps in the warm-up; null: warmup_steps counts", ge=0, le=1)
    warmdown_ratio: float = setting(0.65, "share of steps in the final decay of the rates", ge=0, le=1)
    warmdown_shape: Literal["linear", "cosine", "sqrt", "exponential", "step"] = setting(
        "linear", "how the rates fall in the final decay; sqrt: 1 - sqrt(share done); step: in three equal stages"
    )
    decay_shape: Literal["cosine", "linear", "constant", "rate"] = setting(
        "cosine", "how Muon's weight decay falls to 0 over the run; rate: as the learning rate"
    )
    final_lr_fraction: float = setting(0.05, "rate multiplier at the last step", ge=0, le=1)


class PrecisionConfig(Section):
    """Dtypes, kernels and compilation."""

    compute: Literal["auto", "bfloat16", "float16", "float32"] = setting(
        "auto", "dtype of activations; auto: bfloat16 if the device has it"
    )
    loss_scale: float = setting(
        65536.0, "initial loss scale of float16", gt=0, most=Most(2**40, "every float16 gradient would overflow")
    )
    loss_scale_window: int = setting(
        1000, "steps without overflow before float16's loss scale doubles", ge=1, most=STEPS
    )
    compile: bool = setting(False, "torch.compile the blocks; the first step takes long")
    fp8: Literal["off", "tensorwise", "blockwise"] = setting(
        "off", "train in FP8 with one scale per tensor or per tile of 128 numbers; needs bfloat16"
    )
    fp8_backend: Literal["auto", "te", "torch"] = setting(
        "auto", "Transformer Engine or torch; auto: te if it works; the log shows the reason"
    )
    fp8_head: bool = setting(True, "with fp8: also lm_head in FP8")
    attention: Literal["auto", "te", "flash3", "flash2", "flash4", "flex", "sdpa", "windowed"] = setting(
        "auto", "attention kernel; auto: the fastest available exact one; the log shows the reason"
    )

    @field_validator("fp8", mode="before")
    @classmethod
    def _refuse_unsupported_recipe(cls, value):
        if isinstance(value, str) and value in config_checks.UNSUPPORTED_FP8:
            raise PydanticCustomError("fp8_recipe", "{reason}", {"reason": config_checks.UNSUPPORTED_FP8[value]})
        return value


class ParallelConfig(Section):
    """Axes of the mesh; the data axis gets the remaining ranks."""

    tensor: int = setting(
        1, "ranks of the tensor axis, which share each matrix by heads or hidden channels", ge=1, most=RANKS
    )
    sequence: bool = setting(False, "with a tensor axis: each rank keeps only its part of the tokens between matrices")
    pipeline: int = setting(1, "stages of the pipeline axis, which share the blocks", ge=1, most=RANKS)
    stall_s: int = setting(
        120,
        "seconds without progress while a rank waits for others, after which the job stops and reports where",
        ge=1,
        most=SECONDS,
    )
    rendezvous_s: int = setting(120, "seconds that ranks wait for the others at start-up", ge=1, most=SECONDS)
    timeout_s: int = setting(
        600, "torch's limit for one collective; start-up, evaluation and saving may take 90 % of it", ge=1, most=SECONDS
    )


class EvaluateConfig(Section):
    """Evaluations during the training and at its end."""

    every: int = setting(250, "steps between validations; 0: only at the end", ge=0, most=STEPS)
    tokens: int | None = setting(
        None,
        "validation tokens, rounded down to whole rows; null: 20 batches",
        ge=1,
        most=Most(10**10, "the evaluation would take days"),
    )
    prompts: tuple[str, ...] = setting(
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
    sample_every: int = setting(0, "steps between samples, with some at the end; 0: only at the end", ge=0, most=STEPS)
    sample_tokens: int = setting(16, "tokens per sample", ge=1, most=Most(10**5, "a longer sample takes hours"))
    core_every: int = setting(0, "steps between CORE evaluations, with one at the end; 0: none", ge=0, most=STEPS)
    core_bundle: str | None = setting(
        None, "folder or zip with CORE's tasks; null: nanochat's, downloaded once into data/"
    )
    core_max_per_task: int | None = setting(500, "examples of CORE per task, as nanochat; null: all", ge=1, most=STEPS)
    core_tasks: tuple[str, ...] | None = setting(
        None, "labels of CORE's tasks to evaluate; null: all in the bundle", min_length=1
    )
    core_crop: bool = setting(
        False, "crop prompts of CORE to model.sequence_len; false: up to ten times as long, as nanochat does"
    )
    core_unfit: Literal["refuse", "leave_out"] = setting(
        "refuse", "questions of CORE that do not fit the model: refuse before anything starts, or leave out and count"
    )


class CheckpointConfig(Section):
    """When checkpoints are saved, and which are kept."""

    every: int = setting(1000, "steps between checkpoints; 0: only at the end", ge=0, most=STEPS)
    keep_last: int | None = setting(None, "newest checkpoints to keep; null: all", ge=1, most=STEPS)
    keep_every: int | None = setting(
        None, "with keep_last: also keep those at multiples of this many steps", ge=1, most=STEPS
    )
    background: bool = setting(True, "write while training continues, from a copy of the state in host memory")
    stop_s: float = setting(
        25.0,
        "seconds for step and save after SIGTERM before the job ends without; launchers kill after 30",
        gt=0,
        most=SECONDS,
    )


class LogConfig(Section):
    """What is logged, and where."""

    every: int = setting(1, "steps between console lines and metrics", ge=1, most=STEPS)
    wandb: Literal["off", "online", "offline"] = setting("off", "also send metrics to Weights & Biases")
    wandb_project: str = setting("megachat", "Weights & Biases project")
    probe: str | None = setting(None, "file of `megachat probe` to predict the step; null: a known GPU's data sheet")
