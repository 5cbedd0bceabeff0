"""A pretraining job from its command line to its last checkpoint, on every rank."""

import dataclasses
import json
import time
from pathlib import Path

import torch

from megachat.checkpoint.resume import choose_checkpoint, find_checkpoint
from megachat.config import Config, load_config, save_config
from megachat.data.shards import DataSummary, check_data_folder
from megachat.data.tokenizer import Tokenizer, load_tokenizer
from megachat.device import choose_compute_dtype, device_name, memory_bytes, peak_flops, this_device
from megachat.errors import SAVED_STATUS, UserError
from megachat.evals.core_bundle import describe_bundle, open_configured_bundle
from megachat.evals.core_download import BUNDLE_PATH
from megachat.files import write_atomically
from megachat.job.agreement import rank_facts
from megachat.job.crash_guard import CrashGuard, guard_crashes
from megachat.job.failure_monitor import FailureMonitor
from megachat.job.join import join_job
from megachat.job.launch import (
    LaunchEnvironment,
    bootstrap_environment,
    choose_device,
    describe_environment,
    with_fewer_ranks,
)
from megachat.job.run_lock import lock_run_folder
from megachat.kernels.choice import choose_kernels, describe_kernels
from megachat.parallel.collectives import all_gather_objects, barrier
from megachat.planning.manifest import (
    describe_config,
    describe_ownership,
    describe_plan,
    describe_stages,
    ownership,
    plan_values,
)
from megachat.planning.memory import check_state_fits, describe_memory, memory_of_stages, memory_warning
from megachat.planning.plan import Plan, resolve, usable_world
from megachat.train.build import Run, build_run
from megachat.train.documents import resume_documents
from megachat.train.metrics import Metrics, check_wandb
from megachat.train.state import LoopState, check_checkpoint, load_state
from megachat.train.trainer import train


def pretrain(
    config_path: str,
    overrides: list[str],
    *,
    resume: str | None = None,
    dry_run: bool = False,
    world: int | None = None,
    memory_gb: float | None = None,
    elastic: bool = False,
) -> int:
    """Run the job that the config asks for; returns the exit status, SAVED_STATUS when it was told to stop and saved.

    dry_run prints what it would be, on `world` ranks with GPUs of `memory_gb` when these are given, and stops. elastic: where the ranks that were
    started do not fit the batch, the last ones end, with status 0, and the others train.
    """
    begin = time.perf_counter()
    config = load_config(config_path, overrides)
    name = config.run.name or Path(config_path).stem
    config = config.model_copy(
        update={"run": config.run.model_copy(update={"name": name})}
    )  # so that the saved one runs under the same name
    folder = Path(config.run.folder) / name
    environment = bootstrap_environment()
    if dry_run:
        if environment.rank == 0:
            print(describe_job(config, world or environment.world_size, memory_gb))
        return 0
    tokenizer = load_tokenizer(config.data.tokenizer)
    vocab_size = vocabulary(config, tokenizer)
    if elastic:
        environment = _fitting(environment, usable_world(config, environment.world_size, vocab_size))
        if environment is None:
            return 0
    plan = resolve(config, environment.world_size, vocab_size)
    find_checkpoint(folder, resume)  # what is wrong with it is told before anything starts
    data, bundle = check_data(config), open_configured_bundle(config.evaluate)
    if environment.rank == 0:
        check_wandb(config.log)
    device = choose_device(environment)
    kernels = choose_kernels(config, plan, device)  # what cannot be had is told before anything starts
    memory, *warnings = described_memory(config, plan, device, memory_bytes(device, environment.local_size))
    if environment.rank == 0 and warnings:
        print(
            *warnings, sep="\n", flush=True
        )  # now: a job that runs out of memory while it is built would not come to it
    bundle_facts = {"digest": bundle.digest[:12]} if bundle else {}
    own_facts = rank_facts(config, tokenizer, data, bundle=bundle_facts)
    with join_job(environment, config, own_facts, folder, then="continue with --resume auto") as (mesh, monitor):
        long_running = mesh.world.progress.long_running
        with lock_run_folder(folder, mesh.world) as remarks:
            with long_running("start-up"):
                checkpoint, told = choose_checkpoint(folder, resume, mesh.world)
                facts = check_checkpoint(checkpoint, plan, tokenizer, config) if checkpoint else None
            remarks += [*told, memory, f"data {data}", *([describe_bundle(bundle)] if bundle else [])]
            chosen = resume not in (None, "auto")
            with guard_crashes(folder, facts["step"] if facts else 0, mesh.world, forget=chosen) as guard:
                monitor.before_stop = guard.end
                with long_running("start-up"):
                    documents, told = (
                        resume_documents(checkpoint, facts, config, plan, mesh, tokenizer) if facts else (None, [])
                    )
                    remarks += told
                    run = build_run(config, plan, mesh, tokenizer, folder, documents, bundle, kernels)
                with run.loader:
                    stopped = _run_job(run, checkpoint, environment, remarks, begin, monitor, guard)
    return SAVED_STATUS if stopped else 0


