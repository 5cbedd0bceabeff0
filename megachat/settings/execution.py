"""Settings of how a run executes: precision, kernels, compilation, the mesh, and what it does when it goes wrong."""

from typing import Literal

from pydantic import field_validator
from pydantic_core import PydanticCustomError

from megachat import config_checks
from megachat.config_checks import RANKS, SECONDS, STEPS, Most, Section, setting


class PrecisionConfig(Section):
    """Dtypes, kernels and compilation."""

    compute: Literal["auto", "bfloat16", "float16", "float32"] = setting(
        "auto",
        "dtype of activations; auto: bfloat16 if the device computes it natively, else float16 on a GPU or float32",
    )
    loss_scale: float = setting(
        65536.0, "initial loss scale of float16", gt=0, most=Most(2**40, "every float16 gradient would overflow")
    )
    loss_scale_window: int = setting(
        1000, "steps without overflow before float16's loss scale doubles", ge=1, most=STEPS
    )
    compile: bool = setting(False, "torch.compile the blocks; the first step takes long")
    compile_mode: Literal["default", "max-autotune"] = setting(
        "default", "with compile: max-autotune times several kernels for each matrix product and keeps the fastest"
    )
    head_chunk_mb: int | None = setting(
        None,
        "MiB of float32 logits that head and loss work on at a time; null: 8 on a CPU, 256 on a GPU or what fits",
        ge=1,
        most=Most(2**16, "no device has that much memory for the logits alone"),
    )
    optimizer_graph: bool = setting(
        False, "replay the update of Muon and AdamW as a CUDA graph; needs a GPU and one rank per pipeline stage"
    )
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


class ReliabilityConfig(Section):
    """Losses and gradients that are not finite, spikes, and checks of what the devices compute and store."""

    on_nonfinite: Literal["auto", "stop", "skip", "rewind"] = setting(
        "auto",
        "after a loss or gradient that is not finite; auto: stop for a loss, skip the update for a gradient; rewind: "
        "continue from the last checkpoint before the step, without its rows",
    )
    nonfinite_limit: int = setting(
        20, "updates skipped in a row, or rewinds of the run, after which it stops", ge=0, most=STEPS
    )
    capsules: int = setting(
        3,
        "steps with a loss or gradient that is not finite of which a run keeps rows and weights for `megachat replay`",
        ge=0,
        most=Most(1000, "each takes the space of the weights in float32"),
    )
    spike_sigma: float = setting(
        0.0,
        "log the documents of a step whose loss or gradient norm is this many deviations above the median of the last "
        "64 steps; 0: off",
        ge=0,
        most=Most(1000, "no step is that far off; 0 is off"),
    )
    replay_every: int = setting(
        0,
        "steps between replays: one micro-batch runs twice, and loss and gradients must be equal to the bit; 0: never",
        ge=0,
        most=STEPS,
    )
    replay_tolerance: float = setting(
        0.0,
        "largest difference that a replay accepts, as a share of a tensor's largest magnitude; above 0 only for "
        "kernels that are not deterministic",
        ge=0,
        most=Most(0.1, "a replay that accepts more hardly finds anything"),
    )
    hash_every: int = setting(
        0,
        "steps between comparisons of the ranks' copies of weights and optimizer state by their hashes; 0: never",
        ge=0,
        most=STEPS,
    )
