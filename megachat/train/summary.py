"""The end of a job's log: what was trained, how fast, where it is, and commands to continue with."""

import contextlib
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megachat.activity import duration
from megachat.config import Config
from megachat.console import styled
from megachat.errors import RESUME_AUTO, how_to_resume
from megachat.files import CONFIG_NAME, readable_metrics
from megachat.kernels.choice import Kernels
from megachat.planning.plan import Plan
from megachat.planning.step_time import UNTIMED_STEPS
from megachat.text import text_table
from megachat.train.trainer import Trainer

LOW_MFU = 40.0  # per cent, below which likely causes are listed
_SMALL_MICRO_BATCH = 16_384  # tokens
_LAUNCHED = {
    "deepspeed": "deepspeed --num_accelerators {ranks} --module megachat",
    "torchrun": "torchrun --nproc-per-node {ranks} -m megachat",
    "mpirun": "mpirun -n {ranks} python -m megachat",
}


@dataclass(frozen=True)
class RunHistory:
    """What a run's metrics.jsonl has of the whole run, earlier jobs included.

    bpb: (step, value) of each validation. core: the last CORE metric. mfu: the mean over the time of logged steps, in
    per cent; None without a known peak. peak_bytes: rank 0's memory.
    """

    bpb: Sequence[tuple[int, float]]
    core: float | None
    mfu: float | None
    peak_bytes: int | None


def read_history(run_folder: Path) -> RunHistory:
    """Reads metrics.jsonl; lines that cannot be read are left out."""
    bpb, core, peak = list[tuple[int, float]](), None, None
    timed = list[tuple[int, float, float]]()  # step, MFU, seconds
    for line in readable_metrics(run_folder):
        with contextlib.suppress(ValueError, TypeError, LookupError):
            if "val/bpb" in line:
                bpb.append((line["step"], float(line["val/bpb"])))
            core = line.get("core_metric", core)
            peak = max(line.get("train/peak_memory_bytes", 0), peak or 0) or None
            if "train/mfu" in line:
                timed.append((line["step"], line["train/mfu"], line["train/dt"]))
    timed = [entry for entry in timed if entry[0] >= UNTIMED_STEPS] or timed
    seconds = sum(dt for _, _, dt in timed)
    mfu = sum(mfu * dt for _, mfu, dt in timed) / seconds if seconds else None
    return RunHistory(bpb, core, mfu, peak)


def summary_rows(trainer: Trainer, startup_s: float, total_s: float) -> list[tuple[str, str]]:
    """Returns (label, text) of the run as it is now. startup_s, total_s: of this job."""
    run, state, plan, history = trainer.run, trainer.state, trainer.run.plan, read_history(trainer.run.folder)
    rows = []
    if history.bpb:
        (first, begin), (last, end), best = history.bpb[0], history.bpb[-1], min(value for _, value in history.bpb)
        text = f"{begin:.4f} at step {first} to {end:.4f} at step {last}" if len(history.bpb) > 1 else f"{end:.4f}"
        rows.append(("validation bpb", text + (f" (best {best:.4f})" if best < end else "")))
    if history.core is not None:
        rows.append(("CORE", f"{history.core:.4f}"))
    steps = state.step - trainer.first_step
    rate = f"; {steps * plan.tokens_per_step / trainer.steps_s:,.0f} per second" if trainer.steps_s else ""
    part = f" ({steps} of them in this job)" if trainer.first_step else ""
    rows.append(("tokens", f"{state.training_flops // plan.flops_per_token:,} in {state.step} steps{part}{rate}"))
    times = f"start-up {duration(startup_s)}, steps {duration(trainer.steps_s)}, rest evaluation, saving and checks"
    rows.append(("time", f"{duration(total_s)}: {times}"))
    if trainer.first_step:
        timed = f"{duration(state.training_s)} in steps after the first {UNTIMED_STEPS}"
        rows.append(("whole run", f"{timed}, earlier jobs included"))
    if history.mfu is not None:
        rows.append(("MFU", f"{history.mfu:.1f} % mean of the logged steps"))
        if history.mfu < LOW_MFU:
            causes = likely_causes(run.config, plan, run.kernels)
            rows += [("", f"below {LOW_MFU:.0f} %; a likely cause: {cause}") for cause in causes]
            rows.append(("", "in a clone, `megachat bench profile` shows where the time of a step goes"))
    if history.peak_bytes:
        rows.append(("peak memory", f"{history.peak_bytes / 1e9:.2f} GB on rank 0"))
    reader = "rank 0 has read" if run.mesh.data.size > 1 else "were read"
    rows.append(("cropped", f"{run.loader.cropped_share:.1%} of the tokens that {reader}"))
    if saving := trainer.save_cost.row:
        rows.append(("saving", saving))
    if checks := trainer.check_cost.row:
        rows.append(("checks", checks))
    if state.skipped_steps:
        rows.append(("skipped", f"{state.skipped_steps} step(s), whose loss or gradient was not finite"))
    if state.rewinds:
        left_out = len(run.loader.left_out)
        rows.append(
            ("rewound", f"{state.rewinds} time(s) to a checkpoint; the rows of {left_out} step(s) are left out")
        )
    rows.append(("run folder", str(run.folder)))
    return rows


