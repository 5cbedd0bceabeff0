"""Does a run that was saved, ended and loaded equal one that never stopped? The part of tools/verify.py behind --resume.

Real jobs: torchrun starts launch/pretrain.py on the config's data, with every file, hash and check of a long run.
"""

import json
import math
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from megachat.checkpoint.facts import checkpoint_name
from megachat.config import Config, save_config
from megachat.convert.differences import Difference as Entry
from megachat.convert.differences import compare_checkpoints
from megachat.convert.megachat import open_megachat
from megachat.convert.reader import CheckpointReader
from megachat.device import choose_compute_dtype, this_device
from megachat.errors import UserError
from megachat.job.local_ranks import run_with_torchrun, set_options
from megachat.kernels.choice import choose_fp8, compile_problem
from megachat.planning.plan import Plan, resolve
from megachat.programs.verify import (
    FLIPPED_SHARE,
    LEAST_SCALE,
    LOSS_TOLERANCE,
    compared,
    parameter_order,
    verification_config,
)

ROOT = Path(__file__).resolve().parents[2]
STOP, END = 2, 4
# Relative to a tensor's largest element. Ten times that of verify.py's other part, which warms the model up: here the steps are the first ones from
# nanochat's zero matrices, whose nearly singular gradients magnify rounding. A moment that was lost, or another's, differs by its own size.
TENSOR_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Found:
    """One thing that is not equal to the bit. step: training steps done when it was seen. within: it is rounding, as another layout may do."""

    step: int
    name: str
    told: str
    relative: float
    within: bool


def resume_config(asked: Config, base: Config, rows: int, sizes: dict[str, int], *, exact: bool) -> Config:
    """The config of the jobs on a layout. base: `verification_config`'s. rows: of a step. exact: with the precision asked for, else float32."""
    sections = base.model_dump(mode="json")
    sections["parallel"] |= {"tensor": sizes["tensor"], "pipeline": sizes["pipeline"]}
    sections["batch"] = {"tokens": rows * asked.model.sequence_len, "micro_rows": 1, "accumulation": None}
    if exact:
        sections["precision"] = precision_here(asked)
    sections["evaluate"] |= {"every": 0}
    sections["log"] |= {"every": 1, "wandb": "off"}
    sections["data"]["resume"] = "exact"
    return Config.model_validate_json(json.dumps(sections))


def precision_here(asked: Config) -> dict:
    """The precision asked for by the kernels of this machine, which need not be the config's; without FP8 or torch.compile where it has none."""
    precision = asked.precision.model_dump(mode="json") | {"attention": "auto", "fp8_backend": "auto"}
    device = this_device()
    precision["compile"] &= compile_problem(device) is None
    try:
        choose_fp8(precision["fp8"], "auto", device, *choose_compute_dtype(precision["compute"], device))
    except UserError:
        precision["fp8"] = "off"
    return precision


def planned(config: Config, world: int, vocab_size: int) -> tuple[Config, Plan]:
    """The config as it can be planned: without FP8 where a row at a time, or the model scaled down, cannot have it. Raises UserError."""
    without = config.model_copy(update={"precision": config.precision.model_copy(update={"fp8": "off"})})
    plan = resolve(without, world, vocab_size)
    try:
        return config, resolve(config, world, vocab_size)
    except UserError:
        return without, plan


def run_job(config: Config, run: Path, world: int, stop_step: int, *, every: int, resume: bool = False) -> None:
    """Train in the run folder to `stop_step`, saving there and every `every` steps. Raises UserError with what the job said when it failed."""
    run.parent.mkdir(parents=True, exist_ok=True)
    path = run.with_name(run.name + ".json")
    save_config(config, path)
    settings = {
        "run.folder": run.parent,
        "run.name": run.name,
        "horizon.stop_step": stop_step,
        "checkpoint.every": every,
    }
    settings |= {"checkpoint.keep_last": END - STOP + 1, "checkpoint.keep_every": "null"}
    program = [str(ROOT / "launch" / "pretrain.py"), "--config", str(path)] + (["--resume", "auto"] if resume else [])
    run_with_torchrun(
        f"the job {run.name}", world, program + set_options([f"{name}={value}" for name, value in settings.items()])
    )


