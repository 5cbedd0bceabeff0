"""Measures CORE's examples per second in full batches and one example at a time, in one process."""

from argparse import Namespace
from pathlib import Path

import torch
import torch.nn.functional as F

from megachat.convert.saved_model import open_saved_model
from megachat.errors import UserError
from megachat.evals.core import Evaluator, build_evaluator, evaluate_tasks
from megachat.evals.core_bundle import CoreTask, open_bundle
from megachat.evals.core_prompts import Question, RowLimit, build_questions
from megachat.job.join import start_mesh
from megachat.job.launch import bootstrap_environment, choose_device
from megachat.model.gpt import logits, run_layers
from megachat.train.weights import EvaluationModel, build_evaluation_model, evaluation_plan
from tools.bench.turns import compare_rates, time_in_turn


@torch.no_grad()
def answers_correctly(layers, dims, question: Question) -> bool:
    """Computes one example by itself, with all logits of its padded rows: the oracle of the batched evaluation."""
    width = max(len(row.tokens) for row in question.rows)
    ids = torch.tensor([[*row.tokens, *[0] * (width - len(row.tokens))] for row in question.rows])
    predictions = logits(run_layers(layers, ids), dims)[:, :-1]
    nats = F.cross_entropy(predictions.transpose(1, 2), ids[:, 1:], reduction="none")
    spans = [slice(row.start - 1, len(row.tokens) - 1) for row in question.rows]
    if question.gold is None:
        return bool((predictions[0, spans[0]].argmax(dim=-1) == ids[0, 1:][spans[0]]).all())
    means = [row[span].mean().item() for row, span in zip(nats, spans, strict=True)]
    return means.index(min(means)) == question.gold


def one_by_one(
    layers, dims, tasks: tuple[CoreTask, ...], tokenizer, limit: RowLimit, max_per_task: int, change=None
) -> dict[str, tuple[bool, ...]]:
    """Returns task -> whether each example is answered correctly, computed one by one in one process. change: see
    build_questions.
    """
    questions = {task.label: build_questions(task, tokenizer, limit, max_per_task, change) for task in tasks}
    return {
        label: tuple(answers_correctly(layers, dims, one) for one in some if one) for label, some in questions.items()
    }


def build_model_and_evaluator(checkpoint: Path, overrides: list[str]) -> tuple[EvaluationModel, Evaluator]:
    """Builds the checkpoint's model in this process, in float32 unless the overrides change it."""
    device = choose_device(bootstrap_environment())
    saved = open_saved_model(checkpoint, ["precision.compute=float32", *overrides])
    model = build_evaluation_model(saved, evaluation_plan(saved, 1), start_mesh(saved.config, device))
    return model, build_evaluator(model)


def bench_core(arguments: Namespace) -> dict:
    """Measures CORE's examples per second in batches and one at a time. Raises RuntimeError if any answer differs."""
    if not arguments.checkpoint or not arguments.bundle:
        raise UserError("core requires --checkpoint and --bundle")
    model, evaluator = build_model_and_evaluator(Path(arguments.checkpoint), arguments.set)
    tasks, dims, limit = open_bundle(Path(arguments.bundle)).tasks, model.plan.dims, arguments.max_per_task
    ways = {
        "one by one": lambda: one_by_one(model.layers, dims, tasks, model.tokenizer, evaluator.limit, limit),
        "in batches": lambda: evaluate_tasks(evaluator, tasks, model.tokenizer, max_per_task=limit),
    }
    single, (batched, padding_share) = ways["one by one"](), ways["in batches"]()
    for label, answers in batched.items():
        if answers.right != single[label]:
            raise RuntimeError(f"{label}: one by one and in batches have different answers")
    examples = sum(len(right) for right in single.values())
    facts = {
        "examples": examples,
        "padding_share": padding_share,
        "crop": evaluator.limit.crop,
        "tasks": {task.label: len(single[task.label]) for task in tasks},
        "depth": dims.depth,
        "width": dims.width,
        "threads": torch.get_num_threads(),
        "tokens_a_pass": evaluator.tokens_per_pass,
    }
    rates = compare_rates(time_in_turn(ways, arguments.rounds), "one by one", examples)
    return {"what": "examples per second", "facts": facts, "found": rates}
