"""What was asked: frozen, strict settings. A file holds only what differs from these defaults; unknown keys are refused."""

import difflib
import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic_core import PydanticCustomError

from megachat.errors import UserError
from megachat.planning.dimensions import NORM_EPSILON, QK_SCALE, ROTARY_BASE

_FP8_WITHOUT_EQUIVALENT = {
    "rowwise": "scales by row have no equivalent in Transformer Engine: set tensorwise, or blockwise, which is finer",
    "delayed": "delayed scaling keeps a history of maxima that no checkpoint here holds: set tensorwise, which takes each tensor's own maximum",
    "mxfp8": "MXFP8 needs a Blackwell GPU and is not supported: set blockwise",
    "nvfp4": "four bits are not supported: set blockwise",
}


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


class RunConfig(_Section):
    """Names and places of the run."""

    name: str | None = Field(None, description="run folder's name; none: the config file's name")
    folder: str = Field("runs", description="where run folders are made")
    seed: int = Field(42, ge=0, description="keys the initial weights; sampling too")


class ModelConfig(_Section):
    """Sizes; nearly all follow from depth."""

    depth: int = Field(
        12, ge=1, le=1000, description="number of blocks; width, heads, batch, steps and rates follow from it"
    )
    aspect_ratio: int = Field(64, ge=1, description="width a block before rounding up to whole heads")
    head_size: int = Field(128, ge=2, multiple_of=2, description="channels a head")
    kv_heads: int | None = Field(None, ge=1, description="key/value heads; none: as many as query heads")
    sequence_len: int = Field(2048, ge=2, description="tokens a row")
    vocab_size: int | None = Field(None, ge=1, description="tokens in the vocabulary; none: the tokenizer's")
    window_pattern: str = Field(
        "SSSL",
        pattern="^[SL]+$",
        description="attention windows tiled over blocks: S quarter, L whole; the last is always L",
    )
    rotary: Literal["slices", "chunk"] = Field("slices", description="how halves of a head are taken; same maths")
    rotary_base: float = Field(ROTARY_BASE, gt=1, description="base of the rotary frequencies")
    qk_scale: float = Field(QK_SCALE, gt=0, description="factor on normed queries and keys")
    norm_epsilon: float = Field(NORM_EPSILON, gt=0, description="added to the mean square in every norm")
    value_embeddings: bool = Field(True, description="gated value embeddings on every other block")
    lambdas: Literal["learned", "neutral"] = Field(
        "learned",
        description="residual mix, smear and backout; neutral: without effect and not trained, as in transformers' NanoChat",
    )


class DataConfig(_Section):
    """Where rows come from, and their order."""

    folder: str = Field("data/python", description="parquet shards with a text column; the last is validation")
    tokenizer: str = Field("data/tokenizer", description="folder with the rank file and its JSON")
    streams: int = Field(8, ge=1, description="packing streams; part of the order of rows, not of the layout")
    buffer_documents: int = Field(1000, ge=1, description="documents a stream chooses from")
    shuffle: bool = Field(False, description="visit row groups in a seeded order, another one each epoch")
    tokenizer_threads: int = Field(2, ge=1, description="threads that tokenize ahead")
    prefetch_steps: int = Field(2, ge=1, description="steps packed ahead in the background")
    resume: Literal["exact", "restart"] = Field(
        "exact",
        description="when documents cannot go on where they stopped: refuse, or restart with the first; where they can they always do",
    )


class BatchConfig(_Section):
    """Any two of the three settle the third."""

    tokens: int | None = Field(
        None,
        ge=1,
        description="tokens a step over all ranks; none: from the horizon, or micro_rows x accumulation x ranks",
    )
    micro_rows: int | None = Field(None, ge=1, description="rows a rank works on at once; none: solved")
    accumulation: int | None = Field(None, ge=1, description="micro-batches a step; none: solved")
    recompute: Literal["none", "selective", "block"] = Field(
        "none",
        description="what a block computes again in the backward pass instead of keeping it: nothing, its MLP, or all; less memory, more time",
    )


class HorizonConfig(_Section):
    """How long to train."""

    steps: int | None = Field(None, ge=1, description="optimizer steps; wins over flops")
    flops: float | None = Field(None, gt=0, description="training FLOPs; wins over ratio")
    ratio: float = Field(12.0, gt=0, description="tokens a scaling parameter")
    stop_step: int | None = Field(None, ge=1, description="stop and save here, with the schedules of the whole horizon")


