"""Periodic work of a training run: the tasks, in the order in which they run after a step.

Validation, samples and CORE may fail or take minutes, so they run after the checkpoint: by then the step is saved.
At that time they are listed in LoopState.pending. A resumed job first runs those of them that have left no result.
"""

import math
import statistics
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import torch

from megachat.checkpoint.saver import Saver
from megachat.console import styled
from megachat.device import peak_flops, peak_memory_bytes
from megachat.evals.bpb import ValidationRows, bits_per_byte
from megachat.evals.core import build_evaluator, evaluate_bundle
from megachat.evals.core_bundle import configured_examples
from megachat.evals.engine_model import sample_prompts
from megachat.evals.results import core_lines, recorded_validation, results_path, save_results
from megachat.files import SAMPLES, is_readable_json, write_side_json
from megachat.parallel.collectives import all_gather, all_reduce
from megachat.planning.step_work import stage_matrices
from megachat.schedule import due
from megachat.text import shortened
from megachat.train.build import Run
from megachat.train.capsule import write_spike
from megachat.train.documents import build_loader
from megachat.train.metrics import Metrics, Pace, console_line
from megachat.train.rank_reports import Report, gather_reports
from megachat.train.state import LoopState, save_state
from megachat.train.step import StepResult
from megachat.train.stragglers import RANK_TIMES_WINDOW, SlowRanks, rank_values

SPIKE_WINDOW = 64  # steps that a spike is compared with
SPIKE_LEAST = 20  # of them
_NORMAL = 1.4826  # deviation of a normal distribution in units of its median absolute deviation


class TaskContext(Protocol):
    """The part of train.trainer.Trainer that tasks use. Trainer imports this file, so tasks cannot import Trainer."""

    run: Run
    state: LoopState
    metrics: Metrics
    pace: Pace
    saver: Saver
    last_result: StepResult
    saved_step: int | None
    first_step: int
    work_s: deque[float]
    stop_requested: Callable[[], bool]

    @property
    def at_end(self) -> bool:
        """Whether the whole training is done."""


class Task:
    """One kind of periodic work; all ranks call all its methods.

    name: its name in LoopState.pending. activity: if set, the failure monitor reports it while the task runs, and lets
    other ranks wait longer than usual. runs_on_stop: whether the task still runs after a stop request.
    """

    name = activity = ""
    runs_on_stop = False

    def due(self, trainer: TaskContext) -> bool:
        """Returns whether the task runs now. The last finished step is trainer.state.step - 1."""
        raise NotImplementedError

    def run(self, trainer: TaskContext) -> bool:
        """Does the work. Returns False when a stop request interrupted it."""
        raise NotImplementedError

    def load_result(self, run_folder: Path, step: int) -> float | bool | None:
        """Returns the result of the task for `step` in the run folder, None if there is none."""
        return None

    def restore(self, state: LoopState, result: float | bool) -> None:
        """Changes the state as run() did when it had this result; all ranks call it."""


class LogStep(Task):
    """Logs a step to the console and to metrics.jsonl: every log.every steps, each skipped step and the last one."""

    name, runs_on_stop = "log", True

    def __init__(self) -> None:
        self._epoch = 1  # that the console has shown

    def due(self, trainer: TaskContext) -> bool:
        step, plan, every = trainer.state.step, trainer.run.plan, trainer.run.config.log.every
        return due(step - 1, every) or trainer.last_result.skipped or step == plan.stop_step

    def run(self, trainer: TaskContext) -> bool:
        run, state, result = trainer.run, trainer.state, trainer.last_result
        step, tokens, dims = state.step - 1, run.plan.tokens_per_step, run.plan.dims
        values = totals(run, state, step) | {
            "train/loss": state.shown_loss if math.isfinite(state.shown_loss) else None,
            "train/loss_raw": result.loss if math.isfinite(result.loss) else None,
            "train/grad_norm": result.norm if math.isfinite(result.norm) else None,
            "train/lrm": result.rate_multiplier,
            "train/dt": result.seconds,
            "train/tok_per_sec": int(tokens / result.seconds),
            "train/epoch": run.loader.epoch,
            "train/skipped": result.skipped,
            "train/skipped_steps": state.skipped_steps,
            "train/muon_matrices": 0 if result.skipped else len(stage_matrices(dims, 0, dims.depth + 2)),
            "train/peak_memory_bytes": peak_memory_bytes(run.mesh.device),
            "data/cropped_share": run.loader.cropped_share,
        }
        checks = {"train/replay_s": result.replay_s, "train/hashes_s": result.hashes_s}
        values |= {key: seconds for key, seconds in checks.items() if seconds}
        if peak := peak_flops(run.mesh.device):
            values["train/mfu"] = (
                100 * run.plan.flops_per_token * tokens / result.seconds / (peak * run.mesh.world.size)
            )
        eta_s = trainer.pace.left_s(state.step, run.plan.stop_step)
        shown = {"train/loss": state.shown_loss, "train/grad_norm": result.norm}
        trainer.metrics.log(console_line(values | shown, run.plan.steps, eta_s))
        if result.skipped:
            what = "gradient" if math.isfinite(result.loss) else "loss"
            line = f"step {step:05d} | SKIPPED: the {what} was not finite; no weight has changed"
            trainer.metrics.log(styled(line, "yellow"))
        if run.loader.epoch != self._epoch:
            self._epoch = run.loader.epoch
            trainer.metrics.log(f"step {step:05d} | epoch {self._epoch} of the data")
        trainer.metrics.record(values)
        return True


