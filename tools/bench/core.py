"""What `tools/bench.py core` measures: CORE's examples a second in full batches beside one example at a time, in one process."""

from pathlib import Path

import torch
import torch.nn.functional as F

from megachat.evals.core import Evaluator, build_evaluator, evaluate_core
from megachat.evals.core_bundle import Task, open_bundle
from megachat.evals.core_prompts import Question, build_questions
from megachat.job.join import start_mesh
from megachat.job.launch import bootstrap_environment, choose_device
from megachat.model.gpt import logits, run_layers
from megachat.train.weights import EvaluationModel, build_evaluation_model, evaluation_plan, open_saved_model


@torch.no_grad()
def right_alone(layers, dims, question: Question) -> bool:
    """One example by itself: its rows whole, padded to the longest, all logits of all of them. The oracle of the batched way."""
    width = max(len(row.tokens) for row in question.rows)
    ids = torch.tensor([[*row.tokens, *[0] * (width - len(row.tokens))] for row in question.rows])
    found = logits(run_layers(layers, ids), dims)[:, :-1]
    nats = F.cross_entropy(found.transpose(1, 2), ids[:, 1:], reduction="none")
    spans = [slice(row.start - 1, len(row.tokens) - 1) for row in question.rows]
    if question.gold is None:
        return bool((found[0, spans[0]].argmax(dim=-1) == ids[0, 1:][spans[0]]).all())
    means = [own[span].mean().item() for own, span in zip(nats, spans, strict=True)]
    return means.index(min(means)) == question.gold


def one_by_one(layers, dims, tasks: tuple[Task, ...], tokenizer, max_per_task: int) -> dict[str, tuple[bool, ...]]:
    """Task -> each example right or not, one after the other; for one process."""
    asked = {task.label: build_questions(task, tokenizer, dims.sequence_len, max_per_task) for task in tasks}
    return {label: tuple(right_alone(layers, dims, question) for question in own) for label, own in asked.items()}


def opened(checkpoint: Path, overrides: list[str]) -> tuple[EvaluationModel, Evaluator]:
    """The checkpoint's model in this process, in float32 unless the overrides say otherwise."""
    device = choose_device(bootstrap_environment())
    saved = open_saved_model(checkpoint, ["precision.compute=float32", *overrides])
    model = build_evaluation_model(saved, evaluation_plan(saved, 1), start_mesh(saved.config, device))
    return model, build_evaluator(model)


def actions(checkpoint: Path, bundle: Path, overrides: list[str], max_per_task: int) -> tuple[dict, dict]:
    """(what to time, by way; facts). Raises RuntimeError when the ways disagree on any example."""
    model, evaluator = opened(checkpoint, overrides)
    tasks, dims = open_bundle(bundle).tasks, model.plan.dims
    together = evaluate_core(evaluator, tasks, model.tokenizer, max_per_task=max_per_task)
    alone = one_by_one(model.layers, dims, tasks, model.tokenizer, max_per_task)
    for label, result in together.tasks.items():
        if result.right != alone[label]:
            raise RuntimeError(f"{label}: the ways find other examples right")
    ways = {
        "one by one": lambda: one_by_one(model.layers, dims, tasks, model.tokenizer, max_per_task),
        "in batches": lambda: evaluate_core(evaluator, tasks, model.tokenizer, max_per_task=max_per_task),
    }
    examples = sum(len(right) for right in alone.values())
    facts = {
        "examples": examples,
        "padding_share": together.padding_share,
        "tasks": {task.label: len(alone[task.label]) for task in tasks},
    }
    return ways, facts | {
        "depth": dims.depth,
        "width": dims.width,
        "threads": torch.get_num_threads(),
        "tokens_a_pass": evaluator.tokens_per_pass,
    }
