"""Compares a run that was saved, ended and loaded with one that never stopped: what tools/verify.py --resume does.

Real jobs: torchrun starts launch/pretrain.py on the config's data, with every file, hash and check of a long run.

A run that continues on another layout is compared with its continuation on the first one, both with rates of 0. AdamW
takes a step of full size where a gradient is rounding noise, so otherwise the verdict would depend on the rates. The
weights stay those that were saved, to the bit. The losses and moments of each step are those of equal weights.
"""

import math
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from megachat.activity import announced
from megachat.checkpoint.facts import checkpoint_name
from megachat.config import Config, config_from_values, save_config
from megachat.convert.architecture import weight_shapes
from megachat.convert.differences import CheckpointDifference, compare_checkpoints
from megachat.convert.megachat import open_megachat
from megachat.convert.reader import CheckpointReader
from megachat.device import choose_compute_dtype, this_device
from megachat.errors import UserError
from megachat.files import CHECKPOINTS, LOADER, RANDOM
from megachat.installation import pretrain_program
from megachat.job.local_ranks import run_with_torchrun, set_options
from megachat.kernels.choice import choose_fp8, compile_problem
from megachat.planning.layouts import layout_name
from megachat.planning.plan import RATES, Plan, resolve_plan
from megachat.programs.verify_layout import (
    LEAST_SCALE,
    LOSS_TOLERANCE,
    Comparison,
    compare_values,
    verification_config,
)
from megachat.studies.metrics import read_metrics

STOP = 2  # steps before the first resume, and of each job after it
# Relative to the largest element of a moment that is linear in gradients, and of Muon's second moment. Without the
# warming up of verify_layout, gradients and their orthogonalization magnify rounding: the steps are the first ones from
# nanochat's zero matrices. A moment that was lost or mixed up differs by its own size.
STATE_TOLERANCE = 1e-4
AVERAGE_LOSS = "loop.smooth_loss"
SECOND_MOMENT_TOLERANCE = 1e-2
_RATE_KEYS = tuple(dict.fromkeys(rule.setting for rule in RATES.values()))


@dataclass(frozen=True)
class ResumeDifference:
    """Something that is not equal to the bit. step: training steps taken when it was seen. within: it is rounding, as
    another layout may cause. description: the difference in words."""

    step: int
    name: str
    description: str
    relative: float
    within: bool

    def as_json(self) -> dict:
        """Returns the values under the keys of the certificate, whose format calls the description "told"."""
        values = asdict(self)
        return {"step": values.pop("step"), "name": values.pop("name"), "told": values.pop("description")} | values


def resume_config(config: Config, base: Config, rows: int, layout: dict[str, int], *, exact: bool) -> Config:
    """Returns the config of the jobs on a layout. base: from `verification_config`. rows: per step. exact: with the
    configured precision, otherwise in float32."""
    sections = base.model_dump(mode="json")
    sections["parallel"] |= {"tensor": layout["tensor"], "pipeline": layout["pipeline"]}
    sections["batch"] |= {"tokens": rows * config.model.sequence_len, "micro_rows": 1, "accumulation": None}
    if exact:
        sections["precision"] = available_precision(config)
    sections["evaluate"] |= {"every": 0}
    sections["log"] |= {"every": 1, "wandb": "off", "tensorboard": False, "trackio": False}
    sections["data"]["resume"] = "exact"
    return config_from_values(sections, "the scaled config")


def available_precision(config: Config) -> dict:
    """Returns the configured precision with this machine's kernels, without FP8 or torch.compile if it has none."""
    precision = config.precision.model_dump(mode="json") | {"attention": "auto", "fp8_backend": "auto"}
    device = this_device()
    precision["compile"] &= compile_problem(device) is None
    try:
        choose_fp8(precision["fp8"], "auto", device, *choose_compute_dtype(precision["compute"], device))
    except UserError:
        precision["fp8"] = "off"
    return precision


def resolve_without_fp8_if_needed(config: Config, world: int, vocab_size: int) -> tuple[Config, Plan]:
    """Returns (config, plan), without FP8 if micro-batches of one row or the scaled model do not allow it. Raises
    UserError."""
    without = config.changed("precision", fp8="off")
    plan = resolve_plan(without, world, vocab_size)
    try:
        return config, resolve_plan(config, world, vocab_size)
    except UserError:
        return without, plan