class OptimizerConfig(_Section):
    """nanochat's settings, before the scaling rules of the plan."""

    matrix_lr: float = Field(0.02, ge=0, description="Muon, before the batch and shape rules")
    embedding_lr: float = Field(0.3, ge=0, description="wte; value embeddings take half of it")
    unembedding_lr: float = Field(0.008, ge=0, description="lm_head")
    scalar_lr: float = Field(0.5, ge=0, description="x0 lambdas; resid lambdas take a hundredth of it")
    smear_lr: float = Field(0.2, ge=0, description="smear gate and lambda, backout lambda; not scaled by batch")
    weight_decay: float = Field(0.28, ge=0, description="Muon's cautious decay before the horizon rule")
    scale_to_batch: bool = Field(
        True, description="scale rates and Muon's decay from the d12 reference batch and horizon to this run's"
    )
    muon_multiplier: Literal["rows_over_cols", "flipped"] | dict[str, float] = Field(
        "rows_over_cols", description="rate multiplier by matrix: a rule, or name pattern -> number"
    )
    gradient_wire: Literal["auto", "bfloat16", "float32"] = Field(
        "auto", description="Muon's gradients between ranks; auto: the compute dtype"
    )
    clip_norm: float = Field(0.0, ge=0, description="clip the joint gradient norm; 0: off")
    warmup_steps: int = Field(40, ge=0, description="linear warm-up of the rates")
    warmdown_ratio: float = Field(0.65, ge=0, le=1, description="share of the steps in the final linear decay")
    final_lr_fraction: float = Field(0.05, ge=0, le=1, description="rate multiplier at the last step")


class PrecisionConfig(_Section):
    """Dtypes and compilation."""

    compute: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto", description="dtype of activations; auto: bfloat16 where native"
    )
    loss_scale: float = Field(65536.0, gt=0, description="first loss scale of float16")
    loss_scale_window: int = Field(1000, ge=1, description="good steps before float16's loss scale doubles")
    compile: bool = Field(False, description="torch.compile the blocks; the first step then takes long")
    fp8: Literal["off", "tensorwise", "blockwise"] = Field(
        "off",
        description="matrix products of training in FP8, with a scale a tensor or a scale a tile of 128 numbers; needs bfloat16",
    )
    fp8_backend: Literal["auto", "te", "torch"] = Field(
        "auto", description="Transformer Engine or torch; auto: te if it works; the log says why"
    )
    fp8_head: bool = Field(True, description="with fp8: lm_head too")
    attention: Literal["auto", "te", "flash3", "flash2", "flash4", "flex", "sdpa", "windowed"] = Field(
        "auto", description="attention kernel; auto: the fastest that is here and exact, and the log says why"
    )

    @field_validator("fp8", mode="before")
    @classmethod
    def _known_recipe(cls, asked):
        if isinstance(asked, str) and asked in _FP8_WITHOUT_EQUIVALENT:
            raise PydanticCustomError("fp8_recipe", "{told}", {"told": _FP8_WITHOUT_EQUIVALENT[asked]})
        return asked


class ParallelConfig(_Section):
    """Axes of the mesh; the data axis takes the remaining ranks."""

    tensor: int = Field(1, ge=1, description="ranks that share each matrix")
    sequence: bool = Field(
        False, description="between tensor-parallel regions each rank keeps its share of the tokens only"
    )
    pipeline: int = Field(1, ge=1, description="stages that share the blocks")
    stall_s: int = Field(
        120,
        ge=1,
        description="seconds without any progress, one rank waiting for others, after which the job stops and says where",
    )
    rendezvous_s: int = Field(120, ge=1, description="seconds that the first ranks wait at start-up for the others")
    timeout_s: int = Field(
        600,
        ge=1,
        description="torch's limit for one collective; start-up, evaluation and saving may take nine tenths of it",
    )


class EvaluateConfig(_Section):
    """What is measured on the way and at the end."""

    every: int = Field(250, ge=0, description="steps between validations; 0: only at the end")
    tokens: int | None = Field(
        None, ge=1, description="tokens of validation text, rounded down to whole rows; none: 20 batches"
    )
    prompts: tuple[str, ...] = Field(
        (
            "The capital of France is",
            "The chemical symbol of gold is",
            "If yesterday was Friday, then tomorrow will be",
            "The opposite of hot is",
            "The planets of the solar system are:",
            "My favorite color is",
            "If 5*x + 3 = 13, then x is",
        ),
        description="continued at the end of the run; empty: no samples",
    )
    sample_tokens: int = Field(16, ge=1, description="tokens a sample")
    core_every: int = Field(
        0, ge=0, description="steps between evaluations of CORE, which is then also made at the end; 0: none"
    )
    core_bundle: str | None = Field(
        None, description="folder or zip with the metric's tasks; none: nanochat's, downloaded once into data/"
    )
    core_max_per_task: int = Field(500, ge=1, description="examples of a task; nanochat's on the way")
    core_tasks: tuple[str, ...] | None = Field(
        None, min_length=1, description="labels of the tasks; none: all of the bundle"
    )


