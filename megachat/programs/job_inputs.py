"""The inputs of a job: checked on each rank before the ranks connect, and the run that all ranks build from them."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from megachat import device as devices
from megachat.activity import announced
from megachat.checkpoint.resume import find_checkpoint
from megachat.config import Config
from megachat.console import styled
from megachat.data.shards import DataSummary, check_data_folder
from megachat.data.texts import BadTexts
from megachat.data.tokenizer import Tokenizer
from megachat.device import choose_compute_dtype, host_memory_bytes, memory_bytes
from megachat.errors import UserError
from megachat.evals.core_bundle import Bundle, configured_examples, describe_bundle, open_configured_bundle
from megachat.evals.core_prompts import check_questions, row_limit
from megachat.job.agreement import rank_facts
from megachat.job.launch import LaunchEnvironment, choose_device, with_fewer_ranks
from megachat.kernels.choice import Kernels, choose_kernels
from megachat.parallel.mesh import Mesh
from megachat.planning.explain import setting_warnings
from megachat.planning.memory import describe_memory, memory_of_stages
from megachat.planning.memory_advice import check_state_fits, memory_warning
from megachat.planning.plan import Plan, resolve_plan, usable_world
from megachat.programs.preflight import configured_tokenizer
from megachat.studies.report_figures import check_report
from megachat.train.build import Run, build_run
from megachat.train.documents import resume_documents
from megachat.train.lookup_rows import allocated_lookup
from megachat.train.prediction import predict_training
from megachat.train.trackers import check_trackers


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

    @property
    def notes(self) -> list[str]:
        """Lines for the log."""
        lines = [self.memory, f"data {self.data}"]
        if self.bundle:
            lines.append(describe_bundle(self.bundle))
        if self.core_left_out:
            listed = ", ".join(f"{label} {count}" for label, count in self.core_left_out.items())
            lines.append(f"CORE leaves out questions that do not fit the model: {listed}")
        return lines


def check_job_inputs(
    config: Config, environment: LaunchEnvironment, resume: str | None, elastic: bool
) -> JobInputs | None:
    """Checks everything that this rank can check alone. Returns the job, or None if the rank is not needed (elastic).

    Raises UserError.
    """
    with announced("checking config, tokenizer, data and kernels", shown=environment.rank == 0):
        folder = Path(config.run.folder) / str(config.run.name)
        tokenizer = configured_tokenizer(config)
        if elastic:
            used = _used_ranks(config, environment, tokenizer.vocab_size)
            if environment.rank >= used:
                return None
            environment = with_fewer_ranks(environment, used)
        plan = resolve_plan(config, environment.world_size, tokenizer.vocab_size)
        check_document_start(plan, tokenizer)
        find_checkpoint(folder, resume)
        data, bundle = check_data(config), open_configured_bundle(config.evaluate)
        left_out = _core_left_out(config, plan, tokenizer, bundle)
        if environment.rank == 0:
            check_trackers(config.log)
            check_report(config.log)
        device = choose_device(environment)
        kernels = choose_kernels(config, plan, device)
        dtype, _ = choose_compute_dtype(config.precision.compute, device)
        predict_training(config, plan, device, dtype, environment.local_size)
        memory, *warnings = _memory_and_warnings(config, plan, device, environment.local_size)
        if environment.rank == 0 and warnings:
            # printed now: a job that runs out of memory during the build has no log
            print(*(styled(line, "yellow") for line in warnings), sep="\n", flush=True)
        return JobInputs(config, folder, environment, tokenizer, plan, data, bundle, kernels, memory, left_out)


def _used_ranks(config: Config, environment: LaunchEnvironment, vocab_size: int) -> int:
    """Returns over how many of the started ranks the batch can be split; rank 0 prints if it is not all."""
    started, used = environment.world_size, usable_world(config, environment.world_size, vocab_size)
    if environment.rank == 0 and used < started:
        print(
            f"{started} ranks were started, but the batch can only be split over {used}; the other {started - used} "
            "exit",
            flush=True,
        )
    return used


def _core_left_out(config: Config, plan: Plan, tokenizer: Tokenizer, bundle: Bundle | None) -> Mapping[str, int]:
    """Returns CORE's task -> questions that do not fit the model."""
    if bundle is None:
        return {}
    limit, most = row_limit(plan.dims, config.evaluate), configured_examples(config.evaluate)
    return check_questions(bundle, tokenizer, limit, most)


@contextlib.contextmanager
def starting(activity: str, mesh: Mesh) -> Iterator[None]:
    """Announces a part of the start-up, in which other ranks may wait longer than usual; all ranks enter it."""
    with mesh.world.progress.long_running(activity), announced(activity, shown=mesh.world.rank == 0):
        yield


def plan_with_allocation(job: JobInputs, facts: dict | None, mesh: Mesh) -> Plan:
    """Returns the plan with the rows of its lookup tables allocated, if it has any; all ranks call it."""
    if job.plan.dims.lookup is None:
        return job.plan
    with starting("allocating the rows of the lookup table", mesh):
        lookup = allocated_lookup(job.config, job.plan.dims.lookup, job.tokenizer, job.folder, facts, mesh.world)
    return resolve_plan(job.config, mesh.world.size, job.plan.dims.vocab_size, lookup)


def build_job_run(job: JobInputs, checkpoint: Path | None, facts: dict | None, mesh: Mesh) -> tuple[Run, list[str]]:
    """Returns the run with initial weights and its loader at the checkpoint's documents, and notes for the log."""
    with starting("building model, optimizers and loader", mesh):
        loader_state, notes = None, list[str]()
        if checkpoint and facts:
            loader_state, notes = resume_documents(checkpoint, facts, job.config, job.plan, mesh, job.tokenizer)
        run = build_run(job.config, job.plan, mesh, job.tokenizer, job.folder, loader_state, job.bundle, job.kernels)
    return run, notes


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


def _memory_and_warnings(config: Config, plan: Plan, device: torch.device, local_ranks: int) -> list[str]:
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