class Spikes(Task):
    """Logs the documents of a step whose loss or gradient norm is a spike, and keeps its rows."""

    name, runs_on_stop = "spikes", True

    def due(self, trainer: TaskContext) -> bool:
        return bool(trainer.run.config.reliability.spike_sigma)

    def run(self, trainer: TaskContext) -> bool:
        run, state, result = trainer.run, trainer.state, trainer.last_result
        step, above = state.step - 1, dict[str, float]()
        for name, value in (("loss", result.loss), ("norm", result.norm)):
            recent = state.recent.setdefault(name, [])
            if math.isfinite(value):
                if deviations := deviations_above(value, recent, run.config.reliability.spike_sigma):
                    above[name] = deviations
                state.recent[name] = [*recent, value][-SPIKE_WINDOW:]
        if not above:
            return True
        values = {f"spike/{name}_sigma": deviations for name, deviations in above.items()}
        path, places = write_spike(run, step, result.rows, {"loss": result.loss, "norm": result.norm} | values)
        listed = " and ".join(f"{name} {deviations:.1f} deviations above" for name, deviations in above.items())
        trainer.metrics.log(
            f"step {step:05d} | SPIKE: {listed} the median of the last {SPIKE_WINDOW} steps; documents: "
            f"{shortened(places)}{f'; rows in {path}' if path else ''}"
        )
        trainer.metrics.record({"step": step} | values | {"spike/documents": places})
        return True


def deviations_above(value: float, recent: Sequence[float], sigma: float) -> float | None:
    """Returns how many deviations the value is above the median of the recent ones, or None if at most sigma.

    The deviation is 1.4826 times the median absolute deviation, which earlier spikes hardly change.
    """
    if len(recent) < SPIKE_LEAST:
        return None
    median = statistics.median(recent)
    deviation = _NORMAL * statistics.median(abs(other - median) for other in recent)
    above = (value - median) / deviation if deviation else 0.0
    return above if above > sigma else None


class RankTimes(Task):
    """Records how long the ranks work in a step, every WINDOW steps of the job, and names a rank that gets slow."""

    name, runs_on_stop = "rank times", True

    def __init__(self) -> None:
        self._ranks: list[Report] = []
        self._slow = SlowRanks()

    def due(self, trainer: TaskContext) -> bool:
        return trainer.run.mesh.world.size > 1 and due(trainer.state.step - trainer.first_step, RANK_TIMES_WINDOW)

    def run(self, trainer: TaskContext) -> bool:
        mesh, step = trainer.run.mesh, trainer.state.step
        if not self._ranks:
            self._ranks = gather_reports(mesh)
        gathered = torch.empty(mesh.world.size, device=mesh.device)
        local = torch.tensor([statistics.median(trainer.work_s)], device=mesh.device)
        all_gather(gathered, local, mesh.world, name="working times of the ranks")
        work_s = gathered.tolist()
        trainer.metrics.record(totals(trainer.run, trainer.state, step) | rank_values(work_s, self._ranks))
        if line := self._slow.line(work_s, self._ranks):
            trainer.metrics.log(styled(f"step {step:05d} | {line}", "yellow"))
        return True


class Checkpoint(Task):
    """Starts saving the state, every checkpoint.every steps and at this job's last step; training continues."""

    name, runs_on_stop = "checkpoint", True
    activity = "copying the state to save it, or waiting for the save before"

    def due(self, trainer: TaskContext) -> bool:
        step = trainer.state.step
        return due(step, trainer.run.config.checkpoint.every) or step == trainer.run.plan.stop_step

    def run(self, trainer: TaskContext) -> bool:
        save_state(trainer.run, trainer.state, trainer.saver)
        trainer.saved_step = trainer.state.step
        return True


