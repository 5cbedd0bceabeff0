"""Batches CORE's questions: rows of similar length share a batch, and context that choices share is computed once.

The batches are distributed evenly over the ranks of the data axis. Every rank computes the same plan for all ranks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from megachat.evals.core_prompts import PromptRow, Question, common_prefix
from megachat.planning.dimensions import up_to_multiple

LEAST_SHARED = 16  # a shared context with fewer tokens costs more as a separate pass than it saves
SIMILAR = 0.8  # least length of a batch's shortest row, relative to its longest

T = TypeVar("T")
Shapes = tuple[tuple[int, int], ...]  # (rows, tokens per row) of each pass


@dataclass(frozen=True)
class BatchRow:
    """The tokens of a row that a pass computes. start: where the answer starts. index: of the result, -1 for none."""

    tokens: tuple[int, ...]
    start: int
    index: int


@dataclass(frozen=True)
class Batch:
    """The rows of one pass, or with contexts of two: the first caches the contexts.

    context_of[i]: the context that row i continues. exact: measures whether the answers are predicted, else their nats.
    """

    rows: tuple[BatchRow, ...]
    exact: bool
    contexts: tuple[tuple[int, ...], ...] = ()
    context_of: tuple[int, ...] = ()

    @property
    def passes(self) -> int:
        return 2 if self.contexts else 1

    def shapes(self, multiple: int) -> list[tuple[int, int]]:
        """Returns (rows, tokens per row) of each pass."""
        texts = [self.contexts] * bool(self.contexts) + [tuple(row.tokens for row in self.rows)]
        return [(len(rows), up_to_multiple(max(map(len, rows)), multiple)) for rows in texts]

    def computed_tokens(self, multiple: int, parts: int) -> int:
        """Returns the number of tokens computed, including padding."""
        return sum(width * up_to_multiple(count, parts) for count, width in self.shapes(multiple))

    @property
    def real_tokens(self) -> int:
        return sum(map(len, self.contexts)) + sum(len(row.tokens) for row in self.rows)


IDLE = Batch((BatchRow((0, 0), 1, -1),), False)  # computed by a rank that has no more work while others do


@dataclass(frozen=True)
class _SharedPrefix:
    """Rows of one question with the same first `length` tokens before their answers. indices: of their results."""

    rows: tuple[PromptRow, ...]
    indices: tuple[int, ...]
    length: int


def build_batches(questions: Sequence[Question], tokens_per_pass: int) -> list[Batch]:
    """Batches the questions by about `tokens_per_pass` tokens. Results are numbered by row, over all questions."""
    shared: list[_SharedPrefix] = []
    separate: dict[bool, list[BatchRow]] = {False: [], True: []}  # by whether the answer must be exact
    first = 0
    for question in questions:
        for prefix in _shared_prefixes(question, first):
            if len(prefix.rows) > 1 and prefix.length >= LEAST_SHARED:
                shared.append(prefix)
            else:
                separate[question.gold is None] += [
                    BatchRow(row.tokens, row.start, index)
                    for row, index in zip(prefix.rows, prefix.indices, strict=True)
                ]
        first += len(question.rows)
    batches = [_shared_batch(group) for group in _group_by_length(shared, _prefix_passes, tokens_per_pass)]
    for exact, rows in separate.items():
        groups = _group_by_length(rows, lambda row: ((1, len(row.tokens)),), tokens_per_pass)
        batches += [Batch(tuple(group), exact) for group in groups]
    return batches


def _shared_prefixes(question: Question, first: int) -> list[_SharedPrefix]:
    """Groups a question's rows by their number of cropped tokens: after different crops, the tokens do not align."""
    by_crop: dict[int, list[int]] = {}
    for number, row in enumerate(question.rows):
        by_crop.setdefault(row.cropped, []).append(number)
    prefixes = []
    for numbers in by_crop.values():
        rows = tuple(question.rows[number] for number in numbers)
        length = min(common_prefix([row.tokens for row in rows]), min(row.start for row in rows))
        prefixes.append(_SharedPrefix(rows, tuple(first + number for number in numbers), length))
    return prefixes


def _shared_batch(prefixes: Sequence[_SharedPrefix]) -> Batch:
    contexts, rows, context_of = [], [], []
    for number, prefix in enumerate(prefixes):
        cut = prefix.length - 1  # the rows repeat the context's last token, which predicts their first one
        contexts.append(prefix.rows[0].tokens[:cut])
        for row, index in zip(prefix.rows, prefix.indices, strict=True):
            rows.append(BatchRow(row.tokens[cut:], row.start - cut, index))
            context_of.append(number)
    return Batch(tuple(rows), False, tuple(contexts), tuple(context_of))


def _prefix_passes(prefix: _SharedPrefix) -> Shapes:
    """Returns the shapes that a shared prefix adds to the pass over contexts and to the one over rows."""
    return (1, prefix.length), (len(prefix.rows), max(len(row.tokens) for row in prefix.rows) - prefix.length + 1)


def _group_by_length(entries: list[T], passes: Callable[[T], Shapes], tokens_per_pass: int) -> list[list[T]]:
    """Sorts entries by decreasing length in their first pass, and starts a new group where one of its passes is full or
    the lengths differ too much. passes: the shape that an entry adds to each pass.
    """
    groups: list[list[T]] = []
    total: Shapes = ()
    for entry in sorted(entries, key=lambda entry: passes(entry)[0][1], reverse=True):
        added = passes(entry)
        grown = added
        if groups:
            pairs = zip(total, added, strict=True)
            grown = tuple((rows + more, max(width, other)) for (rows, width), (more, other) in pairs)
        full = any(rows * width > tokens_per_pass for rows, width in grown)
        if not groups or full or added[0][1] < SIMILAR * total[0][1] - LEAST_SHARED:
            groups.append([])
            grown = added
        groups[-1].append(entry)
        total = grown
    return groups


def assign_batches(batches: Sequence[Batch], ranks: int, multiple: int, parts: int) -> list[list[Batch]]:
    """Returns each data rank's batches: the most expensive first, each to the rank with the least work.

    Ranks with fewer passes get idle batches at the end, because all ranks wait for each other in every pass.
    """
    assigned: list[list[Batch]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for batch in sorted(batches, key=lambda batch: -batch.computed_tokens(multiple, parts)):
        rank = loads.index(min(loads))
        assigned[rank].append(batch)
        loads[rank] += batch.computed_tokens(multiple, parts)
    passes = [sum(batch.passes for batch in batches) for batches in assigned]
    return [batches + [IDLE] * (max(passes) - count) for batches, count in zip(assigned, passes, strict=True)]
