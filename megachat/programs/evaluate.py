"""An evaluation of a checkpoint from its command line to its JSON file, on every rank."""

import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from megachat.checkpoint.resume import find_damage
from megachat.errors import UserError
from megachat.evals.bpb import ValidationRows, bits_per_byte
from megachat.evals.core import build_evaluator, evaluate_bundle
from megachat.evals.core_bundle import Bundle, check_max_per_task, describe_bundle, open_bundle
from megachat.evals.engine_model import sample_prompts
from megachat.evals.results import core_table, results_path, save_results
from megachat.evals.sources import SourceRows, source_names
from megachat.job.agreement import rank_facts
from megachat.job.join import join_job
from megachat.job.launch import bootstrap_environment
from megachat.programs.pretrain import check_data
from megachat.train.build import build_loader
from megachat.train.weights import (
    EvaluationModel,
    SavedModel,
    build_evaluation_model,
    evaluation_plan,
    open_saved_model,
)

LINE_EVERY_S = 30.0
DEFAULT = ""  # a part is asked for without saying which bundle or folder


@dataclass(frozen=True)
class EvaluationRequest:
    """What is to be measured. core: the bundle's place, DEFAULT for the downloaded one, None for no CORE. bpb: a data folder, DEFAULT for the
    run's own. max_per_task: -1 for all. tasks: labels, None for all. out: the JSON file, None for its place beside the run."""

    core: str | None
    bpb: str | None
    sample: bool
    tasks: tuple[str, ...] | None
    max_per_task: int
    out: Path | None


def evaluate(
    checkpoint: Path, overrides: list[str], asked: EvaluationRequest, *, tokenizer: Path | None = None
) -> None:
    """Measure and tell; all ranks call it. Raises UserError for what is wrong, before any rank works where that can be known."""
    if asked.core is None and asked.bpb is None and not asked.sample:
        raise UserError("nothing is to be evaluated: give one or more of --core, --bpb and --sample")
    environment = bootstrap_environment()
    saved = open_saved_model(checkpoint, overrides, tokenizer)
    if asked.bpb:
        saved = _with_data(saved, asked.bpb)
    plan = evaluation_plan(saved, environment.world_size)
    bundle = _bundle(asked)
    data = check_data(saved.config, least_shards=1) if asked.bpb is not None else None
    out = asked.out or results_path(saved.run_folder, saved.step)
    if environment.rank == 0:
        _check_writable(out)
    facts = rank_facts(
        saved.config,
        saved.tokenizer,
        data,
        checkpoint={"content": saved.sha256[:12]},
        bundle={"digest": bundle.digest[:12]} if bundle else {},
        evaluation={
            "parts": json.dumps([asked.core is None, asked.bpb is None, asked.sample, asked.tasks, asked.max_per_task])
        },
    )
    with join_job(environment, saved.config, facts, saved.run_folder, restart_hint="start the evaluation again") as (
        mesh,
        _,
    ):
        say = print if mesh.world.rank == 0 else _say_nothing
        with mesh.world.progress.long_running("loading the checkpoint"):
            if saved.opened.format == "megachat" and (problem := find_damage(saved.opened.folder, mesh.world)):
                raise UserError(f"{saved.opened.folder} is damaged: {problem}; evaluate another step")
            model = build_evaluation_model(saved, plan, mesh)
        say(_banner(saved, model), flush=True)
        told = _measured(model, asked, bundle, say)
        if mesh.world.rank == 0:
            save_results(out, _identity(saved, model) | told)
            say(f"written: {out}", flush=True)


def _say_nothing(*lines, **options) -> None:
    pass


def _with_data(saved: SavedModel, folder: str) -> SavedModel:
    config = saved.config
    return dataclasses.replace(
        saved, config=config.model_copy(update={"data": config.data.model_copy(update={"folder": folder})})
    )


def _bundle(asked: EvaluationRequest) -> Bundle | None:
    if asked.core is None:
        if asked.tasks or asked.max_per_task != -1:
            raise UserError("--tasks and --max-per-task are for --core: give that too, or leave them out")
        return None
    bundle = open_bundle(asked.core or None, asked.tasks)
    check_max_per_task(bundle, asked.max_per_task, "--max-per-task")
    return bundle


def _check_writable(out: Path) -> None:
    try:
        if out.is_dir():
            raise UserError(f"--out {out} is a folder: give a file")
        out.parent.mkdir(parents=True, exist_ok=True)
        probe = out.with_name(f".{out.name}.probe")
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror}): give another place with --out") from None


