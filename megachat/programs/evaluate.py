"""The evaluation program: from a request to a JSON file. Every rank runs it."""

import contextlib
import dataclasses
import functools
import json
import time
from collections.abc import Sequence
from pathlib import Path

from megachat.activity import ProgressBar, announced
from megachat.checkpoint.resume import find_damage
from megachat.convert.saved_model import SavedModel, open_saved_model
from megachat.device import dtype_name
from megachat.errors import UserError
from megachat.evals.bpb import ValidationRows, bits_per_byte
from megachat.evals.core import build_evaluator, evaluate_bundle
from megachat.evals.core_bundle import Bundle, check_max_per_task, describe_bundle, open_bundle
from megachat.evals.core_prompts import check_questions, row_limit
from megachat.evals.engine_model import sample_prompts
from megachat.evals.results import core_table, evaluation_stamp, results_path, save_results
from megachat.evals.sources import SourceRows, source_names
from megachat.files import Log, check_writable
from megachat.job.agreement import rank_facts
from megachat.job.join import join_job
from megachat.job.launch import bootstrap_environment
from megachat.planning.layouts import describe_layout
from megachat.programs.job_inputs import check_data
from megachat.text import plural
from megachat.train.documents import build_loader
from megachat.train.weights import (
    EvaluationModel,
    build_evaluation_model,
    evaluation_plan,
)

DEFAULT = ""  # --core or --bpb without a value


@dataclasses.dataclass(frozen=True)
class EvaluationRequest:
    """The command line of `megachat evaluate`.

    core: the bundle, DEFAULT to download it, None for no CORE. bpb: the data folder, DEFAULT for the run's, None for no
    bits per byte. tasks: labels, None for all. max_per_task: -1 for all. out: None for a file in the run's folder.
    """

    checkpoint: Path
    overrides: Sequence[str] = ()
    core: str | None = None
    bpb: str | None = None
    sample: bool = False
    tasks: tuple[str, ...] | None = None
    max_per_task: int = -1
    out: Path | None = None
    tokenizer: Path | None = None


def evaluate(request: EvaluationRequest) -> dict | None:
    """Evaluates a checkpoint, logs and saves the results; all ranks call it.

    Returns the JSON file's content on rank 0, None on the others. Raises UserError for an invalid request,
    if possible before the ranks meet.
    """
    environment = bootstrap_environment()
    saved = open_saved_model(request.checkpoint, list(request.overrides), request.tokenizer)
    if request.bpb:
        saved = dataclasses.replace(saved, config=saved.config.changed("data", folder=request.bpb))
    plan = evaluation_plan(saved, environment.world_size)
    bundle = _open_bundle(request)
    if bundle:
        limit = row_limit(plan.dims, saved.config.evaluate)
        check_questions(bundle, saved.tokenizer, limit, request.max_per_task)
    data = check_data(saved.config, least_shards=1) if request.bpb is not None else None
    if request.out is None and "capsule" in saved.reader.facts:
        raise UserError(f"{saved.reader.folder} is a capsule and no checkpoint of its run: give --out FILE")
    out = request.out or results_path(saved.run_folder, saved.step)
    if environment.rank == 0:
        check_writable(out)
    parts = [request.core is None, request.bpb is None, request.sample, request.tasks, request.max_per_task]
    facts = rank_facts(
        saved.config,
        saved.tokenizer,
        data,
        checkpoint={"content": saved.sha256[:12]},
        bundle={"digest": bundle.digest[:12]} if bundle else {},
        evaluation={"parts": json.dumps(parts)},
    )
    hint = "start the evaluation again"
    with join_job(environment, saved.config, facts, saved.run_folder, restart_hint=hint) as (mesh, _):
        log: Log = functools.partial(print, flush=True) if mesh.world.rank == 0 else lambda line: None
        folder = saved.reader.folder
        loading = f"loading {folder}"
        with mesh.world.progress.long_running("loading the checkpoint"), announced(loading, write=log):
            if saved.reader.format == "megachat" and (problem := find_damage(folder, mesh.world)):
                raise UserError(f"{folder} is damaged: {problem}; evaluate another step")
            model = build_evaluation_model(saved, plan, mesh)
        log(_banner(saved, model))
        results = _evaluate_model(model, request, bundle, log)
        if mesh.world.rank:
            return None
        document = _identity(saved, model) | results
        save_results(out, document)
        log(f"saved: {out}")
        return document