def likely_causes(config: Config, plan: Plan, kernels: Kernels) -> list[str]:
    """Returns why a GPU may compute slower than it could with this configuration."""
    layout, micro_tokens = plan.layout, plan.micro_rows * plan.dims.sequence_len
    causes = []
    if not config.precision.compile:
        causes.append("precision.compile is off")
    if kernels.attention.warning:
        causes.append(f"attention {kernels.attention.name}: {kernels.attention.warning}")
    if micro_tokens < _SMALL_MICRO_BATCH:
        causes.append(f"micro-batches of {micro_tokens:,} tokens are small: raise batch.micro_rows")
    if layout.pipeline > 1 and plan.bubble > 0.1:
        causes.append(f"the pipeline bubble is {plan.bubble:.0%} of a step: use more micro-batches or fewer stages")
    if layout.tensor > 1:
        causes.append(f"the tensor axis of {layout.tensor} communicates in every layer")
    if config.batch.recompute != "none":
        causes.append(f"batch.recompute={config.batch.recompute} computes activations twice")
    return causes or ["the model is small for this GPU, or it waits for other ranks"]


def next_commands(trainer: Trainer, launcher: str, local_ranks: int, *, stopped: bool) -> list[str]:
    """Returns three commands to copy; the first one continues a run that is not finished. stopped: on request."""
    run, finished = trainer.run, trainer.state.step >= trainer.run.plan.steps
    program = "megachat" if shutil.which("megachat") else "python -m megachat"
    folder, world = shlex.quote(str(run.folder)), run.mesh.world.size
    evaluate = f"{program} evaluate --checkpoint {folder} --bpb"
    generate = f'{program} generate --checkpoint {folder} --prompt "..."'
    if finished and not stopped:
        return [generate, evaluate, f"{program} inspect {folder}"]
    if (again := how_to_resume()) != RESUME_AUTO:
        return [again, generate, f"{program} inspect {folder}"]
    config = shlex.quote(str(run.folder / CONFIG_NAME)) + ("" if stopped else " --set horizon.stop_step=null")
    if world == 1:
        start = program
    elif local_ranks == world and launcher in _LAUNCHED:
        start = _LAUNCHED[launcher].format(ranks=world)
    else:
        return ["the command that started the job, with --resume auto", generate, f"{program} inspect {folder}"]
    return [f"{start} pretrain --config {config} --resume auto", generate, f"{program} inspect {folder}"]


def log_end(trainer: Trainer, rows: Sequence[tuple[str, str]], commands: Sequence[str], *, stopped: bool) -> None:
    """Logs how the job ended, the rows of the summary (label, text), and commands to continue with."""
    state, log = trainer.state, trainer.metrics.log
    trainer.metrics.close_bar()
    best = "" if state.min_val_bpb is None else f", best validation bpb {state.min_val_bpb:.6f}"
    end = f"finished step {state.step}{best}"
    if state.step < (steps := trainer.run.plan.steps):
        end = f"stopped at horizon.stop_step, after step {state.step} of {steps}{best}: {how_to_resume()} continues"
    if stopped:
        end = f"stopped after step {state.step}, which is saved: continue with {how_to_resume()}"
    log(styled(end, "bold"))
    table = text_table([(f"  {label}", text) for label, text in rows])
    for line in (*table, "next:", *(f"  {command}" for command in commands)):
        log(line)