def train_to_step(
    config: Config, run: Path, world: int, stop_step: int, *, every: int, resume: bool = False, still: bool = False
) -> None:
    """Trains in the run folder to `stop_step`, saving there and every `every` steps. Raises UserError with the job's
    error if it fails. still: with rates of 0."""
    run.parent.mkdir(parents=True, exist_ok=True)
    path = run.with_name(run.name + ".json")
    save_config(config, path)
    settings = [
        f"run.folder={run.parent}",
        f"run.name={run.name}",
        f"horizon.stop_step={stop_step}",
        f"checkpoint.every={every}",
        f"checkpoint.keep_last={stop_step - STOP + 1}",
        "checkpoint.keep_every=null",
        *(f"optimizer.{rate}=0" for rate in _RATE_KEYS if still),
    ]
    program = [*pretrain_program(), "--config", str(path), *(["--resume", "auto"] if resume else [])]
    with announced(f"  the job {run.name}, to step {stop_step}"):
        run_with_torchrun(f"the job {run.name}", world, program + set_options(settings))


def compare_resumed_run(
    whole: Path, half: Path, resumed: Path, order: list[str], *, exact: bool, end: int = 2 * STOP
) -> tuple[str, list[ResumeDifference]]:
    """Returns ("bit-equal", "token-equal" or "different", everything that is not equal to the bit, in the order of
    training).

    whole: the run that never stopped, or the copy of `half` that continued with rates of 0 on the same layout; half:
    the one that stopped; resumed: its copy that continued. order: parameter names from the first layer to the last.
    exact: no rounding is allowed. end: steps of all jobs together.
    """
    differences = []
    whole_losses, half_losses, resumed_losses = (
        {line["step"]: line["train/loss_raw"] for line in read_metrics(run) if "train/loss_raw" in line}
        for run in (whole, half, resumed)
    )
    for step in range(end):
        expected, loss = whole_losses[step], (half_losses if step < STOP else resumed_losses).get(step, float("nan"))
        if loss != expected:
            relative, name = abs(loss - expected) / abs(expected), f"loss of step {step}"
            within = not exact and step >= STOP and relative <= LOSS_TOLERANCE
            differences.append(ResumeDifference(step, name, f"{name}: {loss!r}, not {expected!r}", relative, within))
        done = step + 1
        if done >= STOP:
            run = half if done == STOP else resumed
            one, other = (open_megachat(each / CHECKPOINTS / checkpoint_name(done)) for each in (whole, run))
            differences += _compare_states(one, other, done, order, exact=exact or done == STOP)
    if not differences:
        return "bit-equal", []
    return "token-equal" if all(entry.within for entry in differences) else "different", differences


def _compare_states(
    expected: CheckpointReader, actual: CheckpointReader, step: int, order: list[str], *, exact: bool
) -> list[ResumeDifference]:
    """Compares everything that two checkpoints hold. Random state belongs to ranks, so that only `exact` compares
    it."""
    entries = [
        entry for entry in compare_checkpoints(expected, actual) if entry.counts and (exact or entry.kind != RANDOM)
    ]
    tensors = [entry.name for entry in entries if entry.kind == "tensor"]
    rounding = {} if exact or not tensors else _compare_with_tolerance(expected, actual, tensors)
    differences = []
    for entry in sorted(entries, key=lambda entry: _training_order(entry, order)):
        rounded = rounding.get(entry.name)
        relative, within = (rounded.error, rounded.passed) if rounded else (entry.relative, False)
        if entry.name == AVERAGE_LOSS and not exact:  # a number, which rounds as the losses do
            average = float(entry.left)
            relative = abs(float(entry.right) - average) / abs(average)
            within = relative <= LOSS_TOLERANCE
        differences.append(ResumeDifference(step, entry.name, str(entry), relative, within))
    return differences


def _compare_with_tolerance(
    expected: CheckpointReader, actual: CheckpointReader, names: list[str]
) -> dict[str, Comparison]:
    """Compares tensors of runs whose weights did not change: each kind has its tolerance."""

    def kind(name: str) -> str:
        return str(name.split("/")[::2])  # of "adamw/NAME/exp_avg": "adamw" and "exp_avg"

    largest: dict[str, float] = {}
    for name, tensor in expected.tensors():
        largest[kind(name)] = max(largest.get(kind(name), 0.0), tensor.abs().max().item())
    return {
        name: compare_values(
            name,
            values,
            reference,
            least_scale=LEAST_SCALE * largest[kind(name)],
            tolerance=_tolerance(name),
        )
        for (name, reference), (_, values) in zip(expected.tensors(names), actual.tensors(names), strict=True)
    }


def _tolerance(name: str) -> float:
    if name.startswith("model/"):
        return 0.0
    return SECOND_MOMENT_TOLERANCE if name.endswith("/second_moment") else STATE_TOLERANCE


def _training_order(entry: CheckpointDifference, order: list[str]) -> tuple:
    """Returns a sort key: when in a step it is computed. Documents come first, then each layer's moments and weights,
    then counters."""
    if entry.kind == LOADER or entry.name == "ledger":
        return 0, not entry.name.endswith(": ledger"), entry.name
    kind, *rest = entry.name.split("/")
    if kind in ("model", "muon", "adamw", "rows") and rest and rest[0] in order:
        return 1, order.index(rest[0]), kind == "model", entry.name
    return 2, 0, entry.name


