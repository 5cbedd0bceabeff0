"""What a run does about a loss or gradient that is not finite: it reports the step, and then continues, stops, or goes
back to an earlier checkpoint, as reliability.on_nonfinite says.
"""

import contextlib
import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from megachat.checkpoint.facts import checkpoint_name, checkpoint_step, read_facts
from megachat.checkpoint.resume import choose_checkpoint, newest_complete
from megachat.checkpoint.run_folder import follow_checkpoint
from megachat.errors import UserError, how_to_resume
from megachat.files import CHECKPOINTS
from megachat.parallel.build import LOSS_SCALE_MINIMUM
from megachat.parallel.collectives import on_all_ranks_or_raise
from megachat.train.build import Run
from megachat.train.capsule import write_capsule
from megachat.train.documents import build_loader, resume_documents
from megachat.train.fault_reports import fault_reports
from megachat.train.metrics import Metrics
from megachat.train.rank_reports import Report, ranks_text
from megachat.train.state import LoopState, load_state
from megachat.train.step import StepResult

Cause = Literal["loss", "gradient"]


class Fault(NamedTuple):
    """A step whose loss or gradient is not finite. sentence: what it is, and on which ranks. capsule: its folder, if
    there is one. saving: the state before the step is being saved.
    """

    sentence: str
    capsule: Path | None
    saving: bool


def handle_fault(
    run: Run, state: LoopState, result: StepResult, metrics: Metrics, saved_step: int | None
) -> Fault | None:
    """Reports a step whose loss or gradient is not finite, and counts it in the state; all ranks call it every step.

    Returns the fault if the run has to go back to a checkpoint, None if it continues. Raises UserError if it has to
    stop. saved_step: of the last save.
    """
    reliability, cause = run.config.reliability, find_fault(result.loss, result.norm, result.loss_scale)
    # auto limits every skipped update, also those that only lower float16's loss scale
    counts = result.skipped if reliability.on_nonfinite == "auto" else cause is not None
    state.skips_in_a_row = state.skips_in_a_row + 1 if counts else 0
    state.faults_in_a_row = state.faults_in_a_row + 1 if cause else 0
    if cause:
        fault = _report_fault(run, state, result, cause, metrics, saving=saved_step == state.step)
        action = chosen_action(reliability.on_nonfinite, cause, skipped=result.skipped)
        if action == "stop":
            raise _fault_error(run, state, fault)
        if fault.capsule:
            metrics.log(f"{fault.sentence}: `megachat replay {fault.capsule}` names the cause")
        if action == "rewind":
            if state.rewinds >= reliability.nonfinite_limit:
                raise _fault_error(run, state, fault, f"; the run went back {state.rewinds} times already")
            return fault
    if state.skips_in_a_row > reliability.nonfinite_limit:
        raise UserError(
            f"step {state.step}: the gradient was not finite for {state.skips_in_a_row} steps in a row, none of which "
            "changed a weight: lower the rates or use bfloat16"
        )
    return None


def find_fault(loss: float, norm: float, loss_scale: float) -> Cause | None:
    """Returns what is not finite. An overflow of float16's gradients is no fault while the loss scale can fall."""
    if not math.isfinite(loss):
        return "loss"
    return "gradient" if not math.isfinite(norm) and loss_scale <= LOSS_SCALE_MINIMUM else None


def chosen_action(policy: str, cause: Cause, *, skipped: bool) -> str:
    """Returns "stop", "skip" or "rewind". policy: reliability.on_nonfinite. skipped: no weight has changed.

    An update that was made cannot be skipped: then "skip" is "stop".
    """
    if policy == "auto":
        policy = "stop" if cause == "loss" else "skip"
    return "stop" if policy == "skip" and not skipped else policy


def _report_fault(
    run: Run, state: LoopState, result: StepResult, cause: Cause, metrics: Metrics, *, saving: bool
) -> Fault:
    """Returns the fault, with a capsule; of faults in a row only the first has one."""
    reports, capsule = fault_reports(run, result.gradients), None
    sentence = _fault_sentence(state.step, result, cause, reports)
    if state.faults_in_a_row == 1:  # the steps after it have the same weights
        with run.mesh.world.progress.long_running("writing a capsule"):
            capsule, problem = write_capsule(run, state, result, reports, sentence)
        if problem:
            metrics.log(problem)
    return Fault(sentence, capsule, saving)