def losses(run: Path) -> dict[int, float]:
    """Step -> loss, as the run's metrics hold them."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}


def judge(whole: Path, half: Path, resumed: Path, order: list[str], *, exact: bool) -> tuple[str, list[Found]]:
    """("bit-equal", "token-equal" or "different", everything that is not equal to the bit, in the order of training).

    whole: the run that never stopped; half: the one that did; resumed: its copy that went on. order: the parameters' names from the first
    layer to the last. exact: the layout is the same, so that no rounding is allowed.
    """
    found, curves = [], [losses(run) for run in (whole, half, resumed)]
    for step in range(END):
        wanted, other = curves[0][step], curves[1 if step < STOP else 2].get(step, float("nan"))
        if other != wanted:
            relative = abs(other - wanted) / abs(wanted)
            within = not exact and step >= STOP and relative <= LOSS_TOLERANCE
            found.append(
                Found(step, f"loss of step {step}", f"loss of step {step}: {other!r}, not {wanted!r}", relative, within)
            )
        if step + 1 >= STOP:
            run, name = half if step + 1 == STOP else resumed, checkpoint_name(step + 1)
            pair = (open_megachat(each / "checkpoints" / name) for each in (whole, run))
            found += _states(*pair, step + 1, order, exact=exact or step + 1 == STOP)
    if not found:
        return "bit-equal", found
    return "token-equal" if all(entry.within for entry in found) else "different", found


def _states(
    wanted: CheckpointReader, other: CheckpointReader, step: int, order: list[str], *, exact: bool
) -> list[Found]:
    """What differs in everything that two checkpoints hold."""
    entries = [
        entry for entry in compare_checkpoints(wanted, other) if entry.counts and (exact or entry.kind != "random")
    ]  # it belongs to ranks
    rounding = {} if exact else _compared(wanted, other, [entry.name for entry in entries if entry.kind == "tensor"])
    entries.sort(key=lambda entry: _place(entry, order))
    found = []
    for entry in entries:
        rounded = rounding.get(entry.name)
        relative = rounded.error if rounded else entry.relative
        found.append(Found(step, entry.name, str(entry), relative, bool(rounded and rounded.passed)))
    return found


def _compared(wanted: CheckpointReader, other: CheckpointReader, names: list[str]) -> dict:
    """Tensors by name, held to what tools/verify.py allows other layouts: some elements of a weight may differ by a step's flipped sign, and
    moments follow."""
    if not names:
        return {}
    kinds = {name: name.split("/")[::2] for name in wanted.entries}  # ["adamw", "exp_avg"], ["model"]
    largest: dict[str, float] = {}
    for name, tensor in wanted.tensors():
        largest[str(kinds[name])] = max(largest.get(str(kinds[name]), 0.0), tensor.abs().max().item())
    return {
        name: compared(
            name,
            found,
            tensor,
            least_scale=LEAST_SCALE * largest[str(kinds[name])],
            share=FLIPPED_SHARE,
            tolerance=TENSOR_TOLERANCE,
        )
        for (name, tensor), (_, found) in zip(wanted.tensors(names), other.tensors(names), strict=True)
    }


def _place(entry: Entry, order: list[str]) -> tuple:
    """Where in a step it is made: rows first, then each layer's moments and weights, then counters."""
    if entry.kind == "loader" or entry.name == "ledger":
        return 0, not entry.name.endswith(": ledger"), entry.name
    kind, *rest = entry.name.split("/")
    if kind in ("model", "muon", "adamw") and rest and rest[0] in order:
        return 1, order.index(rest[0]), kind == "model", entry.name
    return 2, 0, entry.name


