"""CORE's questions as passes of a model: rows of like length together, what the choices of a question have in common computed once, and the work
dealt evenly to the data axis's ranks. Every rank makes the same plan of all ranks' passes."""

from collections.abc import Sequence
from dataclasses import dataclass

from megachat.evals.core_prompts import Question, Row, common_prefix
from megachat.planning.dimensions import up_to_multiple

LEAST_SHARED = 16  # tokens in common below which a pass of their own costs more than it saves
ALIKE = 0.8  # a batch's shortest row in tokens, of its longest


@dataclass(frozen=True)
class Part:
    """The tokens of a question's text that one row of a pass computes. start: of the answer in them; found: index of what is found."""

    tokens: tuple[int, ...]
    start: int
    found: int


@dataclass(frozen=True)
class Batch:
    """Rows of one pass, or, with contexts, of two: the contexts are computed and cached, and row i goes on from context of[i].

    exact: the answers must be what the model says; else their nats are wanted.
    """

    rows: tuple[Part, ...]
    exact: bool
    contexts: tuple[tuple[int, ...], ...] = ()
    of: tuple[int, ...] = ()

    @property
    def passes(self) -> int:
        return 2 if self.contexts else 1

    def tokens(self, multiple: int, parts: int) -> int:
        """Computed, padding included."""
        return sum(width * up_to_multiple(count, parts) for count, width in self.shapes(multiple))

    def shapes(self, multiple: int) -> list[tuple[int, int]]:
        """(rows, tokens a row) of each pass."""
        found = [(len(self.contexts), self.contexts)] if self.contexts else []
        found.append((len(self.rows), [part.tokens for part in self.rows]))
        return [(count, up_to_multiple(max(map(len, texts)), multiple)) for count, texts in found]

    @property
    def real_tokens(self) -> int:
        return sum(map(len, self.contexts)) + sum(len(part.tokens) for part in self.rows)


IDLE = Batch((Part((0, 0), 1, -1),), False)  # what a rank computes that has no more while others do


@dataclass(frozen=True)
class _Alike:
    """Rows of one question that begin with the same `prefix` tokens, in front of their answers. found: index of what is found of each."""

    rows: tuple[Row, ...]
    found: tuple[int, ...]
    prefix: int


def build_batches(asked: Sequence[Question], tokens_per_pass: int) -> list[Batch]:
    """The questions in batches of about `tokens_per_pass` tokens each; what is found of question i's row j is at index sum of rows before + j."""
    shared: list[_Alike] = []
    alone: dict[bool, list[Part]] = {False: [], True: []}  # by whether the answer must be exact
    first = 0
    for question in asked:
        for alike in _alike(question, first):
            if len(alike.rows) > 1 and alike.prefix >= LEAST_SHARED:
                shared.append(alike)
            else:
                alone[question.gold is None] += [
                    Part(row.tokens, row.start, at) for row, at in zip(alike.rows, alike.found, strict=True)
                ]
        first += len(question.rows)
    found = [_shared_batch(group) for group in _groups(shared, lambda alike: alike.prefix, tokens_per_pass)]
    for exact, parts in alone.items():
        found += [
            Batch(tuple(group), exact) for group in _groups(parts, lambda part: len(part.tokens), tokens_per_pass)
        ]
    return found


def _alike(question: Question, first: int) -> list[_Alike]:
    """A question's rows, those together of which as many tokens were taken away: others have other tokens at the same places."""
    by_crop: dict[int, list[int]] = {}
    for number, row in enumerate(question.rows):
        by_crop.setdefault(row.cropped, []).append(number)
    found = []
    for numbers in by_crop.values():
        rows = tuple(question.rows[number] for number in numbers)
        prefix = min(common_prefix([row.tokens for row in rows]), min(row.start for row in rows))
        found.append(_Alike(rows, tuple(first + number for number in numbers), prefix))
    return found


def _shared_batch(group: Sequence[_Alike]) -> Batch:
    contexts, rows, of = [], [], []
    for alike in group:
        cut = (
            alike.prefix - 1
        )  # each row begins with the context's last token: what follows it is the first that is asked
        contexts.append(alike.rows[0].tokens[:cut])
        for row, found in zip(alike.rows, alike.found, strict=True):
            rows.append(Part(row.tokens[cut:], row.start - cut, found))
            of.append(len(contexts) - 1)
    return Batch(tuple(rows), False, tuple(contexts), tuple(of))


def _groups(entries: list, length, tokens_per_pass: int) -> list[list]:
    """Entries in the order of their lengths, cut where a group is full or its lengths are too unlike."""
    groups: list[list] = []
    for entry in sorted(entries, key=length, reverse=True):
        longest = length(groups[-1][0]) if groups else 0
        if (
            not groups
            or (len(groups[-1]) + 1) * longest > tokens_per_pass
            or length(entry) < ALIKE * longest - LEAST_SHARED
        ):
            groups.append([])
        groups[-1].append(entry)
    return groups


def assign_batches(found: Sequence[Batch], ranks: int, multiple: int, parts: int) -> list[list[Batch]]:
    """The batches of each rank of the data axis, the costliest first to whoever has least, and idle ones at the end of those that would have
    fewer passes than others: every pass of the engine has all ranks wait for each other."""
    lists: list[list[Batch]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for batch in sorted(found, key=lambda batch: -batch.tokens(multiple, parts)):
        rank = loads.index(min(loads))
        lists[rank].append(batch)
        loads[rank] += batch.tokens(multiple, parts)
    most = max(sum(batch.passes for batch in own) for own in lists)
    return [own + [IDLE] * (most - sum(batch.passes for batch in own)) for own in lists]