class Validation(Task):
    """Computes bits per byte on the validation rows, every evaluate.every steps, before the first one too (as nanochat
    does), and at the end of training.
    """

    name, activity = "validation", "evaluation"

    def __init__(self) -> None:
        self._rows: ValidationRows | None = None  # packed at the first run and kept

    def due(self, trainer: TaskContext) -> bool:
        return due(trainer.state.step, trainer.run.config.evaluate.every) or trainer.at_end

    def run(self, trainer: TaskContext) -> bool:
        run, state = trainer.run, trainer.state
        if self._rows is None:
            with build_loader(run.config, run.plan, run.mesh, run.tokenizer, validation=True) as loader:
                self._rows = ValidationRows(loader, run.plan.evaluation_rows, run.plan.micro_rows, run.mesh)
        self.restore(state, bits_per_byte(run.engine, self._rows, run.mesh))
        trainer.metrics.log(f"step {state.step:05d} | validation bpb {state.val_bpb:.6f}")
        trainer.metrics.record(totals(run, state, state.step) | {"val/bpb": state.val_bpb})
        return True

    def load_result(self, run_folder: Path, step: int) -> float | None:
        return recorded_validation(run_folder, step)

    def restore(self, state: LoopState, result: float | bool) -> None:
        state.val_bpb = result
        state.min_val_bpb = min(state.val_bpb, math.inf if state.min_val_bpb is None else state.min_val_bpb)


class Samples(Task):
    """Continues the configured prompts greedily, every evaluate.sample_every steps and at the end of training; rank 0
    writes the texts to samples/.
    """

    name, activity = "samples", "sampling"

    def due(self, trainer: TaskContext) -> bool:
        config = trainer.run.config.evaluate
        return bool(config.prompts) and (due(trainer.state.step, config.sample_every) or trainer.at_end)

    def run(self, trainer: TaskContext) -> bool:
        run = trainer.run
        texts = sample_prompts(run.config, run.plan, run.mesh, run.engine, run.tokenizer)
        if run.is_writer:
            write_side_json(_samples_path(run.folder, trainer.state.step), texts, trainer.metrics.log)
        for text in texts.values():
            trainer.metrics.log(f"sample: {text!r}")
        return True

    def load_result(self, run_folder: Path, step: int) -> bool | None:
        return is_readable_json(_samples_path(run_folder, step)) or None


class Core(Task):
    """Evaluates the CORE metric, every evaluate.core_every steps and at the end of training; never if it is 0."""

    name, activity = "core", "evaluation of CORE"

    def due(self, trainer: TaskContext) -> bool:
        every = trainer.run.config.evaluate.core_every
        return trainer.run.bundle is not None and (due(trainer.state.step, every) or trainer.at_end)

    def run(self, trainer: TaskContext) -> bool:
        run, state, bundle = trainer.run, trainer.state, trainer.run.bundle
        assert bundle is not None, "open_configured_bundle opens it when core_every is not 0"

        def stop_requested_on_any_rank() -> bool:  # called before each of CORE's tasks, which may take minutes
            requested = torch.tensor(float(trainer.stop_requested()), device=run.mesh.device)
            all_reduce(requested, run.mesh.world, "max", name="stop requests")
            return bool(requested)

        limit, evaluator = configured_examples(run.config.evaluate), build_evaluator(run)
        section = evaluate_bundle(evaluator, bundle, run.tokenizer, max_per_task=limit, stop=stop_requested_on_any_rank)
        if section is None:
            return False
        centered = {label: task["centered"] for label, task in section["tasks"].items()}
        metric = {} if section["core_metric"] is None else {"core_metric": section["core_metric"]}
        trainer.metrics.record(totals(run, state, state.step) | {"centered_results": centered} | metric)
        for line in core_lines(section):
            trainer.metrics.log(f"step {state.step:05d} | {line}")
        if run.is_writer:
            results = {"run": run.folder.name, "step": state.step, "core": section}
            save_results(results_path(run.folder, state.step, in_training=True), results, trainer.metrics.log)
        return True

    def load_result(self, run_folder: Path, step: int) -> bool | None:
        return is_readable_json(results_path(run_folder, step, in_training=True)) or None


def totals(run: Run, state: LoopState, step: int) -> dict:
    """Returns what every metrics record has: step, the FLOPs of the steps before it, and the seconds of all steps that
    the speedrun's clock has timed so far. A training line has the number of its step, counted from 0, so its FLOPs are
    without that step and its seconds with it.
    """
    return {
        "step": step,
        "total_training_flops": float(state.training_flops - (state.step - step) * run.plan.flops_per_step),
        "total_training_time": state.training_s,
    }


def _samples_path(run_folder: Path, step: int) -> Path:
    return run_folder / SAMPLES / f"step_{step:06d}.json"