def _banner(saved: SavedModel, model: EvaluationModel) -> str:
    layout = model.plan.layout
    axes = f"data {layout.data} x tensor {layout.tensor} x pipeline {layout.pipeline}"
    ranks = f"{layout.world} rank{'s' * (layout.world > 1)} ({axes})"
    dtype = str(model.compute_dtype).removeprefix("torch.")
    attention = f"attention {model.attention.name} ({model.attention.reason})"
    return f"{saved.opened.folder}: step {saved.step}, depth {model.plan.dims.depth}, on {ranks}; compute {dtype} ({model.dtype_reason}); {attention}"


def _identity(saved: SavedModel, model: EvaluationModel) -> dict:
    return {
        "run": saved.run_folder.name,
        "step": saved.step,
        "checkpoint": str(saved.opened.folder),
        "checkpoint_sha256": saved.sha256,
        "tokenizer": saved.tokenizer.fingerprint,
        "layout": dataclasses.asdict(model.plan.layout),
        "compute_dtype": str(model.compute_dtype).removeprefix("torch."),
    }


def _measured(model: EvaluationModel, asked: EvaluationRequest, bundle: Bundle | None, say: Callable) -> dict:
    """The sections of the JSON file that were asked for; all ranks call it."""
    told, long_running = {}, model.mesh.world.progress.long_running
    if asked.bpb is not None:
        with long_running("evaluation"):
            told["bpb"] = _bits_per_byte(model)
        say(
            f"validation bpb {told['bpb']['bpb']:.6f} over {told['bpb']['rows']:,} rows of {told['bpb']['folder']}",
            flush=True,
        )
        for name, value in told["bpb"].get("sources", {}).items():
            told_of = (
                "no document of it in the validation shard"
                if value["bpb"] is None
                else f"bpb {value['bpb']:.6f} over {value['rows']:,} rows"
            )
            say(f"  {name}: {told_of}", flush=True)
    if asked.sample:
        with long_running("sampling"):
            told["samples"] = sample_prompts(model.config, model.plan, model.mesh, model.engine, model.tokenizer)
        for text in told["samples"].values():
            say(f"sample: {text!r}", flush=True)
    if bundle:
        say(describe_bundle(bundle), flush=True)
        with long_running("evaluation of CORE"), contextlib.closing(_Bar(shown=model.mesh.world.rank == 0)) as bar:
            told["core"] = evaluate_bundle(
                build_evaluator(model), bundle, model.tokenizer, max_per_task=asked.max_per_task, on_progress=bar.told
            )
        for line in core_table(told["core"]):
            say(line, flush=True)
    return told


class _Bar:
    """Examples done, their rate and the time left: a bar on a terminal, elsewhere a line now and then."""

    def __init__(self, *, shown: bool):
        self.shown, self.begin, self.next_s = shown, time.monotonic(), LINE_EVERY_S
        self.bar = tqdm(desc="CORE", unit=" examples", dynamic_ncols=True) if shown and sys.stderr.isatty() else None

    def told(self, done: int, of: int) -> None:
        """After some more examples."""
        passed_s = time.monotonic() - self.begin
        if self.bar is not None:
            self.bar.total = of
            self.bar.update(done - self.bar.n)
        elif self.shown and passed_s > self.next_s and done:
            self.next_s = passed_s + LINE_EVERY_S
            left_s = passed_s / done * (of - done)
            print(
                f"CORE: {done:,} of {of:,} examples, {done / passed_s:,.1f} a second, {left_s / 60:.1f} minutes left",
                flush=True,
            )

    def close(self) -> None:
        """End the bar's line."""
        if self.bar is not None:
            self.bar.close()


def _bits_per_byte(model: EvaluationModel) -> dict:
    begin, plan = time.perf_counter(), model.plan
    with build_loader(model.config, plan, model.mesh, model.tokenizer, validation=True) as loader:
        rows = ValidationRows(loader, plan.evaluation_rows, plan.micro_rows, model.mesh)
    told = {
        "folder": model.config.data.folder,
        "bpb": bits_per_byte(model.engine, rows, model.mesh),
        "rows": plan.evaluation_rows,
    }
    names = source_names(Path(model.config.data.folder))
    if names:
        told["sources"] = {
            name: _bits_per_byte_of(model, name, max(1, plan.evaluation_rows // len(names))) for name in names
        }
    return told | {"seconds": time.perf_counter() - begin}


def _bits_per_byte_of(model: EvaluationModel, source: str, most_rows: int) -> dict:
    plan, folder = model.plan, Path(model.config.data.folder)
    sizes = {"tokens": plan.dims.sequence_len, "most_rows": most_rows, "micro_rows": plan.micro_rows}
    rows = SourceRows(folder, source, model.tokenizer, **sizes, data=model.mesh.data)
    return {"bpb": bits_per_byte(model.engine, rows, model.mesh) if rows.rows else None, "rows": rows.rows}
