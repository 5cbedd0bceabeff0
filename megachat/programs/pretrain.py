"""The pretraining program: a job from its command line to its last checkpoint, on every rank."""

import contextlib
import dataclasses
import functools
import json
import time
from pathlib import Path
from typing import NamedTuple

from megachat.checkpoint.resume import choose_checkpoint
from megachat.checkpoint.run_folder import config_in_place, follow_checkpoint
from megachat.config import Config, load_config
from megachat.errors import SAVED_STATUS, how_to_resume
from megachat.job.crash_guard import CrashGuard, guard_crashes
from megachat.job.failure_monitor import FailureMonitor
from megachat.job.join import join_job
from megachat.job.launch import LaunchEnvironment, bootstrap_environment
from megachat.job.recovery import Recovery
from megachat.job.run_lock import lock_run_folder
from megachat.parallel.collectives import barrier
from megachat.parallel.mesh import Mesh
from megachat.planning.explain import plan_values
from megachat.programs.dry_run import THIS_MACHINE, Hardware, describe_job, job_values
from megachat.programs.job_inputs import JobInputs, build_job_run, check_job_inputs, plan_with_allocation, starting
from megachat.programs.run_start import banner, write_run_folder
from megachat.studies.report import report_line
from megachat.train.build import Run
from megachat.train.changes import describe_changes
from megachat.train.metrics import Metrics
from megachat.train.prediction import predicted_lines, predicted_step_rows
from megachat.train.state import LoopState, check_checkpoint, load_state
from megachat.train.summary import log_end, next_commands, summary_rows
from megachat.train.trainer import Trainer


class StartPoint(NamedTuple):
    """Where training begins: at a checkpoint with these facts, or with initial weights.

    is_named: the user gave the checkpoint's path. notes: lines for the log.
    """

    checkpoint: Path | None
    facts: dict | None
    is_named: bool
    notes: list[str]


class Supervision(NamedTuple):
    """What monitors a job while it trains, records its crashes, and times its restart."""

    monitor: FailureMonitor
    guard: CrashGuard
    recovery: Recovery


def run_pretrain(
    config_path: str,
    overrides: list[str],
    *,
    resume: str | None = None,
    dry_run: bool = False,
    world: int | None = None,
    hardware: Hardware = THIS_MACHINE,
    elastic: bool = False,
    self_test: bool = False,
    as_json: bool = False,
    verbose: bool = False,
) -> int:
    """Runs the configured job; returns the exit status, SAVED_STATUS when it stopped on request and saved.

    dry_run: only print the plan, for `world` ranks on `hardware`; as_json: as JSON; verbose: with all settings,
    numbers and owners.
    elastic: if the batch cannot be split over all ranks that were started, the last ranks exit with status 0 and the
    others train.
    self_test: before training, compare some steps with the same steps resumed twice, see programs/self_test.py.
    """
    begin = time.perf_counter()
    config, notes = open_job_config(config_path, overrides)
    if not dry_run:
        return run_job(config, notes, resume=resume, elastic=elastic, self_test=self_test, begin=begin)
    environment = bootstrap_environment()
    if environment.rank == 0:
        ranks = world or environment.world_size
        if as_json:
            print(json.dumps(job_values(config, ranks, hardware), indent=1))
        else:
            print(describe_job(config, ranks, hardware, verbose=verbose))
    return 0


def open_job_config(path: str, overrides: list[str]) -> tuple[Config, list[str]]:
    """Returns the config of a file with overrides, and lines for the log. Raises UserError.

    A run without a name gets that of the file, so that the saved config runs under the same name.
    """
    config, notes = config_in_place(load_config(path, overrides), Path(path), overrides)
    return config.changed("run", name=config.run.name or Path(path).stem), notes


def run_job(
    config: Config,
    config_notes: list[str],
    *,
    resume: str | None = None,
    elastic: bool = False,
    self_test: bool = False,
    begin: float | None = None,
) -> int:
    """Runs the job of a config that has a run name; see `run_pretrain`. begin: time.perf_counter() at its start."""
    begin, environment, recovery = begin or time.perf_counter(), bootstrap_environment(), Recovery()
    job = check_job_inputs(config, environment, resume, elastic)
    if job is None:  # elastic: the batch is split over fewer ranks, without this one
        return 0
    hint = f"continue with {how_to_resume()}"
    with (
        join_job(job.environment, config, job.facts, job.folder, restart_hint=hint) as (mesh, monitor),
        lock_run_folder(job.folder, mesh.world) as notes,
    ):
        if self_test and not recovery.restarted:  # a restart had it before
            notes.append(_self_test(job, mesh))
        start = _agree_on_start(job, resume, mesh)
        job = dataclasses.replace(job, plan=plan_with_allocation(job, start.facts, mesh))
        with guard_crashes(job.folder, mesh.world, notes.append, forget=start.is_named) as guard:
            monitor.before_stop = guard.end
            recovery.interrupted(guard.interrupted_at)
            recovery.finish("joining")
            run, data_notes = build_job_run(job, start.checkpoint, start.facts, mesh)
            recovery.finish("building")
            notes += [*config_notes, *start.notes, *job.notes, *data_notes]
            with run.loader:
                stopped = _train(run, start, job.environment, notes, begin, Supervision(monitor, guard, recovery))
    if config.log.report and job.environment.rank == 0 and not stopped:  # no rank waits, and nothing holds the folder
        print(report_line(job.folder), flush=True)
    return SAVED_STATUS if stopped else 0


