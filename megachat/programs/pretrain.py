"""The pretraining program: a job from its command line to its last checkpoint, on every rank."""

import contextlib
import dataclasses
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from megachat import device as devices
from megachat.activity import announced
from megachat.checkpoint.resume import choose_checkpoint, find_checkpoint
from megachat.checkpoint.run_folder import config_in_place, follow_checkpoint
from megachat.config import Config, load_config
from megachat.console import styled
from megachat.data.shards import DataSummary, check_data_folder
from megachat.data.texts import BadTexts
from megachat.data.tokenizer import Tokenizer, load_tokenizer
from megachat.device import choose_compute_dtype, host_memory_bytes, memory_bytes
from megachat.errors import SAVED_STATUS, UserError
from megachat.evals.core_bundle import Bundle, configured_examples, describe_bundle, open_configured_bundle
from megachat.evals.core_prompts import check_questions, row_limit
from megachat.job.agreement import rank_facts
from megachat.job.crash_guard import CrashGuard, guard_crashes
from megachat.job.failure_monitor import FailureMonitor
from megachat.job.join import join_job
from megachat.job.launch import (
    LaunchEnvironment,
    bootstrap_environment,
    choose_device,
    with_fewer_ranks,
)
from megachat.job.recovery import Recovery
from megachat.job.run_lock import lock_run_folder
from megachat.kernels.choice import Kernels, choose_kernels
from megachat.parallel.collectives import barrier
from megachat.parallel.mesh import Mesh
from megachat.planning.explain import plan_values, setting_warnings
from megachat.planning.memory import describe_memory, memory_of_stages
from megachat.planning.memory_advice import check_state_fits, memory_warning
from megachat.planning.plan import Plan, resolve_plan, usable_world
from megachat.programs.dry_run import THIS_MACHINE, Hardware, describe_job, job_values
from megachat.programs.run_start import banner, write_run_folder
from megachat.studies.report import report_line
from megachat.studies.report_figures import check_report
from megachat.train.build import Run, build_run
from megachat.train.changes import describe_changes
from megachat.train.documents import resume_documents
from megachat.train.lookup_rows import allocated_lookup
from megachat.train.metrics import Metrics
from megachat.train.prediction import predict_training, predicted_lines, predicted_step_rows
from megachat.train.state import LoopState, check_checkpoint, load_state
from megachat.train.summary import log_end, next_commands, summary_rows
from megachat.train.trackers import check_trackers
from megachat.train.trainer import Trainer


@dataclass(frozen=True)
class JobInputs:
    """The inputs of a job, checked on this rank before the ranks connect to each other."""

    config: Config
    folder: Path  # the run folder
    environment: LaunchEnvironment
    tokenizer: Tokenizer
    plan: Plan
    data: DataSummary
    bundle: Bundle | None  # CORE's tasks, if configured
    kernels: Kernels
    memory: str  # the estimate per rank, as one log line
    core_left_out: Mapping[str, int]  # CORE's task -> questions that do not fit the model

    @property
    def facts(self) -> Mapping[str, Mapping[str, str]]:
        """Everything that must be equal on all ranks."""
        bundle = {"digest": self.bundle.digest[:12]} if self.bundle else {}
        return rank_facts(self.config, self.tokenizer, self.data, bundle=bundle)


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
    if dry_run:
        environment = bootstrap_environment()
        if environment.rank == 0:
            ranks = world or environment.world_size
            if as_json:
                print(json.dumps(job_values(config, ranks, hardware), indent=1))
            else:
                print(describe_job(config, ranks, hardware, verbose=verbose))
        return 0
    return run_job(config, notes, resume=resume, elastic=elastic, self_test=self_test, begin=begin)


def open_job_config(path: str, overrides: list[str]) -> tuple[Config, list[str]]:
    """Returns the config of a file with overrides and a run name, and lines for the log. Raises UserError."""
    config, notes = config_in_place(load_config(path, overrides), Path(path), overrides)
    return _named_config(config, Path(path).stem), notes


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
    with announced("checking config, tokenizer, data and kernels", shown=environment.rank == 0):
        job = _check_inputs(config, environment, resume, elastic)
    if job is None:
        return 0
    with (
        join_job(job.environment, config, job.facts, job.folder) as (mesh, monitor),
        lock_run_folder(job.folder, mesh.world) as notes,
    ):
        if self_test and not recovery.restarted:  # a restart had it before
            from megachat.programs.self_test import run_self_test  # loads torch.distributed.checkpoint, 0.7 s

            with mesh.world.progress.long_running("self-test"):
                notes.append(run_self_test(job, mesh, _plan_with_allocation, build_job_run))
        checkpoint, facts, chosen_notes = _agreed_checkpoint(job, resume, mesh)
        job = dataclasses.replace(job, plan=_plan_with_allocation(job, facts, mesh))
        named = resume not in (None, "auto")
        with guard_crashes(job.folder, mesh.world, notes.append, forget=named) as guard:
            monitor.before_stop = guard.end
            recovery.interrupted(guard.interrupted_at)
            recovery.finish("joining")
            run, data_notes = build_job_run(job, checkpoint, facts, mesh)
            recovery.finish("building")
            data_line = f"data {job.data}"
            bundle_lines = [describe_bundle(job.bundle)] if job.bundle else []
            if job.core_left_out:
                listed = ", ".join(f"{label} {count}" for label, count in job.core_left_out.items())
                bundle_lines.append(f"CORE leaves out questions that do not fit the model: {listed}")
            notes += [*config_notes, *chosen_notes, job.memory, data_line, *bundle_lines, *data_notes]
            with run.loader:
                stopped = _train(run, checkpoint, named, job.environment, notes, begin, monitor, guard, recovery)
    if config.log.report and job.environment.rank == 0 and not stopped:  # no rank waits, and nothing holds the folder
        print(report_line(job.folder), flush=True)
    return SAVED_STATUS if stopped else 0


