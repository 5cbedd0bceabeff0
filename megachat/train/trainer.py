"""The one loop, for every layout. Axes differ below the engine, never here."""

import contextlib
import gc
import json
import math
from collections.abc import Callable

import torch

from megachat.checkpoint.facts import checkpoint_step
from megachat.checkpoint.saver import Saver
from megachat.device import peak_flops, peak_memory_bytes
from megachat.errors import UserError
from megachat.evals.bpb import ValidationRows, bits_per_byte
from megachat.evals.core import build_evaluator, evaluate_bundle
from megachat.evals.engine_model import sample_prompts
from megachat.evals.results import core_lines, results_path, save_results
from megachat.files import write_atomically
from megachat.parallel.collectives import all_reduce
from megachat.schedule import due
from megachat.train.build import Run, build_loader
from megachat.train.compiled import NewGraphs
from megachat.train.metrics import Metrics, console_line
from megachat.train.state import LoopState, save_state, state_pieces
from megachat.train.step import StepResult, train_step

UNTIMED_STEPS = 10  # the speedrun's clock starts after them
SETTLED_STEPS = 2  # by then everything of a step is compiled
MOST_SKIPS_IN_A_ROW = 20


def train(
    run: Run, state: LoopState, metrics: Metrics, asked_to_stop: Callable[[], bool], begins: Callable[[int], None]
) -> bool:
    """Train from `state` to the plan's stop step, evaluating, saving and telling on the way; all ranks call it.

    asked_to_stop: this rank was told to stop. When one was, all save after the step and return True; otherwise False. begins: told each step.
    """
    long_running = (
        run.mesh.world.progress.long_running
    )  # all but a step that is not the first may take longer than the watch allows
    first_step, skips_in_a_row, stops = state.step, 0, False
    validation, saver = _Validation(run), Saver(run.mesh.saving, background=run.config.checkpoint.background)
    graphs = NewGraphs(compiles=run.config.precision.compile)
    saver.reserve(state_pieces(run, replicas=False))
    run.engine.optimizer.before_update = saver.wait_copied
    if state.owes_evaluation or state.owes_core:
        only_core = not state.owes_evaluation
        state.owes_evaluation = state.owes_core = False
        stops = _do_what_is_due(run, state, validation, saver, metrics, asked_to_stop, only_core=only_core)
        _tell_saved(state, saver, metrics)
    while state.step < run.plan.stop_step and not stops:
        begins(state.step)
        graphs.count()  # evaluation has graphs of its own
        with long_running("first step") if state.step == first_step else contextlib.nullcontext():
            result = train_step(run, state.step, wishes=(asked_to_stop(), saver.failed))
        skips_in_a_row = skips_in_a_row + 1 if result.skipped else 0
        if skips_in_a_row > MOST_SKIPS_IN_A_ROW:
            raise UserError(
                f"step {state.step}: the gradient was not finite for {skips_in_a_row} steps in a row, none of which changed a weight: "
                "lower the rates or use bfloat16"
            )
        _tell(run, state, result, metrics)
        if (made := graphs.count()) and state.step - first_step >= SETTLED_STEPS:
            metrics.say(
                f"step {state.step:05d} | torch.compile made {made} new graphs, which takes time: TORCH_LOGS=recompiles tells why"
            )
        state.step += 1
        if state.step - first_step == 1:
            gc.collect()  # what exists now stays: scanning it again and again costs more than it frees
            gc.freeze()
        stops, save_failed = result.wished
        if save_failed:
            saver.wait()  # raises on every rank: a save fails on all together
        if stops:
            state.owes_evaluation, state.owes_core = _evaluation_due(run, state), _core_due(run, state)
            _save(run, state, saver)
        else:
            stops = _do_what_is_due(run, state, validation, saver, metrics, asked_to_stop)
        _tell_saved(state, saver, metrics)
    with long_running("saving the checkpoint"):
        saver.wait(blocks=True)
    _tell_saved(state, saver, metrics)
    return stops


def _evaluation_due(run: Run, state: LoopState) -> bool:
    return due(state.step, run.config.evaluate.every) or state.step == run.plan.stop_step == run.plan.steps


def _core_due(run: Run, state: LoopState) -> bool:
    every = run.config.evaluate.core_every
    return every > 0 and (due(state.step, every) or state.step == run.plan.stop_step == run.plan.steps)


def _do_what_is_due(
    run: Run,
    state: LoopState,
    validation: "_Validation",
    saver: Saver,
    metrics: Metrics,
    asked_to_stop: Callable[[], bool],
    *,
    only_core: bool = False,
) -> bool:
    """After a step: evaluation, samples, CORE, checkpoint. Returns whether a rank was told to stop meanwhile; then the state is saved."""
    long_running, last, stops = run.mesh.world.progress.long_running, state.step == run.plan.stop_step, False
    if _evaluation_due(run, state) and not only_core:
        with long_running("evaluation"):
            _evaluate(run, state, validation, metrics)
    if last and state.step == run.plan.steps and not only_core:
        with long_running("sampling"):
            _sample(run, state, metrics)
    if _core_due(run, state):
        with long_running("evaluation of CORE"):
            stops = state.owes_core = not _evaluate_core(run, state, metrics, asked_to_stop)
    if last or stops or due(state.step, run.config.checkpoint.every):
        _save(run, state, saver)
    return stops


