"""CORE of a model under its engine: the metric's tasks, read and checked before anything starts, and what an evaluation tells."""

import time
from collections.abc import Callable

from megachat.config import EvaluateConfig
from megachat.data.tokenizer import Tokenizer
from megachat.evals.core import Evaluator, TaskResult, core_metric, evaluate_core
from megachat.evals.core_bundle import CORE_TASKS, Bundle, check_cap, open_bundle
from megachat.evals.results import core_section


def open_asked_bundle(asked: EvaluateConfig) -> Bundle | None:
    """The bundle for CORE during training; None when it is off. Raises UserError for all that is wrong with it."""
    if not asked.core_every:
        return None
    bundle = open_bundle(asked.core_bundle, asked.core_tasks)
    check_cap(bundle, asked.core_max_per_task, "evaluate.core_max_per_task")
    return bundle


def describe_bundle(bundle: Bundle) -> str:
    """One line for the log."""
    examples = sum(len(task.examples) for task in bundle.tasks)
    what = f"CORE bundle: {len(bundle.tasks)} tasks, {examples:,} examples, digest {bundle.digest[:12]}"
    return what + (
        f"; {len(bundle.missing)} of CORE's {len(CORE_TASKS)} tasks are missing, so their mean is not CORE"
        if bundle.missing
        else ""
    )


def build_evaluator(model) -> Evaluator:
    """Evaluator of a run in training (train.build.Training) or of a checkpoint's weights (train.weights.Evaluated)."""
    return Evaluator(model.engine, model.plan.dims, model.mesh, sequence=model.config.parallel.sequence)


def evaluate_bundle(
    evaluator: Evaluator,
    bundle: Bundle,
    tokenizer: Tokenizer,
    *,
    max_per_task: int,
    told: Callable[[int, int], object] = lambda done, of: None,
) -> dict:
    """CORE's section of an evaluation's JSON; all ranks call it and get the same. max_per_task: -1 for all. told: (examples done, of)."""
    begin = time.perf_counter()
    found = evaluate_core(evaluator, bundle.tasks, tokenizer, max_per_task=max_per_task, told=told)
    return _section(bundle, found.tasks, max_per_task, begin, found.padding_share)


def evaluate_until(
    stop: Callable[[], bool], evaluator: Evaluator, bundle: Bundle, tokenizer: Tokenizer, *, max_per_task: int
) -> dict | None:
    """The same, task after task, or None as soon as stop() between two of them, which must be the same on all ranks: a job that is told to
    stop has seconds, and an evaluation may take minutes."""
    begin, tasks, padding = time.perf_counter(), {}, []
    for task in bundle.tasks:
        if stop():
            return None
        found = evaluate_core(evaluator, (task,), tokenizer, max_per_task=max_per_task)
        tasks |= found.tasks
        padding.append(found.padding_share)
    return _section(bundle, tasks, max_per_task, begin, sum(padding) / len(padding))


def _section(
    bundle: Bundle, tasks: dict[str, TaskResult], max_per_task: int, begin: float, padding_share: float
) -> dict:
    right = {label: result.right for label, result in tasks.items()}
    return core_section(
        bundle,
        right,
        core_metric(tasks),
        max_per_task,
        padding_share=padding_share,
        seconds=time.perf_counter() - begin,
    )