def _named_config(config: Config, default: str) -> Config:
    """Returns the config with a run name, so that the saved config runs under the same name."""
    return config.changed("run", name=config.run.name or default)


def _check_inputs(
    config: Config, environment: LaunchEnvironment, resume: str | None, elastic: bool
) -> JobInputs | None:
    """Checks everything that this rank can check alone. Returns the job, or None if the rank is not needed (elastic).

    Raises UserError.
    """
    folder = Path(config.run.folder) / str(config.run.name)
    tokenizer = load_tokenizer(config.data.tokenizer)
    vocab_size = vocabulary(config, tokenizer)
    if elastic:
        used = usable_world(config, environment.world_size, vocab_size)
        if environment.rank == 0 and used < environment.world_size:
            print(
                f"{environment.world_size} ranks were started, but the batch can only be split over {used}; "
                f"the other {environment.world_size - used} exit",
                flush=True,
            )
        if environment.rank >= used:
            return None
        environment = with_fewer_ranks(environment, used)
    plan = resolve_plan(config, environment.world_size, vocab_size)
    check_document_start(plan, tokenizer)
    find_checkpoint(folder, resume)
    data, bundle = check_data(config), open_configured_bundle(config.evaluate)
    left_out: Mapping[str, int] = {}
    if bundle:
        limit, most = row_limit(plan.dims, config.evaluate), configured_examples(config.evaluate)
        left_out = check_questions(bundle, tokenizer, limit, most)
    if environment.rank == 0:
        check_trackers(config.log)
        check_report(config.log)
    device = choose_device(environment)
    kernels = choose_kernels(config, plan, device)
    dtype, _ = choose_compute_dtype(config.precision.compute, device)
    predict_training(config, plan, device, dtype, environment.local_size)
    memory, *warnings = described_memory(config, plan, device, environment.local_size)
    if environment.rank == 0 and warnings:
        # printed now: a job that runs out of memory during the build has no log
        print(*(styled(line, "yellow") for line in warnings), sep="\n", flush=True)
    return JobInputs(config, folder, environment, tokenizer, plan, data, bundle, kernels, memory, left_out)


@contextlib.contextmanager
def _starting(activity: str, mesh: Mesh) -> Iterator[None]:
    """Announces a part of the start-up, in which other ranks may wait longer than usual; all ranks enter it."""
    with mesh.world.progress.long_running(activity), announced(activity, shown=mesh.world.rank == 0):
        yield


def _agreed_checkpoint(job: JobInputs, resume: str | None, mesh: Mesh) -> tuple[Path | None, dict | None, list[str]]:
    """Returns the checkpoint to resume from, its facts and notes for the log; all ranks call it and agree."""
    with _starting("searching for a checkpoint", mesh):
        checkpoint, notes = choose_checkpoint(job.folder, resume, mesh.world)
        facts = check_checkpoint(checkpoint, job.plan, job.tokenizer, job.config) if checkpoint else None
        notes += describe_changes(facts, job.config, job.plan) if facts else []
    return checkpoint, facts, notes


def _plan_with_allocation(job: JobInputs, facts: dict | None, mesh: Mesh) -> Plan:
    """Returns the plan with the rows of its lookup tables allocated, if it has any; all ranks call it."""
    if job.plan.dims.lookup is None:
        return job.plan
    with _starting("allocating the rows of the lookup table", mesh):
        lookup = allocated_lookup(job.config, job.plan.dims.lookup, job.tokenizer, job.folder, facts, mesh.world)
    return resolve_plan(job.config, mesh.world.size, job.plan.dims.vocab_size, lookup)


def build_job_run(job: JobInputs, checkpoint: Path | None, facts: dict | None, mesh: Mesh) -> tuple[Run, list[str]]:
    """Returns the run with initial weights and its loader at the checkpoint's documents, and notes for the log."""
    with _starting("building model, optimizers and loader", mesh):
        documents, notes = None, list[str]()
        if checkpoint and facts:
            documents, notes = resume_documents(checkpoint, facts, job.config, job.plan, mesh, job.tokenizer)
        run = build_run(job.config, job.plan, mesh, job.tokenizer, job.folder, documents, job.bundle, job.kernels)
    return run, notes


