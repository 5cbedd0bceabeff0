"""The CORE metric of a model under its engine, on any layout: every example right or not, as one example at a time would find it, but in full
batches, with what an example's choices have in common computed once.

CORE: DCLM, arXiv 2406.11794; the definition in detail is nanochat's (github.com/karpathy/nanochat, nanochat/core_eval.py).
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from megachat.data.tokenizer import Tokenizer
from megachat.evals.core_batches import Batch, assign_batches, build_batches
from megachat.evals.core_bundle import CORE_TASKS, Bundle, Task
from megachat.evals.core_prompts import Question, build_questions
from megachat.evals.engine_model import evaluate_chunks
from megachat.evals.results import core_section
from megachat.kernels.cross_entropy import CHUNK_BYTES, VocabularyPart, token_nats
from megachat.model.cache import Cache
from megachat.model.gpt import LOGIT_CAP, logits
from megachat.parallel.collectives import all_reduce
from megachat.parallel.engine import Engine
from megachat.parallel.mesh import Mesh
from megachat.parallel.tensor import vocabulary_part
from megachat.planning.dimensions import Dimensions

TOKENS_PER_PASS = 4096


@dataclass(frozen=True)
class Evaluator:
    """What an evaluation needs of a built run. sequence: parallel.sequence. tokens_per_pass: of a batch, about."""

    engine: Engine
    dims: Dimensions
    mesh: Mesh
    sequence: bool = False
    tokens_per_pass: int = TOKENS_PER_PASS


@dataclass(frozen=True)
class TaskResult:
    """right: of each example, in the metric's order. centered: the accuracy above guessing, as a share of what is above guessing."""

    label: str
    right: tuple[bool, ...]
    accuracy: float
    centered: float


@dataclass(frozen=True)
class CoreResults:
    """core_metric: the plain mean of the centered accuracies of all of CORE's tasks; None where one is missing. padding_share: of the computed
    tokens, those that were none of an example's."""

    tasks: dict[str, TaskResult]
    core_metric: float | None
    padding_share: float


def evaluate_core(
    model: Evaluator,
    tasks: Sequence[Task],
    tokenizer: Tokenizer,
    *,
    max_per_task: int,
    told: Callable[[int, int], object] = lambda done, of: None,
) -> CoreResults:
    """Ask every example of the tasks; all ranks call it and get the same. max_per_task: -1 for all. told: (examples done, of), on every rank.

    Raises UserError as `questions` does.
    """
    asked = [
        question
        for task in tasks
        for question in build_questions(task, tokenizer, model.dims.sequence_len, max_per_task)
    ]
    mesh, multiple = model.mesh, model.mesh.tensor.size if model.sequence else 1
    parts = mesh.pipeline.size  # micro-batches of a pass, so that no stage waits while another works
    all_ranks = assign_batches(build_batches(asked, model.tokens_per_pass), mesh.data.size, multiple, parts)
    found = torch.zeros(sum(len(question.rows) for question in asked), dtype=torch.float64, device=mesh.device)
    passes = _Passes(model, multiple, parts)
    rows_left = sum(len(batch.rows) for own in all_ranks for batch in own)
    done_rows = _rows_done(all_ranks)
    for batch in all_ranks[mesh.data.rank]:
        for index, value in passes.of(batch):
            found[index] = value
        told(round(len(asked) * next(done_rows) / rows_left), len(asked))
    told(len(asked), len(asked))
    all_reduce(found, mesh.world, name="CORE's answers")  # each from one rank, zeros from the others
    verdicts = _verdicts(asked, found.tolist())
    results, begin = {}, 0
    for task in tasks:
        count = len(task.examples) if max_per_task < 1 else min(max_per_task, len(task.examples))
        results[task.label] = _result(task, verdicts[begin : begin + count])
        begin += count
    computed = sum(batch.tokens(multiple, parts) for own in all_ranks for batch in own)
    real = sum(batch.real_tokens for own in all_ranks for batch in own if batch.rows[0].found >= 0)
    return CoreResults(results, core_metric(results), 1 - real / computed if computed else 0.0)