def _fitting(environment: LaunchEnvironment, used: int) -> LaunchEnvironment | None:
    """This rank's place among the first `used` ranks; None when it is none of them."""
    if environment.rank == 0 and used < environment.world_size:
        print(
            f"{environment.world_size} ranks were started, of which {used} fit the batch and train; the others have ended",
            flush=True,
        )
    return with_fewer_ranks(environment, used) if environment.rank < used else None


def _run_job(
    run: Run,
    checkpoint: Path | None,
    environment: LaunchEnvironment,
    remarks: list[str],
    begin: float,
    monitor: FailureMonitor,
    guard: CrashGuard,
) -> bool:
    """Load, train and tell; whether it stopped because it was told to."""
    with run.mesh.world.progress.long_running("loading the checkpoint"):
        state = load_state(run, checkpoint) if checkpoint else LoopState()
    if run.is_writer:
        _write_run_folder(run, environment)
    barrier(run.mesh.world)
    name = run.folder.name
    settings = {"config": run.config.model_dump(mode="json"), "plan": plan_values(run.plan)} if run.is_writer else {}
    metrics = Metrics(
        run.folder,
        run.config.log,
        writes=run.is_writer,
        first_step=state.step,
        steps=run.plan.steps,
        run_name=name,
        settings=settings,
    )
    try:
        for line in [*remarks, *_banner(run, environment)]:
            metrics.say(line)
        if checkpoint:
            metrics.say(f"resumed from {checkpoint} at step {state.step}")
        metrics.say(f"start-up took {time.perf_counter() - begin:.1f} s")
        if state.step >= run.plan.stop_step and not (state.owes_evaluation or state.owes_core):
            metrics.say(
                f"nothing to do: step {state.step} is not before the last step {run.plan.stop_step}; "
                "raise horizon.steps or horizon.stop_step to go on"
            )
        with monitor.defer_stop(run.config.checkpoint.stop_s):
            if train(run, state, metrics, lambda: bool(monitor.stop_requested), guard.record_step):
                metrics.say(f"stopped after step {state.step}, which is saved: continue with --resume auto")
                return True
        guard.forget()
        metrics.say(
            f"finished step {state.step}"
            + (f", best validation bpb {state.min_val_bpb:.6f}" if state.min_val_bpb is not None else "")
        )
        metrics.say(f"run folder: {run.folder}")
        return False
    finally:
        metrics.close()


def vocabulary(config: Config, tokenizer: Tokenizer) -> int:
    """The tokenizer's vocabulary size; raises UserError when the config asks for another."""
    asked = config.model.vocab_size
    if asked is not None and asked != tokenizer.vocab_size:
        raise UserError(
            f"model.vocab_size is {asked} but the tokenizer in {config.data.tokenizer} has {tokenizer.vocab_size} tokens: "
            "leave model.vocab_size out, or give the tokenizer that belongs to it"
        )
    return tokenizer.vocab_size


def check_data(config: Config, *, least_shards: int = 2) -> DataSummary:
    """The data folder in figures; raises UserError for what would otherwise end the job at its first evaluation."""
    summary = check_data_folder(config.data.folder, min_shards=least_shards)
    if summary.validation_documents < config.data.streams:
        raise UserError(
            f"the validation shard of {config.data.folder} has {summary.validation_documents} documents, fewer than {config.data.streams} "
            f"packing streams: set data.streams to {max(1, summary.validation_documents)} or fewer, or put more text in the last shard"
        )
    return summary