def _train(
    run: Run,
    checkpoint: Path | None,
    named: bool,
    environment: LaunchEnvironment,
    notes: list[str],
    begin: float,
    monitor: FailureMonitor,
    guard: CrashGuard,
    recovery: Recovery,
) -> bool:
    """Loads the checkpoint and trains; returns whether the job stopped on request.

    named: the user gave the checkpoint's path. begin: time.perf_counter() at the start of the job.
    """
    with _starting(f"loading {checkpoint}", run.mesh):
        state = load_state(run, checkpoint) if checkpoint else LoopState()
    recovery.finish("loading")
    if run.is_writer:
        if checkpoint and named and state.step < run.plan.stop_step:
            notes += follow_checkpoint(run.folder, checkpoint, state.step)
        write_run_folder(run, state, environment, notes.append)
    barrier(run.mesh.world)
    metrics = _open_metrics(run, state)
    try:
        for line in [*notes, *banner(run, environment), *predicted_lines(run, environment.local_size)]:
            metrics.log(line)
        if checkpoint:
            metrics.log(f"resumed from {checkpoint} at step {state.step}")
        startup_s = time.perf_counter() - begin
        metrics.log(f"start-up took {startup_s:.1f} s")
        source = checkpoint.parent.parent if checkpoint else None
        first_step = state.step
        trainer = Trainer(run, state, metrics, lambda: bool(monitor.stop_requested), guard.record_step, source)
        trainer.after_first_step = lambda: _log_recovery(recovery, metrics, first_step)
        with monitor.defer_stop(run.config.checkpoint.stop_s):
            stopped = trainer.fit()
        if not stopped:
            guard.forget()
        if run.is_writer:
            rows = summary_rows(trainer, startup_s, time.perf_counter() - begin)
            rows += predicted_step_rows(run, first_step, environment.local_size)
            commands = next_commands(trainer, environment.launcher, environment.local_size, stopped=stopped)
            log_end(trainer, rows, commands, stopped=stopped)
        return stopped
    finally:
        metrics.close()


def _log_recovery(recovery: Recovery, metrics: Metrics, step: int) -> None:
    """Logs after the first step how long the job had not trained, if a supervisor has restarted it."""
    recovery.finish("first step")
    if recovery.restarted:
        metrics.log(recovery.line)
        metrics.record({"step": step} | recovery.values)


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


def vocabulary(config: Config, tokenizer: Tokenizer) -> int:
    """Returns the tokenizer's vocabulary size. Raises UserError if model.vocab_size differs from it."""
    configured = config.model.vocab_size
    if configured is not None and configured != tokenizer.vocab_size:
        raise UserError(
            f"model.vocab_size is {configured} but the tokenizer in {config.data.tokenizer} has {tokenizer.vocab_size} "
            "tokens: remove model.vocab_size, or use the tokenizer that belongs to it"
        )
    return tokenizer.vocab_size


def check_document_start(plan: Plan, tokenizer: Tokenizer) -> None:
    """Raises UserError if n-grams would be cut at another token than the tokenizer's BOS."""
    if plan.dims.ngram and plan.dims.ngram.bos != tokenizer.bos:
        raise UserError(
            f"ngram.bos is {plan.dims.ngram.bos}, but documents begin with {tokenizer.bos}, the tokenizer's BOS: set "
            f"ngram.bos={tokenizer.bos}"
        )


def check_data(config: Config, *, least_shards: int = 2) -> DataSummary:
    """Returns a summary of the data folder. Raises UserError if its validation shard has too little text."""
    data = config.data
    return check_data_folder(
        data.folder,
        min_shards=least_shards,
        validation_streams=data.streams,
        bad_texts=BadTexts(data.on_bad_text),
    )


def described_memory(config: Config, plan: Plan, device: torch.device, local_ranks: int) -> list[str]:
    """Returns the estimated memory per rank as a log line, then warnings: of memory that a device does not have, of a
    dtype that is slow on it, and of settings. local_ranks: on this machine.

    Raises UserError when a GPU is too small for the weights and the optimizer state, or any memory for n-gram tables.
    """
    device_bytes = memory_bytes(device, local_ranks)
    dtype, on_gpu = choose_compute_dtype(config.precision.compute, device)[0], device.type == "cuda"
    stages = memory_of_stages(config, plan, dtype, on_gpu=on_gpu, device_bytes=device_bytes)
    if on_gpu or plan.dims.ngram:
        check_state_fits(stages, device_bytes, host_memory_bytes(local_ranks))
    warning = memory_warning(config, plan, dtype, device_bytes, on_gpu=on_gpu, stages=stages)
    warnings = [warning, devices.slow_dtype_warning(config.precision.compute, device), *setting_warnings(config, plan)]
    return [describe_memory(stages, device_bytes), *filter(None, warnings)]
