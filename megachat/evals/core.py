"""Evaluates CORE (see core_prompts) on a model under its engine, on any layout.

Examples are computed in full batches, and the context that the choices of an example share is computed once. Each
example still gets the same answer as if it were computed alone.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from megachat.data.tokenizer import Tokenizer
from megachat.errors import UserError
from megachat.evals.controls import control_section, swap_examples
from megachat.evals.core_batches import IDLE, Batch, BatchRow, assign_batches, build_batches
from megachat.evals.core_bundle import Bundle, CoreTask
from megachat.evals.core_prompts import Question, RowLimit, build_questions, row_limit
from megachat.evals.engine_model import evaluate_chunks
from megachat.evals.local_engine import EvaluationEngine
from megachat.evals.results import Answers, core_section, evaluation_stamp
from megachat.kernels.cross_entropy import CHUNK_BYTES, VocabularyPart, token_nats
from megachat.model.cache import Cache, Chunk
from megachat.model.gpt import LOGIT_CAP, logits
from megachat.parallel.collectives import all_reduce
from megachat.parallel.mesh import Mesh
from megachat.parallel.tensor import vocabulary_part
from megachat.planning.dimensions import Dimensions

TOKENS_PER_PASS = 4096
ReportProgress = Callable[[int, int], object]  # called with (examples done, all examples)


@dataclass(frozen=True)
class Evaluator:
    """A model to evaluate. sequence: the setting parallel.sequence. tokens_per_pass: approximate size of a batch.

    controls: whether each example is also evaluated with another one's context (evals/controls.py).
    """

    engine: EvaluationEngine
    dims: Dimensions
    mesh: Mesh
    limit: RowLimit
    sequence: bool = False
    tokens_per_pass: int = TOKENS_PER_PASS
    controls: bool = False


def build_evaluator(model) -> Evaluator:
    """Returns the Evaluator of a train.build.TrainingModel or a train.weights.EvaluationModel."""
    limit, sequence = row_limit(model.plan.dims, model.config.evaluate), model.config.parallel.sequence
    controls = model.config.evaluate.core_controls
    return Evaluator(model.engine, model.plan.dims, model.mesh, limit, sequence, controls=controls)


def evaluate_bundle(
    evaluator: Evaluator,
    bundle: Bundle,
    tokenizer: Tokenizer,
    *,
    max_per_task: int,
    on_progress: ReportProgress = lambda done, total: None,
    stop: Callable[[], bool] | None = None,
) -> dict | None:
    """Evaluates the bundle and returns the "core" section of an evaluation's JSON; all ranks call it and get the same.

    max_per_task: -1 for all examples. stop: called before each task, if given. It must return the same on all ranks;
    once it returns True, the evaluation ends and returns None. A whole evaluation may take minutes, and a job that
    must stop has only seconds.
    """
    begin, padding = time.perf_counter(), []
    answers, controls = dict[str, Answers](), dict[str, Answers]()
    for tasks in [bundle.tasks] if stop is None else [(task,) for task in bundle.tasks]:
        for swap in (False, True) if evaluator.controls else (False,):
            if stop is not None and stop():
                return None
            some, share = evaluate_tasks(
                evaluator, tasks, tokenizer, max_per_task=max_per_task, on_progress=on_progress, swap=swap
            )
            (controls if swap else answers).update(some)
            padding.append(share)
    stamp = evaluation_stamp(tokenizer.fingerprint)
    measured = {"padding_share": sum(padding) / len(padding), "seconds": time.perf_counter() - begin}
    more = stamp | measured
    if evaluator.controls:
        more["controls"] = control_section(bundle.tasks, answers, controls)
    return core_section(bundle, answers, max_per_task, crop=evaluator.limit.crop, **more)


def evaluate_tasks(
    model: Evaluator,
    tasks: Sequence[CoreTask],
    tokenizer: Tokenizer,
    *,
    max_per_task: int,
    on_progress: ReportProgress = lambda done, total: None,
    swap: bool = False,
) -> tuple[dict[str, Answers], float]:
    """Answers the examples of the tasks; all ranks call it and get the same. max_per_task: -1 for all examples. swap:
    each with another one's context; those that do not fit the model are then left out.

    Returns task label -> answers, and the share of computed tokens that are padding. Raises UserError for the reasons
    of `build_questions`, or if the model computes numbers that are not finite.
    """
    limit = replace(model.limit, leave_out=True) if swap else model.limit
    change = swap_examples if swap else None
    by_task = {task.label: build_questions(task, tokenizer, limit, max_per_task, change) for task in tasks}
    questions = [question for of_task in by_task.values() for question in of_task if question]
    runner = _BatchRunner(model)
    batches = build_batches(questions, model.tokens_per_pass)
    assigned = assign_batches(batches, model.mesh.data.size, runner.multiple, runner.parts)
    total_rows, rows_done = sum(len(batch.rows) for of_rank in assigned for batch in of_rank), 0
    results = torch.zeros(sum(len(question.rows) for question in questions), dtype=torch.float64)
    for number, batch in enumerate(assigned[model.mesh.data.rank]):
        for index, value in runner.run(batch):
            results[index] = value
        # the ranks work in parallel, so the others are about as far as this rank
        rows_done += sum(len(of_rank[number].rows) for of_rank in assigned if number < len(of_rank))
        on_progress(round(len(questions) * rows_done / total_rows), len(questions))
    on_progress(len(questions), len(questions))
    results = results.to(model.mesh.device)
    all_reduce(results, model.mesh.world, name="CORE's answers")  # one rank has each answer, the others have zeros
    values = iter(results.tolist())
    answers = {label: _judge(label, of_task, values) for label, of_task in by_task.items()}
    computed = sum(batch.computed_tokens(runner.multiple, runner.parts) for of_rank in assigned for batch in of_rank)
    real = sum(batch.real_tokens for of_rank in assigned for batch in of_rank if batch is not IDLE)
    return answers, 1 - real / computed if computed else 0.0


def _judge(label: str, questions: Sequence[Question | None], values: Iterator[float]) -> Answers:
    """Returns the answers of a task, None being a question that is left out. values: see `_is_right`, of all rows."""
    right = []
    for question in filter(None, questions):
        some = [next(values) for _ in question.rows]
        if any(
            math.isnan(value) and row.start < len(row.tokens) for row, value in zip(question.rows, some, strict=True)
        ):
            raise UserError(
                f"the model computes NaN on CORE's task {label}, so its weights are damaged or too large: "
                "evaluate another checkpoint"
            )
        right.append(_is_right(question, some))
    left_out = tuple(number for number, question in enumerate(questions) if question is None)
    return Answers(tuple(right), left_out, sum(question.ambiguous for question in questions if question))


def _is_right(question: Question, values: list[float]) -> bool:
    """Returns whether the answer is correct.

    values: per row, the mean nats of its answer, or the number of answer tokens that the model does not predict.
    """
    if question.gold is None:
        return values[0] == 0
    # equal rows have equal values, even if they were computed in batches that round differently
    values = [values[question.rows.index(row)] for row in question.rows]
    # Python's min, as in the reference: the first of equal values; nan only if it comes first
    return values.index(min(values)) == question.gold


class _BatchRunner:
    """Runs batches through the engine. All tensor and pipeline ranks of a data rank run the same batches.

    parts: micro-batches per pass, one per stage. multiple: the tokens per row must be a multiple of it.
    """

    def __init__(self, model: Evaluator):
        self.model, self.parts = model, model.mesh.pipeline.size
        self.multiple = model.mesh.tensor.size if model.sequence else 1
        part = vocabulary_part(model.dims.padded_vocab, model.mesh.tensor)
        self.measures = {exact: _AnswerMeasure(model.dims, part, exact) for exact in (False, True)}

    def run(self, batch: Batch) -> list[tuple[int, float]]:
        """Returns (index, value) of each row's result on tensor rank 0 of the last stage, and [] on other ranks."""
        contexts_by_part = _split(range(len(batch.contexts)), self.parts) if batch.contexts else []
        rows_by_part = [
            [row for row, context in zip(batch.rows, batch.context_of, strict=True) if context in contexts]
            for contexts in contexts_by_part
        ] or _split(batch.rows, self.parts)
        most, (_, width) = max(map(len, rows_by_part)), batch.shapes(self.multiple)[-1]
        chunks: list[Chunk | None] = [None] * self.parts
        if batch.contexts:
            caches = self._prefill(batch, contexts_by_part)
            chunks = [
                cache.branch(_fill([c - contexts.start for c in batch.context_of if c in contexts], most, 0))
                for cache, contexts in zip(caches, contexts_by_part, strict=True)
            ]
        micro_batches = [_micro_batch(rows, most, width) for rows in rows_by_part]
        measured = evaluate_chunks(self.model.engine, micro_batches, chunks, self.measures[batch.exact])
        if not measured or self.model.mesh.tensor.rank:
            return []
        return [
            (row.index, value)
            for rows, values in zip(rows_by_part, measured, strict=True)
            for row, value in zip(rows, values.tolist(), strict=False)
            if row.index >= 0
        ]

    def _prefill(self, batch: Batch, contexts_by_part: Sequence[range]) -> list[Cache]:
        """Computes the batch's contexts. Returns their caches, one per part."""
        count, width = max(map(len, contexts_by_part)), batch.shapes(self.multiple)[0][1]
        caches, chunks, micro_batches = [], [], []
        for part in contexts_by_part:
            contexts = _fill([batch.contexts[context] for context in part], count, ())
            cache = Cache(self.model.dims, count, max(map(len, batch.contexts)))
            caches.append(cache)
            chunks.append(cache.extend([len(context) for context in contexts]))
            ids = torch.tensor([[*context, *[0] * (width - len(context))] for context in contexts])
            micro_batches.append((ids, torch.zeros(1, dtype=torch.int64)))
        evaluate_chunks(self.model.engine, micro_batches, chunks, _NoMeasure())
        return caches