def core_metric(results: dict[str, TaskResult]) -> float | None:
    """The mean over CORE's tasks, or None when one of them is missing."""
    if any(label not in results for label in CORE_TASKS):
        return None
    return sum(results[label].centered for label in CORE_TASKS) / len(CORE_TASKS)


def build_evaluator(model) -> Evaluator:
    """Evaluator of a run in training (train.build.Training) or of a checkpoint's weights (train.weights.EvaluationModel)."""
    return Evaluator(model.engine, model.plan.dims, model.mesh, sequence=model.config.parallel.sequence)


def evaluate_bundle(
    evaluator: Evaluator,
    bundle: Bundle,
    tokenizer: Tokenizer,
    *,
    max_per_task: int,
    told: Callable[[int, int], object] = lambda done, of: None,
    stop: Callable[[], bool] | None = None,
) -> dict | None:
    """Evaluates all tasks and returns the CORE section of an evaluation's JSON; all ranks call it and get the same.

    max_per_task: -1 for all examples. told: called with (examples done, of). stop: if given, tasks are evaluated one by one, and None is returned
    as soon as stop() is true before one of them. It must return the same on all ranks.
    """
    begin, results, padding = time.perf_counter(), {}, []
    for tasks in [bundle.tasks] if stop is None else [(task,) for task in bundle.tasks]:
        if stop is not None and stop():
            return None
        found = evaluate_core(evaluator, tasks, tokenizer, max_per_task=max_per_task, told=told)
        results |= found.tasks
        padding.append(found.padding_share)
    right = {label: result.right for label, result in results.items()}
    return core_section(
        bundle,
        right,
        core_metric(results),
        max_per_task,
        padding_share=sum(padding) / len(padding),
        seconds=time.perf_counter() - begin,
    )


def _result(task: Task, right: Sequence[bool]) -> TaskResult:
    accuracy = sum(right) / len(right)
    return TaskResult(task.label, tuple(right), accuracy, (accuracy - task.baseline) / (1 - task.baseline))


def _verdicts(asked: Sequence[Question], found: Sequence[float]) -> list[bool]:
    """Whether each question was answered right. found: of each row, the mean nats of its answer, or how many of its tokens are not the model's."""
    right, begin = [], 0
    for question in asked:
        own = found[begin : begin + len(question.rows)]
        begin += len(question.rows)
        # Python's min, as the reference has it, of equals the first; a nan is less than nothing, so it is chosen only where it comes first
        right.append(own[0] == 0 if question.gold is None else own.index(min(own)) == question.gold)
    return right


def _rows_done(all_ranks: list[list[Batch]]) -> Iterator[int]:
    """After each batch of a rank, about how many rows all ranks have done: they go on side by side."""
    done = 0
    for number in range(max(map(len, all_ranks))):
        done += sum(len(own[number].rows) for own in all_ranks if number < len(own))
        yield done