def _save(run: Run, state: LoopState, saver: Saver) -> None:
    with run.mesh.world.progress.long_running("copying the state to save it, or waiting for the save before"):
        save_state(run, state, saver)


def _tell_saved(state: LoopState, saver: Saver, metrics: Metrics) -> None:
    for saved in saver.finished():
        metrics.say(f"saved {saved.path} (training waited {saved.blocked_s:.2f} s of {saved.total_s:.2f} s)")
        times = {"checkpoint/blocked_s": saved.blocked_s, "checkpoint/total_s": saved.total_s}
        metrics.record(
            {"step": state.step, "checkpoint/step": checkpoint_step(saved.path)} | times
        )  # told later than it was saved


class _Validation:
    """Packs the validation rows at the first evaluation and keeps them."""

    def __init__(self, run: Run):
        self.run, self.rows = run, None

    def bits_per_byte(self) -> float:
        run = self.run
        if self.rows is None:
            with build_loader(run.config, run.plan, run.mesh, run.tokenizer, validation=True) as loader:
                self.rows = ValidationRows(loader, run.plan.evaluation_rows, run.plan.micro_rows, run.mesh)
        return bits_per_byte(run.engine, self.rows, run.mesh)


def _evaluate(run: Run, state: LoopState, validation: _Validation, metrics: Metrics) -> None:
    state.val_bpb = validation.bits_per_byte()
    state.min_val_bpb = min(state.val_bpb, math.inf if state.min_val_bpb is None else state.min_val_bpb)
    metrics.say(f"step {state.step:05d} | validation bpb {state.val_bpb:.6f}")
    metrics.record(_totals(run, state) | {"val/bpb": state.val_bpb})


def _evaluate_core(run: Run, state: LoopState, metrics: Metrics, asked_to_stop: Callable[[], bool]) -> bool:
    """False when a rank was told to stop before it was done; then nothing of it is told."""

    def stop() -> bool:
        asked = torch.tensor(float(asked_to_stop()), device=run.mesh.device)
        all_reduce(asked, run.mesh.world, "max", name="told to stop")
        return bool(asked)

    asked = run.config.evaluate
    section = evaluate_bundle(
        build_evaluator(run), run.bundle, run.tokenizer, max_per_task=asked.core_max_per_task, stop=stop
    )
    if section is None:
        return False
    values = _totals(run, state) | {
        "centered_results": {label: task["centered"] for label, task in section["tasks"].items()}
    }
    if section["core_metric"] is not None:
        values["core_metric"] = section["core_metric"]
    metrics.record(values)
    for line in core_lines(section):
        metrics.say(f"step {state.step:05d} | {line}")
    if run.is_writer:
        save_results(
            results_path(run.folder, state.step, in_training=True),
            {"run": run.folder.name, "step": state.step, "core": section},
        )
    return True


def _sample(run: Run, state: LoopState, metrics: Metrics) -> None:
    """Greedy continuations of the configured prompts, by all ranks; the writer keeps them."""
    texts = sample_prompts(run.config, run.plan, run.mesh, run.engine, run.tokenizer)
    if texts and run.is_writer:
        (run.folder / "samples").mkdir(exist_ok=True)
        told = json.dumps(texts, indent=2, ensure_ascii=False)
        write_atomically(run.folder / "samples" / f"step_{state.step:06d}.json", told.encode() + b"\n")
    for text in texts.values():
        metrics.say(f"sample: {text!r}")


def _totals(run: Run, state: LoopState) -> dict:
    return {
        "step": state.step,
        "total_training_flops": float(run.plan.flops_per_token) * run.plan.tokens_per_step * state.step,
        "total_training_time": state.training_s,
    }


def _tell(run: Run, state: LoopState, result: StepResult, metrics: Metrics) -> None:
    state.skipped_steps += result.skipped
    if state.step > UNTIMED_STEPS:
        state.training_s += result.seconds
    last = state.step + 1 == run.plan.stop_step
    if not (due(state.step, run.config.log.every) or result.skipped or last):
        metrics.advance(state.step + 1)
        return
    values = _totals(run, state) | {
        "train/loss": result.loss,
        "train/grad_norm": result.norm if math.isfinite(result.norm) else None,
        "train/lrm": result.rate_multiplier,
        "train/dt": result.seconds,
        "train/tok_per_sec": int(run.plan.tokens_per_step / result.seconds),
        "train/epoch": run.loader.epoch,
        "train/skipped": result.skipped,
        "train/muon_matrices": run.muon.matrices_updated,
        "train/peak_memory_bytes": peak_memory_bytes(run.mesh.device),
    }
    peak = peak_flops(run.mesh.device)
    if peak:
        values["train/mfu"] = (
            100 * run.plan.flops_per_token * run.plan.tokens_per_step / result.seconds / (peak * run.mesh.world.size)
        )
    timed = state.step - UNTIMED_STEPS
    eta_s = state.training_s / timed * (run.plan.stop_step - state.step - 1) if timed > 0 else None
    metrics.say(console_line(values | {"train/grad_norm": result.norm}, run.plan.steps, eta_s))
    metrics.record(values)
    metrics.advance(state.step + 1)