def described_memory(config: Config, plan: Plan, device: torch.device, device_bytes: int) -> list[str]:
    """What a rank will hold, and a warning where that is too much. Raises UserError where a GPU is too small for the weights and their state."""
    dtype, on_gpu = choose_compute_dtype(config.precision.compute, device)[0], device.type == "cuda"
    stages = memory_of_stages(config, plan, dtype, on_gpu=on_gpu)
    if on_gpu:
        check_state_fits(stages, device_bytes)
    warning = memory_warning(config, plan, dtype, device_bytes, on_gpu=on_gpu)
    return [describe_memory(stages, device_bytes), *([warning] if warning else [])]


def _planned_memory(config: Config, plan: Plan, memory_gb: float | None) -> str:
    """As `described_memory`, for GPUs of `memory_gb` or, when that is None, of this machine if it has any; bfloat16 there unless asked for."""
    here = this_device()
    on_gpu = memory_gb is not None or here.type == "cuda"
    asked = config.precision.compute
    dtype = torch.bfloat16 if on_gpu and asked == "auto" else choose_compute_dtype(asked, here)[0]
    device_bytes = int(memory_gb * 1e9) if memory_gb else memory_bytes(here, 1) if on_gpu else None
    warning = memory_warning(config, plan, dtype, device_bytes) if device_bytes else None
    line = f"{describe_memory(memory_of_stages(config, plan, dtype, on_gpu=on_gpu), device_bytes)}; computed in {str(dtype).removeprefix('torch.')}"
    return "\n".join([line, warning] if warning else [line])


def describe_job(config: Config, world: int, memory_gb: float | None = None) -> str:
    """Config, plan, parameter table, ownership manifest and memory of the job on `world` ranks; nothing is started and no data is read but CORE's
    bundle, where it is asked for. memory_gb: of the GPUs that are planned for."""
    vocab_size = config.model.vocab_size or load_tokenizer(config.data.tokenizer).vocab_size
    plan: Plan = resolve(config, world, vocab_size)
    parts = [
        describe_config(config),
        describe_plan(plan),
        describe_ownership(ownership(config, plan)),
        _planned_memory(config, plan, memory_gb),
    ]
    if config.evaluate.core_every and config.evaluate.core_bundle is None and not BUNDLE_PATH.exists():
        parts.append(f"CORE bundle: downloaded to {BUNDLE_PATH} when the job starts")
    elif bundle := open_configured_bundle(config.evaluate):
        parts.append(describe_bundle(bundle))
    return "\n\n".join(parts)


def _write_run_folder(run: Run, environment: LaunchEnvironment) -> None:
    save_config(run.config, run.folder / "config.json")
    write_atomically(run.folder / "plan.json", json.dumps(plan_values(run.plan), indent=2).encode() + b"\n")
    path = run.folder / "environment.json"
    earlier = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    now = describe_environment(run.mesh.device) | {
        "launch": dataclasses.asdict(environment),
        "compute_dtype": str(run.compute_dtype),
    }
    now |= {"core_bundle": run.bundle.digest} if run.bundle else {}
    write_atomically(path, json.dumps([*earlier, now], indent=2).encode() + b"\n")


def _banner(run: Run, environment: LaunchEnvironment) -> list[str]:
    """All ranks call it; the first lines of the log."""
    matrices = sum(all_gather_objects(len(run.muon.plan.matrices), run.mesh.pipeline))
    plan, layout, device = run.plan, run.plan.layout, run.mesh.device
    dtype = str(run.compute_dtype).removeprefix("torch.")
    threads = f" with {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    axes = f"data {layout.data} x tensor {layout.tensor} x pipeline {layout.pipeline}"
    peak = peak_flops(device) or "unknown, no MFU is printed"
    return [
        f"megachat: {run.folder.name} on {layout.world} rank{'s' * (layout.world > 1)} ({axes}), started by {environment.launcher}",
        f"device {device_name(device)}{threads}; compute {dtype} ({run.dtype_reason}); peak FLOPs {peak}",
        *describe_kernels(run.config, run.kernels, plan),
        f"depth {plan.dims.depth}, width {plan.dims.width}, {plan.parameters['total']:,} parameters; "
        f"Muon has {matrices} matrices, the rest is AdamW's",
        f"{plan.steps} steps of {plan.tokens_per_step:,} tokens = {plan.rows_per_step} rows of {plan.dims.sequence_len} "
        f"({plan.micro_rows} rows x {plan.accumulation} micro-batches a rank)",
        *(
            [f"pipeline {describe_stages(plan)}; bubble {plan.bubble:.1%} of a step by FLOPs"]
            if layout.pipeline > 1
            else []
        ),
    ]
