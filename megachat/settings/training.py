"""Settings of the training: data, batch, horizon, optimizer."""

from typing import Annotated, Literal, get_args

from pydantic import Field

from megachat.config_checks import BATCH, MOMENT, RANKS, RATE, STEPS, THREADS, Most, Section, setting

_Recompute = Literal["none", "selective", "block"]
RECOMPUTE: tuple[_Recompute, ...] = get_args(_Recompute)  # each needs less memory and more time than the one before


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
    """Batch size: any two of tokens, micro_rows and accumulation determine the third."""

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
    recompute: _Recompute = setting(
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


_Factor = Annotated[float, Field(gt=0, le=1e6)]
_Beta = Annotated[float, Field(ge=0, lt=1)]
Betas = tuple[_Beta, _Beta]


class OptimizerConfig(Section):
    """nanochat's optimizer settings, before the plan's scaling rules."""

    matrix_lr: float = setting(0.02, "rate of Muon, before the rules for batch and shape", ge=0, most=RATE)
    embedding_lr: float = setting(0.3, "rate of the embedding (wte); value embeddings take half of it", ge=0, most=RATE)
    unembedding_lr: float = setting(0.008, "rate of the head (lm_head)", ge=0, most=RATE)
    scalar_lr: float = setting(0.5, "rate of the x0 lambdas; resid lambdas take a hundredth of it", ge=0, most=RATE)
    smear_lr: float = setting(0.2, "rate of smear gate, smear and backout lambda; not scaled by batch", ge=0, most=RATE)
    norm_scale_lr: float = setting(0.005, "rate of the learned scales of norms (model.norm_scales)", ge=0, most=RATE)
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
    z_loss: float = setting(
        0.0,
        "adds z_loss * mean(log(sum of the logits' exponentials)^2) to what is minimized, not to the logged loss",
        ge=0,
        most=Most(1, "PaLM has 1e-4; this would outweigh the cross entropy"),
    )
    qk_clip: float = setting(
        0.0,
        "largest attention logit that the learned scales of queries and keys may allow; it needs query and key in "
        "model.norm_scales, because logits of normed queries and keys without scales are bounded; 0: off",
        ge=0,
        most=Most(1e6, "such a logit clips nothing; 0 is off"),
    )
    resid_betas: Betas = setting((0.8, 0.95), "AdamW's betas for the resid lambdas and the scales of norms")
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
    ramp: tuple[_Factor, _Factor] | None = setting(
        None,
        "learning-rate range test: rates are multiplied by a factor that rises exponentially from the first number in "
        "the first step to the second in the last; null: off",
    )
    ramp_rates: list[str] = setting([], "rates that the ramp multiplies, such as matrix and embedding; empty: all")
    final_lr_fraction: float = setting(
        0.05,
        "rate multiplier at the end of the decay, which is one step after the last one: also with 0 every step trains",
        ge=0,
        le=1,
    )