def verify_resumes(
    config: Config,
    layout: dict[str, int],
    onto: list[dict[str, int]],
    vocab_size: int,
    folder: Path,
    *,
    depth: int | None,
    rows: int,
    times: int = 1,
    profile: str | None = None,
) -> list[dict]:
    """Runs the job on a layout whole and in parts, those after the first on each layout of `onto`, or on the same one
    if there is none. Returns the certificates.

    rows: per data-parallel rank and step. times: resumes in a row. profile: "strict" compares to the bit, with the
    configured precision; "standard" allows rounding and runs in float32; None: strict on the same layout, standard on
    another. Raises UserError if a layout does not fit or a job fails.
    """
    exact, targets, end = not onto and profile != "standard", onto or [layout], STOP * (1 + times)
    strict = [sizes == layout and profile != "standard" for sizes in targets]
    total_rows = rows * math.lcm(*(sizes["data"] for sizes in (layout, *targets)))
    base = verification_config(config, **layout, depth=depth, rows_per_rank=1)  # for its model and horizon
    jobs = []
    for sizes in (layout, *targets):  # refuses what does not fit before anything is started
        job = resume_config(config, base, total_rows, sizes, exact=exact)
        jobs.append(resolve_without_fp8_if_needed(job, math.prod(sizes.values()), vocab_size))
    first, plan = jobs[0]
    if exact and first.precision.fp8 != config.precision.fp8:
        lacking = f"without FP8 (precision.fp8={config.precision.fp8})"
        print(f"remark: {lacking}, which this machine or the scaled model does not support", flush=True)
    print(
        f"{layout_name(layout)}: {plan.layout.world} ranks; depth {plan.dims.depth}, "
        f"{plan.parameters['total']:,} parameters, {total_rows} rows of {plan.dims.sequence_len} tokens per step; "
        f"{end} steps whole, and stopped after {' and '.join(str(step) for step in range(STOP, end, STOP))}",
        flush=True,
    )
    whole, half, still = folder / "whole", folder / "half", folder / "still"
    train_to_step(first, half, plan.layout.world, STOP, every=0)
    if any(strict):
        train_to_step(first, whole, plan.layout.world, end, every=1)
    if not all(strict):
        shutil.copytree(half, still)
        train_to_step(first, still, plan.layout.world, end, every=1, resume=True, still=True)
    order, certificates = list(weight_shapes(plan.dims)), []
    for sizes, same, (job, target) in zip(targets, strict, jobs[1:], strict=True):
        print(f"continued on {layout_name(sizes)}", flush=True)
        resumed = half.with_name("onto-" + layout_name(sizes).replace("=", "").replace(",", "-"))
        shutil.copytree(half, resumed)
        for stop in range(2 * STOP, end + 1, STOP):
            train_to_step(job, resumed, target.layout.world, stop, every=1, resume=True, still=not same)
        reference = whole if same else still
        verdict, differences = compare_resumed_run(reference, half, resumed, order, exact=same, end=end)
        settings = job.model_dump(mode="json", exclude_defaults=True)
        facts = {"layout": layout, "onto": sizes, "config": settings, "vocab_size": vocab_size}
        facts |= {"profile": "strict" if same else "standard", "times": times}
        certificates.append(facts | report_verdict(verdict, differences, exact=same, end=end))
    return certificates


def report_verdict(verdict: str, differences: list[ResumeDifference], *, exact: bool, end: int) -> dict:
    """Prints the verdict of a pair and returns it as JSON values."""
    first = next((entry for entry in differences if not entry.within), differences[0] if differences else None)
    if first is None:
        print(
            "  bit-equal: losses, documents, weights, both optimizers' state and counters after "
            f"{', '.join(map(str, range(STOP, end)))} and {end} steps"
        )
    elif verdict == "token-equal":
        print(
            "  token-equal: the same documents, the saved weights to the bit; with rates of 0, losses within "
            f"{LOSS_TOLERANCE:g}, moments within {STATE_TOLERANCE:g} (Muon's second {SECOND_MOMENT_TOLERANCE:g}); "
            f"first after {first.step} steps, {first.name}: {first.relative:.1e}"
        )
    else:
        print(f"  DIFFERENT: after {first.step} steps, first {first.description}")
    tolerances = {"loss": LOSS_TOLERANCE, "tensor": STATE_TOLERANCE, "second_moment": SECOND_MOMENT_TOLERANCE}
    return {
        "verdict": verdict,
        "passed": verdict == "bit-equal" or (verdict == "token-equal" and not exact),
        "tolerances": dict.fromkeys(tolerances, 0.0) if exact else tolerances,
        "first_difference": first and first.as_json(),
        "differences": [entry.as_json() for entry in differences],
    }