def verify_resumes(
    asked: Config, layout: dict[str, int], onto: list[dict[str, int]], arguments, vocab_size: int, folder: Path
) -> list[dict]:
    """Run the job on a layout whole and in two halves, the second on each layout of `onto`; returns the certificates of the pairs.

    arguments: rows, depth and onto of the command line. Raises UserError when a layout does not fit, or a job fails.
    """
    exact = not arguments.onto
    rows = arguments.rows * math.lcm(*(sizes["data"] for sizes in (layout, *onto)))
    short = verification_config(asked, **layout, depth=arguments.depth, rows_a_rank=1)  # its model and horizon
    plans, configs = [], []
    for sizes in (layout, *onto):  # refuses what does not fit before anything is started
        config, plan = planned(
            resume_config(asked, short, rows, sizes, exact=exact), math.prod(sizes.values()), vocab_size
        )
        configs.append(config)
        plans.append(plan)
    plan, order = plans[0], parameter_order(plans[0].dims)
    if exact and configs[0].precision.fp8 != asked.precision.fp8:
        print(
            f"remark: without FP8 (precision.fp8={asked.precision.fp8}), which this machine or the model scaled down does not have",
            flush=True,
        )
    print(f"{name_of(layout)}: {plan.layout.world} ranks; depth {plan.dims.depth}, {plan.parameters['total']:,} parameters, {rows} rows of "
          f"{plan.dims.sequence_len} tokens a step; {END} steps whole, and stopped after {STOP}", flush=True)  # fmt: skip
    whole, half = folder / "whole", folder / "half"
    run_job(configs[0], whole, plan.layout.world, END, every=1)
    run_job(configs[0], half, plan.layout.world, STOP, every=0)
    told = []
    for sizes, config, other in zip(onto, configs[1:], plans[1:], strict=True):
        print(f"gone on with on {name_of(sizes)}", flush=True)
        facts = {
            "layout": layout,
            "onto": sizes,
            "config": config.model_dump(mode="json", exclude_defaults=True),
            "vocab_size": vocab_size,
        }
        told.append(facts | verify_pair(whole, half, config, other, order, exact=sizes == layout))
    return told


def name_of(sizes: dict[str, int]) -> str:
    """As it is asked for: "dp=1,tp=2,pp=1"."""
    return f"dp={sizes['data']},tp={sizes['tensor']},pp={sizes['pipeline']}"


def verify_pair(whole: Path, half: Path, config: Config, plan: Plan, order: list[str], *, exact: bool) -> dict:
    """Go on from a copy of the half run on a layout, compare, print; returns the certificate of the pair."""
    layout = plan.layout
    resumed = half.with_name(f"onto-dp{layout.data}-tp{layout.tensor}-pp{layout.pipeline}")
    shutil.copytree(half, resumed)
    run_job(config, resumed, layout.world, END, every=1, resume=True)
    verdict, found = judge(whole, half, resumed, order, exact=exact)
    passed = verdict == "bit-equal" or verdict == "token-equal" and not exact
    first = next((entry for entry in found if not entry.within), found[0] if found else None)
    if verdict == "bit-equal":
        print(
            f"  bit-equal: losses, documents, weights, both optimizers' state and counters after {STOP}, {STOP + 1} and {END} steps"
        )
    elif verdict == "token-equal":
        print(f"  token-equal: the same documents, losses within {LOSS_TOLERANCE:g}, tensors within {TENSOR_TOLERANCE:g} "
              f"but for {FLIPPED_SHARE:.1%} of their elements; first after {first.step} steps, {first.name}: {first.relative:.1e}")  # fmt: skip
    else:
        print(f"  DIFFERENT: after {first.step} steps, first {first.told}")
    allowed = (
        {"loss": 0.0, "tensor": 0.0, "share": 0.0}
        if exact
        else {"loss": LOSS_TOLERANCE, "tensor": TENSOR_TOLERANCE, "share": FLIPPED_SHARE}
    )
    told = {"verdict": verdict, "passed": passed, "tolerances": allowed, "first_difference": first and asdict(first)}
    return told | {"differences": [asdict(entry) for entry in found]}