def _self_test(job: JobInputs, mesh: Mesh) -> str:
    """Tests saving and resuming, and returns a line for the log; all ranks call it."""
    from megachat.programs.self_test import run_self_test  # loads torch.distributed.checkpoint, 0.7 s

    with mesh.world.progress.long_running("self-test"):
        return run_self_test(job, mesh)


def _agree_on_start(job: JobInputs, resume: str | None, mesh: Mesh) -> StartPoint:
    """Returns where training begins; all ranks call it and agree. Raises UserError."""
    with starting("searching for a checkpoint", mesh):
        checkpoint, notes = choose_checkpoint(job.folder, resume, mesh.world)
        facts = check_checkpoint(checkpoint, job.plan, job.tokenizer, job.config) if checkpoint else None
        notes += describe_changes(facts, job.config, job.plan) if facts else []
    return StartPoint(checkpoint, facts, resume not in (None, "auto"), notes)


def _train(
    run: Run,
    start: StartPoint,
    environment: LaunchEnvironment,
    notes: list[str],
    begin: float,
    supervision: Supervision,
) -> bool:
    """Loads the checkpoint and trains; returns whether the job stopped on request.

    notes: lines for the log. begin: time.perf_counter() at the start of the job.
    """
    monitor, guard, recovery = supervision
    with starting(f"loading {start.checkpoint}", run.mesh):
        state = load_state(run, start.checkpoint) if start.checkpoint else LoopState()
    recovery.finish("loading")
    _prepare_run_folder(run, start, state, environment, notes)
    with contextlib.closing(_open_metrics(run, state)) as metrics:
        _log_start(run, start, state, environment, notes, metrics)
        startup_s = time.perf_counter() - begin
        metrics.log(f"start-up took {startup_s:.1f} s")
        trainer = Trainer(
            run,
            state,
            metrics,
            stop_requested=lambda: bool(monitor.stop_requested),
            before_step=guard.record_step,
            source=start.checkpoint.parent.parent if start.checkpoint else None,
            after_first_step=functools.partial(_log_recovery, recovery, metrics, state.step),
        )
        with monitor.defer_stop(run.config.checkpoint.stop_s):
            stopped = trainer.fit()
        if not stopped:
            guard.forget()
        if run.is_writer:
            _log_summary(trainer, environment, startup_s, time.perf_counter() - begin, stopped)
        return stopped


def _prepare_run_folder(
    run: Run, start: StartPoint, state: LoopState, environment: LaunchEnvironment, notes: list[str]
) -> None:
    """Writes what describes the job; sets aside what later steps left, if the user chose the checkpoint."""
    if run.is_writer:
        if start.checkpoint and start.is_named and state.step < run.plan.stop_step:
            notes += follow_checkpoint(run.folder, start.checkpoint, state.step)
        write_run_folder(run, state, environment, notes.append)
    barrier(run.mesh.world)


def _log_start(
    run: Run, start: StartPoint, state: LoopState, environment: LaunchEnvironment, notes: list[str], metrics: Metrics
) -> None:
    """Logs what the job trains, where, and from which step; all ranks call it."""
    for line in [*notes, *banner(run, environment), *predicted_lines(run, environment.local_size)]:
        metrics.log(line)
    if start.checkpoint:
        metrics.log(f"resumed from {start.checkpoint} at step {state.step}")


def _log_recovery(recovery: Recovery, metrics: Metrics, step: int) -> None:
    """Logs after the first step how long the job had not trained, if a supervisor has restarted it."""
    recovery.finish("first step")
    if recovery.restarted:
        metrics.log(recovery.line)
        metrics.record({"step": step} | recovery.values)


def _log_summary(
    trainer: Trainer, environment: LaunchEnvironment, startup_s: float, total_s: float, stopped: bool
) -> None:
    """Logs how the job ended, its results and times, and how to continue."""
    rows = summary_rows(trainer, startup_s, total_s)
    rows += predicted_step_rows(trainer.run, trainer.first_step, environment.local_size)
    commands = next_commands(trainer, environment.launcher, environment.local_size, stopped=stopped)
    log_end(trainer, rows, commands, stopped=stopped)


def _open_metrics(run: Run, state: LoopState) -> Metrics:
    settings = {"config": run.config.model_dump(mode="json"), "plan": plan_values(run.plan)} if run.is_writer else {}
    return Metrics(
        run.folder,
        run.config.log,
        writes=run.is_writer,
        first_step=state.step,
        rewinds=state.rewinds,
        trains=state.step < run.plan.stop_step,
        steps=run.plan.steps,
        run_name=run.folder.name,
        settings=settings,
    )
