"""Tests saving and resuming with a job's ranks, config and data before it trains: `megachat pretrain --self-test`.

Some steps without a stop are compared with the same steps that are saved, loaded and continued twice: a defect may show
only at the second resume. Everything is built anew for each part, as in a new process, and lies in a folder beside the
run folder, which is removed. The training that follows is equal to the bit to one without the test.
"""

import dataclasses
import gc
import shutil
import time
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import torch

from megachat.activity import announced
from megachat.checkpoint.facts import checkpoint_name, read_facts
from megachat.config import Config, config_from_values
from megachat.convert.differences import compare_checkpoints
from megachat.convert.megachat import open_megachat
from megachat.errors import UserError
from megachat.files import CHECKPOINTS
from megachat.job.join import random_seed
from megachat.parallel.collectives import barrier, on_all_ranks_or_raise
from megachat.parallel.mesh import Mesh
from megachat.programs.job_inputs import JobInputs, build_job_run, plan_with_allocation
from megachat.train.metrics import Metrics
from megachat.train.state import LoopState, load_state
from megachat.train.trainer import Trainer

RESUMES, PART_STEPS = 2, 2  # resumes in a row; steps of each part


class Losses(Metrics):
    """Keeps the loss of each step in place of writing anything. by_step: step -> nats."""

    def __init__(self, folder: Path, config: Config):
        super().__init__(folder, config.log, writes=False, first_step=0, steps=0, run_name="", settings={})
        self.by_step: dict[int, float] = {}

    def record(self, values: dict) -> None:
        if "train/loss_raw" in values:
            self.by_step[values["step"]] = values["train/loss_raw"]


def run_self_test(job: JobInputs, mesh: Mesh) -> str:
    """Tests the job's resumes and returns a line for the log; all ranks call it.

    Raises UserError on all ranks if the resumed steps differ.
    """
    begin, last = time.perf_counter(), (RESUMES + 1) * PART_STEPS
    if job.plan.steps < last:
        raise UserError(f"--self-test takes {last} steps, but horizon.steps is {job.plan.steps}: leave it out")
    folder = job.folder.with_name(job.folder.name + ".self-test")

    def make_folders() -> None:
        if mesh.world.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)  # of a test that was killed
            for name in ("whole", *(f"resume_{number + 1}" for number in range(RESUMES))):
                (folder / name).mkdir(parents=True)

    on_all_ranks_or_raise(make_folders, mesh.world)
    job = dataclasses.replace(job, config=_test_config(job.config), folder=folder / "whole", bundle=None)
    job = dataclasses.replace(job, plan=plan_with_allocation(job, None, mesh))

    def part(name: str) -> AbstractContextManager[None]:
        return announced(f"self-test, {name}", shown=mesh.world.rank == 0)

    try:
        with part(f"whole run of {last} steps"):
            whole = _train_part(job, mesh, last, None)
        checkpoint = folder / "whole" / CHECKPOINTS / checkpoint_name(PART_STEPS)
        for number in range(1, RESUMES + 1):
            resumed, stop = dataclasses.replace(job, folder=folder / f"resume_{number}"), (number + 1) * PART_STEPS
            with part(f"resume {number} of {RESUMES}"):
                losses = _train_part(resumed, mesh, stop, checkpoint)
            name = checkpoint_name(stop)
            expected, checkpoint = (each.folder / CHECKPOINTS / name for each in (job, resumed))
            without_stop = {step: whole[step] for step in losses}
            compare = partial(_require_equal, expected, checkpoint, without_stop, losses, number)
            on_all_ranks_or_raise(compare, mesh.world)
    finally:
        if mesh.world.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
        torch.manual_seed(random_seed(job.config.run.seed, 0, mesh.world.rank))  # as when the ranks had joined
    barrier(mesh.world)
    return (
        f"self-test passed in {time.perf_counter() - begin:.1f} s: {last} steps, and the same steps with {RESUMES} "
        "resumes, are equal to the bit"
    )


def _test_config(config: Config) -> Config:
    """Returns the config without evaluation, with a checkpoint after each part."""
    sections = config.model_dump(mode="json")
    sections["evaluate"] |= {"every": 0, "core_every": 0, "sample_every": 0, "prompts": []}
    sections["checkpoint"] |= {"every": PART_STEPS, "keep_last": None, "keep_every": None}
    sections["log"] |= {"every": 1}
    return config_from_values(sections, "the self-test's config")


def _train_part(job: JobInputs, mesh: Mesh, stop: int, checkpoint: Path | None) -> dict[int, float]:
    """Trains in the job's folder to step `stop`, from the checkpoint or from the start; returns the losses."""
    job = dataclasses.replace(job, plan=dataclasses.replace(job.plan, stop_step=stop))
    run, _ = build_job_run(job, checkpoint, read_facts(checkpoint) if checkpoint else None, mesh)
    with run.loader:
        state = load_state(run, checkpoint) if checkpoint else LoopState()
        metrics = Losses(job.folder, job.config)
        Trainer(run, state, metrics, lambda: False, lambda step: None).fit()
    del run, state
    if job.config.precision.compile:
        torch.compiler.reset()
    gc.unfreeze()  # the trainer froze what existed; the model of this part must go before the next one is built
    gc.collect()
    if mesh.device.type == "cuda":
        torch.cuda.empty_cache()
    return metrics.by_step


def _require_equal(expected: Path, resumed: Path, losses: dict, resumed_losses: dict, number: int) -> None:
    """Raises UserError if losses or checkpoints differ in any bit."""
    where = f"after resume {number}"
    for step, loss in losses.items():
        if resumed_losses[step] != loss:
            _fail(f"{where} the loss of step {step} is {resumed_losses[step]!r}, without a stop {loss!r}")
    one, other = (read_facts(path) for path in (expected, resumed))
    if one["files"] != other["files"] or one["ledger"] != other["ledger"]:
        entries = compare_checkpoints(open_megachat(expected), open_megachat(resumed))
        names = [str(entry) for entry in entries if entry.counts] or ["files differ"]
        _fail(f"{where} the state after {expected.name} differs: {names[0]}")


def _fail(what: str) -> None:
    raise UserError(
        f"the self-test failed: {what}; nothing was trained: `megachat verify --resume --times {RESUMES}` compares in "
        "detail, and a start without --self-test trains anyway"
    )