def _open_bundle(request: EvaluationRequest) -> Bundle | None:
    if request.core is None:
        if request.tasks or request.max_per_task != -1:
            raise UserError("--tasks and --max-per-task require --core: give it, or leave them out")
        return None
    bundle = open_bundle(request.core or None, request.tasks)
    check_max_per_task(bundle, request.max_per_task, "--max-per-task")
    return bundle


def _banner(saved: SavedModel, model: EvaluationModel) -> str:
    layout = model.plan.layout
    return (
        f"{saved.reader.folder}: step {saved.step}, depth {model.plan.dims.depth}, "
        f"on {plural(layout.world, 'rank')} ({describe_layout(vars(layout))}); "
        f"compute {dtype_name(model.compute_dtype)} ({model.dtype_reason}); "
        f"attention {model.attention.name} ({model.attention.reason})"
    )


def _identity(saved: SavedModel, model: EvaluationModel) -> dict:
    return {
        "run": saved.run_folder.name,
        "step": saved.step,
        "checkpoint": str(saved.reader.folder),
        "checkpoint_sha256": saved.sha256,
        "tokenizer": saved.tokenizer.fingerprint,
        "layout": dataclasses.asdict(model.plan.layout),
        "compute_dtype": dtype_name(model.compute_dtype),
    }


def _evaluate_model(model: EvaluationModel, request: EvaluationRequest, bundle: Bundle | None, log: Log) -> dict:
    """Returns the requested sections of the JSON file; all ranks call it."""
    results: dict[str, dict] = {}
    long_running = model.mesh.world.progress.long_running
    if request.bpb is not None:
        with long_running("evaluation"), announced("computing bits per byte", write=log):
            results["bpb"] = bpb = _bits_per_byte(model)
        log(f"validation bpb {bpb['bpb']:.6f} over {bpb['rows']:,} rows of {bpb['folder']}")
        for name, source in bpb.get("sources", {}).items():
            value = f"bpb {source['bpb']:.6f} over {source['rows']:,} rows" if source["rows"] else "no document"
            log(f"  {name}: {value} in the validation shard")
    if request.sample:
        with long_running("sampling"), announced("sampling", write=log):
            results["samples"] = sample_prompts(model.config, model.plan, model.mesh, model.engine, model.tokenizer)
        for text in results["samples"].values():
            log(f"sample: {text!r}")
    if bundle:
        log(describe_bundle(bundle))
        shown = contextlib.nullcontext() if model.mesh.world.rank else ProgressBar("CORE", None, " examples")
        with long_running("evaluation of CORE"), shown as progress:

            def on_progress(done: int, total: int) -> None:
                if progress:
                    progress.update(done - progress.done, total)

            section = evaluate_bundle(
                build_evaluator(model),
                bundle,
                model.tokenizer,
                max_per_task=request.max_per_task,
                on_progress=on_progress,
            )
        assert section is not None  # no stop was given
        results["core"] = section
        log("\n".join(core_table(section)))
    return results


def _bits_per_byte(model: EvaluationModel) -> dict:
    begin, plan, folder = time.perf_counter(), model.plan, model.config.data.folder
    with build_loader(model.config, plan, model.mesh, model.tokenizer, validation=True) as loader:
        rows = ValidationRows(loader, plan.evaluation_rows, plan.micro_rows, model.mesh)
    section = {
        "folder": folder,
        "bpb": bits_per_byte(model.engine, rows, model.mesh),
        "rows": plan.evaluation_rows,
    } | evaluation_stamp(model.tokenizer.fingerprint)
    sources = {}
    names = source_names(Path(folder))
    for name in names:
        most_rows = max(1, plan.evaluation_rows // len(names))
        sizes = {"tokens": plan.dims.sequence_len, "most_rows": most_rows, "micro_rows": plan.micro_rows}
        on_bad_text = model.config.data.on_bad_text
        source = SourceRows(Path(folder), name, model.tokenizer, **sizes, mesh=model.mesh, on_bad_text=on_bad_text)
        value = bits_per_byte(model.engine, source, model.mesh) if source.rows else None
        sources[name] = {"bpb": value, "rows": source.rows}
    return section | ({"sources": sources} if sources else {}) | {"seconds": time.perf_counter() - begin}