def _fault_sentence(step: int, result: StepResult, cause: Cause, reports: Sequence[Report]) -> str:
    """Returns what is not finite, on which ranks, and whether a weight has changed. reports: of fault_reports."""
    if cause == "loss":
        ranks = [report for report in reports if isinstance(report["loss"], str)]
        what = f"the loss is {result.loss}"
    else:
        ranks = [report for report in reports if report["gradient"]]
        names = ", ".join(sorted({report["gradient"] for report in ranks})[:3])
        what = f"the gradient{' of ' if names else ''}{names} is not finite"
    changed = "this step changed no weight and the checkpoints are" if result.skipped else "the checkpoints are"
    return f"step {step}: {what} on {ranks_text(ranks) or 'no single rank'}; {changed} untouched"


def _fault_error(run: Run, state: LoopState, fault: Fault, reason: str = "") -> UserError:
    """Returns the error that ends the run, with how to continue. reason: why the run does not go back."""
    look = "look at the rows of this step"
    if fault.capsule:
        look = f"run `megachat replay {fault.capsule}`, which names the cause"
    start = f"continue with {how_to_resume()} and lower rates"
    if fault.saving or (run.folder / CHECKPOINTS / checkpoint_name(state.step)).exists():
        start = "start again with lower rates (no earlier checkpoint is left)"
        with contextlib.suppress(UserError):
            if earlier := newest_complete(run.folder / CHECKPOINTS, before=state.step)[0]:
                start = f"continue with --resume {earlier} and lower rates"
        start = f"the weights of this step are in the newest checkpoint, so {start}"
    return UserError(f"{fault.sentence}{reason}: {start}, or {look}")


def rewind(run: Run, state: LoopState, fault: Fault, metrics: Metrics) -> tuple[Run, LoopState]:
    """Goes back to an earlier checkpoint, to continue without the rows of the step that has just been taken.

    Returns the run with a new loader, and the state. All ranks call it; no save is in progress. What the run left for
    later steps is set aside. The loader's state in later checkpoints records what is left out, so a resumed run
    continues equally. A run that is resumed from the same checkpoint meets the step again, and rewinds again. Raises
    UserError with the fault if there is no earlier checkpoint.
    """
    checkpoint = _earlier_checkpoint(run, state)
    if checkpoint is None:
        raise _fault_error(run, state, fault, "; there is no earlier checkpoint to go back to")
    left_out, facts = run.loader.step - 1, read_facts(checkpoint)
    loader_state, _ = resume_documents(checkpoint, facts, run.config, run.plan, run.mesh, run.tokenizer)
    loader_state["header"]["left_out"] = sorted({*run.loader.left_out, left_out})

    def set_aside() -> list[str]:
        return follow_checkpoint(run.folder, checkpoint, facts["step"]) if run.is_writer else []

    lines = on_all_ranks_or_raise(set_aside, run.mesh.world)
    run.loader.close()
    run = dataclasses.replace(run, loader=build_loader(run.config, run.plan, run.mesh, run.tokenizer, loader_state))
    rewound = load_state(run, checkpoint)
    rewound.rewinds, rewound.rewound_to = state.rewinds + 1, facts["step"]
    metrics.rewind(rewound.step, rewound.rewinds)
    metrics.log(
        f"step {state.step:05d} | REWOUND to {checkpoint}: the rows of this step are left out "
        f"(rewind {rewound.rewinds} of at most {run.config.reliability.nonfinite_limit})"
    )
    for line in lines:
        metrics.log(line)
    values = {"rewind/from_step": state.step, "rewind/left_out": left_out, "rewind/count": rewound.rewinds}
    metrics.record({"step": rewound.step} | values)
    return run, rewound


def _earlier_checkpoint(run: Run, state: LoopState) -> Path | None:
    """Returns the newest checkpoint whose weights may be good, or None; all ranks call it. No save is in progress.

    A checkpoint of the step itself has the weights that failed. The one that the run went back to last led to a fault
    again, so only those before it count.
    """
    checkpoint, _ = choose_checkpoint(run.folder, "auto", run.mesh.world, before=state.step)
    if checkpoint and (last := state.rewound_to) is not None and checkpoint_step(checkpoint) == last:
        checkpoint, _ = choose_checkpoint(run.folder, "auto", run.mesh.world, before=last)
    return checkpoint