class _NoMeasure(nn.Module):
    """The measure of a pass that only fills a cache."""

    def forward(self, output: tuple[torch.Tensor, torch.Tensor], targets: torch.Tensor) -> torch.Tensor:
        return torch.zeros((), device=targets.device)


class _AnswerMeasure(nn.Module):
    """Maps the head's output and targets [rows, tokens] to one float64 value per row.

    The value is the mean nats of the row's targets or, if exact, the number of targets that are not the most likely
    token. Targets of -1 are ignored, and logits are computed only for the others.
    """

    def __init__(self, dims: Dimensions, part: VocabularyPart, exact: bool):
        super().__init__()
        self.dims, self.part, self.exact = dims, part, exact

    def forward(self, output: tuple[torch.Tensor, torch.Tensor], targets: torch.Tensor) -> torch.Tensor:
        hidden, weight = output
        row, at = (targets >= 0).nonzero(as_tuple=True)
        states, wanted = hidden[row, at], targets[row, at]
        if not len(states):  # a micro-batch that is all padding
            values = torch.zeros(0, dtype=torch.float64, device=targets.device)
        elif self.exact:
            size = max(1, CHUNK_BYTES // (4 * self.dims.vocab_size))
            values = torch.cat(
                [
                    _count_wrong(logits((some, weight), self.dims, self.part), targets)
                    for some, targets in zip(states.split(size), wanted.split(size), strict=True)
                ]
            )
        else:
            values = token_nats(states, weight, wanted, self.dims.vocab_size, LOGIT_CAP, self.part).double()
        total = torch.zeros(len(targets), dtype=torch.float64, device=targets.device).index_add_(0, row, values)
        # nan for an answer without tokens: one choice is the beginning of another
        return total if self.exact else total / (targets >= 0).sum(dim=1)


def _count_wrong(scores: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Returns per line of scores [tokens, vocab_size] 1 if the most likely token is not the target, nan if any is."""
    top, predicted = scores.max(dim=-1)
    return torch.where(top.isnan(), top, predicted != targets).double()


def _micro_batch(rows: Sequence[BatchRow], count: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns ids and targets [count, width] of the rows; the rest is padding."""
    ids = torch.zeros(count, width, dtype=torch.int64)
    targets = torch.full((count, width), -1)
    for slot, row in enumerate(rows):
        tokens = torch.tensor(row.tokens)
        ids[slot, : len(tokens)] = tokens
        targets[slot, row.start - 1 : len(tokens) - 1] = tokens[row.start :]
    return ids, targets


def _split(items, parts: int) -> list:
    """Splits a non-empty sequence into consecutive slices of nearly equal length; some are empty if it is short."""
    size = -(-len(items) // parts)
    return [items[begin : begin + size] for begin in range(0, size * parts, size)]


def _fill(values: list, count: int, filling) -> list:
    return values + [filling] * (count - len(values))