class _Passes:
    """Runs batches through the engine; all ranks of a stage and pipeline the same ones."""

    def __init__(self, model: Evaluator, multiple: int, parts: int):
        self.model, self.multiple, self.parts = model, multiple, parts
        part = vocabulary_part(model.dims.padded_vocab, model.mesh.tensor)
        self.measures = {exact: _Answers(model.dims, part, exact) for exact in (False, True)}

    def of(self, batch: Batch) -> list[tuple[int, float]]:
        """(index, what is found there) of the batch's rows, on the one rank that tells; elsewhere nothing."""
        shapes = batch.shapes(self.multiple)
        chunks, rows, each = [None] * self.parts, list(batch.rows), -(-len(batch.rows) // self.parts)
        if batch.contexts:
            of_part = _cut(range(len(batch.contexts)), self.parts)
            caches = [
                Cache(self.model.dims, max(1, max(map(len, of_part))), max(map(len, batch.contexts))) for _ in of_part
            ]
            self._prefill(batch, of_part, caches, shapes[0][1])
            rows_of_part = [
                [row for row, context in zip(batch.rows, batch.of, strict=True) if context in own] for own in of_part
            ]
            each = max(map(len, rows_of_part))
            chunks = [
                cache.branch(_filled([context - own.start for context in batch.of if context in own], each, 0))
                for cache, own in zip(caches, of_part, strict=True)
            ]
        else:
            rows_of_part = [rows[begin : begin + each] for begin in range(0, each * self.parts, each)]
        micro_batches = [_micro_batch(own, each, shapes[-1][1]) for own in rows_of_part]
        found = self._run(micro_batches, chunks, self.measures[batch.exact])
        return self._told(rows_of_part, found)

    def _prefill(self, batch: Batch, of_part: list[range], caches: list[Cache], width: int) -> None:
        chunks, micro_batches = [], []
        for own, cache in zip(of_part, caches, strict=True):
            contexts = _filled([batch.contexts[context] for context in own], len(cache.lengths), ())
            chunks.append(cache.extend([len(context) for context in contexts]))
            ids = torch.zeros(len(contexts), width, dtype=torch.int64)
            for row, context in enumerate(contexts):
                ids[row, : len(context)] = torch.tensor(context, dtype=torch.int64)
            micro_batches.append((ids, torch.zeros(1, dtype=torch.int64)))
        self._run(micro_batches, chunks, _Nothing())

    def _run(self, micro_batches: list, chunks: list, measure: nn.Module) -> list[torch.Tensor]:
        return evaluate_chunks(self.model.engine, micro_batches, chunks, measure)

    def _told(self, rows_of_part: list, found: list[torch.Tensor]) -> list[tuple[int, float]]:
        if not found or self.model.mesh.tensor.rank:
            return []
        pairs = [
            pair
            for own, values in zip(rows_of_part, found, strict=True)
            for pair in zip(own, values.tolist(), strict=False)
        ]
        return [(row.found, value) for row, value in pairs if row.found >= 0]


class _Nothing(nn.Module):
    """What is measured of a pass that only fills a cache."""

    def forward(self, output: tuple[torch.Tensor, torch.Tensor], targets: torch.Tensor) -> torch.Tensor:
        return torch.zeros((), device=targets.device)


class _Answers(nn.Module):
    """The head's output and targets [rows, tokens], -1 where nothing is asked -> [rows] float64: the mean nats of a row's targets, or, when they
    must be exact, how many of them are not the most likely token. The head computes only where something is asked."""

    def __init__(self, dims: Dimensions, part: VocabularyPart, exact: bool):
        super().__init__()
        self.dims, self.part, self.exact = dims, part, exact

    def forward(self, output: tuple[torch.Tensor, torch.Tensor], targets: torch.Tensor) -> torch.Tensor:
        hidden, weight = output
        row, at = (targets >= 0).nonzero(as_tuple=True)
        asked, wanted = hidden[row, at], targets[row, at]
        if not len(asked):  # a micro-batch of nothing but padding
            values = torch.zeros(0, dtype=torch.float64, device=targets.device)
        elif self.exact:
            size = max(1, CHUNK_BYTES // (4 * self.dims.vocab_size))
            said = [logits((part, weight), self.dims, self.part).argmax(dim=-1) for part in asked.split(size)]
            values = (torch.cat(said) != wanted).double()
        else:
            values = token_nats(asked, weight, wanted, self.dims.vocab_size, LOGIT_CAP, self.part).double()
        total = torch.zeros(len(targets), dtype=torch.float64, device=targets.device).index_add_(0, row, values)
        return (
            total if self.exact else total / (targets >= 0).sum(dim=1)
        )  # nan for an answer without tokens, as where one choice begins another


def _micro_batch(rows: Sequence, each: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """ids and targets [each, width] of rows, the rest empty."""
    ids = torch.zeros(each, width, dtype=torch.int64)
    targets = torch.full((each, width), -1)
    for slot, row in enumerate(rows):
        tokens = torch.tensor(row.tokens)
        ids[slot, : len(tokens)] = tokens
        targets[slot, row.start - 1 : len(tokens) - 1] = tokens[row.start :]
    return ids, targets


def _cut(whole: range, parts: int) -> list[range]:
    """The range in consecutive parts of nearly equal lengths; some are empty when it is short."""
    each = -(-len(whole) // parts)
    return [whole[begin : begin + each] for begin in range(0, each * parts, each)]


def _filled(values: list, count: int, filling) -> list:
    return values + [filling] * (count - len(values))
