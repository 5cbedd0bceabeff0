"""Settings of what a run leaves: its folder, evaluations, checkpoints, logs."""

from typing import Literal

from pydantic import field_validator

from megachat import config_checks
from megachat.config_checks import SECONDS, STEPS, Most, Section, setting


class RunConfig(Section):
    """Name and folder of the run."""

    name: str | None = setting(
        None, "name of the run folder; null: the config file's name", min_length=1, max_length=200
    )
    folder: str = setting("runs", "parent of the run folders")

    note: str | None = setting(None, "a remark, such as why the run has its settings: kept and logged", max_length=1000)

    _check_name = field_validator("name")(config_checks.check_run_name)
    seed: int = setting(
        42, "seed of initial weights and sampling", ge=0, most=Most(2**63 - 1, "torch's generators take 63 bits")
    )


class EvaluateConfig(Section):
    """Evaluations during the training and at its end."""

    every: int = setting(
        250, "steps between validations, with one before the first step; 0: only at the end", ge=0, most=STEPS
    )
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
    core_controls: bool = setting(
        False,
        "with CORE: also ask each example with another one's context, which shows what reading gains; twice as long",
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
    tensorboard: bool = setting(False, "also write metrics to tensorboard/ in the run folder")
    trackio: bool = setting(False, "also send metrics to Trackio: its local database, or TRACKIO_SPACE_ID")
    trackio_project: str = setting("megachat", "project in Trackio's database")
    report: bool = setting(False, "write report.html into the run folder at the end of a job; needs plotly")
    probe: str | None = setting(None, "file of `megachat probe` to predict the step; null: a known GPU's data sheet")
