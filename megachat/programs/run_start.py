"""What a job writes when it starts: the files of its run folder that describe it, and the first lines of its log."""

import dataclasses
import json
import time
from pathlib import Path

import torch

from megachat.config import save_config
from megachat.data.shards import shard_hashes
from megachat.data.tokenizer import tokenizer_facts
from megachat.device import device_name, dtype_name, peak_flops
from megachat.files import CONFIG_NAME, ENVIRONMENT_NAME, PLAN_NAME, Log, read_side_file, write_side_json
from megachat.job.launch import LaunchEnvironment, describe_environment
from megachat.kernels.choice import describe_kernels
from megachat.kernels.cross_entropy import CHUNK_BYTES, GPU_CHUNK_BYTES
from megachat.parallel.collectives import all_gather_objects
from megachat.planning.explain import describe_stages, plan_values
from megachat.planning.layouts import describe_layout
from megachat.text import plural
from megachat.train.build import Run, agreed_head_chunk
from megachat.train.check_cost import describe_device_checks
from megachat.train.state import LoopState


def write_run_folder(run: Run, state: LoopState, environment: LaunchEnvironment, log: Log) -> None:
    """Writes config.json, plan.json and environment.json; damaged ones are set aside. log: gets a line for each."""
    if state.step < run.plan.stop_step:  # else they describe the job that trained the last step
        read_side_file(run.folder / CONFIG_NAME, json.loads, log)  # sets a damaged one aside
        save_config(run.config, run.folder / CONFIG_NAME)
        write_side_json(run.folder / PLAN_NAME, plan_values(run.plan), log)
    path = run.folder / ENVIRONMENT_NAME
    earlier = read_side_file(path, _parse_list, log) or []
    now = describe_environment(run.mesh.device) | {
        "launch": dataclasses.asdict(environment),
        "compute_dtype": str(run.compute_dtype),
        "tokenizer": tokenizer_facts(run.config.data.tokenizer, run.tokenizer),
        "data": shard_hashes(Path(run.config.data.folder)),
    }
    now |= {"time": round(time.time(), 3)}
    now |= {"core_bundle": run.bundle.digest} if run.bundle else {}
    write_side_json(path, [*earlier, now], log)


def _parse_list(content: bytes) -> list:
    if not isinstance(records := json.loads(content), list):
        raise ValueError("not a list")
    return records


def banner(run: Run, environment: LaunchEnvironment) -> list[str]:
    """Returns the first lines of the log; all ranks call it."""
    matrices = sum(all_gather_objects(len(run.muon.plan.matrices), run.mesh.pipeline))
    plan, layout, device = run.plan, run.plan.layout, run.mesh.device
    dtype = dtype_name(run.compute_dtype)
    threads = f" with {plural(torch.get_num_threads(), 'thread')}" if device.type == "cpu" else ""
    peak = peak_flops(device) or "unknown, no MFU is printed"
    ngram, chunk = plan.dims.ngram, agreed_head_chunk(run.config, plan, run.mesh, run.compute_dtype)
    tables = f"{len(ngram.blocks) * len(ngram.orders)} n-gram tables are divided by rows, " if ngram else ""
    pipeline = [f"pipeline {describe_stages(plan)}; bubble {plan.bubble:.1%} of a step, by FLOPs"]
    return [
        f"megachat: {run.folder.name} on {plural(layout.world, 'rank')} ({describe_layout(vars(layout))}), started by "
        f"{environment.launcher}",
        f"device {device_name(device)}{threads}; compute {dtype} ({run.dtype_reason}); peak FLOPs {peak}",
        *describe_kernels(run.config, run.kernels, plan),
        f"depth {plan.dims.depth}, width {plan.dims.width}, {plan.parameters['total']:,} parameters; "
        f"Muon has {matrices} matrices, {tables}AdamW the rest",
        f"{plan.steps} steps of {plan.tokens_per_step:,} tokens = {plan.rows_per_step} rows of "
        f"{plan.dims.sequence_len} ({plural(plan.micro_rows, 'row')} x {plural(plan.accumulation, 'micro-batch')} "
        "per rank)",
        *(pipeline if layout.pipeline > 1 else []),
        *(
            []
            if chunk in (CHUNK_BYTES, GPU_CHUNK_BYTES)
            else [f"head and loss in chunks of {chunk >> 20} MiB of logits"]
        ),
        *([checks] if (checks := describe_device_checks(run.config.reliability)) else []),
        *([f"note: {run.config.run.note}"] if run.config.run.note else []),
    ]