class CheckpointConfig(_Section):
    """When state is saved."""

    every: int = Field(1000, ge=0, description="steps between checkpoints; 0: only at the end")
    keep_last: int | None = Field(
        None, ge=1, description="newest checkpoints that stay when a new one is complete; none given: all stay"
    )
    keep_every: int | None = Field(
        None, ge=1, description="with keep_last: checkpoints of multiples of this many steps stay as well"
    )
    background: bool = Field(
        True, description="write while training goes on, from a copy in host memory as large as the state"
    )
    stop_s: float = Field(
        25.0,
        gt=0,
        description="seconds for step and save after SIGTERM, before the job ends without; launchers kill after 30",
    )


class LogConfig(_Section):
    """What is told, and where."""

    every: int = Field(1, ge=1, description="steps between console lines and metrics")
    wandb: Literal["off", "online", "offline"] = Field("off", description="also send metrics to Weights & Biases")
    wandb_project: str = Field("megachat", description="project there")


class Config(_Section):
    """Everything a run was asked for; see each section's fields."""

    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    batch: BatchConfig = BatchConfig()
    horizon: HorizonConfig = HorizonConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    precision: PrecisionConfig = PrecisionConfig()
    parallel: ParallelConfig = ParallelConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()


def known_keys() -> list[str]:
    """Every `section.key` there is."""
    return [
        f"{section}.{key}" for section, field in Config.model_fields.items() for key in field.annotation.model_fields
    ]


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """The settings of a JSON file with `section.key=value` overrides on top (values are JSON; what is not JSON is a string).

    Raises UserError with one line for each mistake: file missing or not JSON, unknown, duplicate or mistyped keys, values out of range.
    """
    path = Path(path)
    mistakes: list[str] = []
    try:
        asked = json.loads(
            path.read_text(encoding="utf-8"), object_pairs_hook=lambda pairs: _no_duplicates(pairs, path, mistakes)
        )
    except OSError as error:
        raise UserError(
            f"{path}: cannot read the config ({error.strerror or error}); name an existing JSON file, as configs/d4_cpu.json"
        ) from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file; a config is JSON in UTF-8") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not JSON at line {error.lineno} column {error.colno}: {error.msg}") from None
    if not isinstance(asked, dict):
        raise UserError(f'{path}: a config is a JSON object of sections, as {{"model": {{"depth": 12}}}}')
    return overridden(asked, str(path), overrides, mistakes)


def overridden(
    asked: dict, source: str, overrides: list[str] | tuple[str, ...], mistakes: list[str] | None = None
) -> Config:
    """The settings of a dictionary with overrides on top; raises as `load_config`. mistakes: found before, told with the others."""
    asked, mistakes = json.loads(json.dumps(asked)), [] if mistakes is None else mistakes
    for override in overrides:
        _apply_override(asked, override, mistakes)
    return _validated(asked, source, mistakes)


def _no_duplicates(pairs: list[tuple[str, Any]], path: Path, mistakes: list[str]) -> dict[str, Any]:
    for key in sorted({key for key, _ in pairs if [other for other, _ in pairs].count(key) > 1}):
        mistakes.append(f"{path}: key {key!r} is given twice in one object; keep one")
    return dict(pairs)


def _apply_override(asked: dict[str, Any], override: str, mistakes: list[str]) -> None:
    name, equals, text = override.partition("=")
    section, dot, key = name.strip().partition(".")
    if not (equals and dot and section and key):
        mistakes.append(f"--set {override}: give section.key=value, as --set model.depth=12")
        return
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = text
    inner = asked.setdefault(section, {})
    if isinstance(inner, dict):
        inner[key] = value


def _validated(asked: dict[str, Any], source: str, mistakes: list[str]) -> Config:
    config = None
    try:
        config = Config.model_validate_json(json.dumps(asked))
    except ValidationError as error:
        mistakes += [_one_line(source, problem) for problem in error.errors()]
    if mistakes:
        raise UserError("\n".join(dict.fromkeys(mistakes)))
    return config


def _one_line(source: str, problem: dict[str, Any]) -> str:
    location = [str(part) for part in problem["loc"]]
    name = ".".join(location[:2])
    if problem["type"] == "extra_forbidden":
        candidates = list(Config.model_fields) if len(location) == 1 else known_keys()
        elsewhere = [
            key for key in candidates if key.split(".")[-1] == location[-1]
        ]  # the right key in the wrong section
        near = elsewhere[:1] or difflib.get_close_matches(name, candidates, n=1, cutoff=0.5)
        return f"{source}: unknown key {name}" + (
            f"; did you mean {near[0]}?" if near else "; see megachat/config.py for all keys"
        )
    text = problem["msg"].replace("Input should", "should")
    return f"{source}: {name} is {json.dumps(problem['input'])} but {text}"


def save_config(config: Config, path: str | Path) -> None:
    """Write only what differs from the defaults, so that the file can be run again as it is."""
    differences = config.model_dump(mode="json", exclude_defaults=True)
    Path(path).write_text(json.dumps(differences, indent=2) + "\n", encoding="utf-8")
