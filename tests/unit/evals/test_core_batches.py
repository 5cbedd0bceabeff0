"""Batches of questions: every row once, after its context, and equal numbers of passes on all ranks."""

import random

import pytest

from megachat.evals.core_batches import IDLE, LEAST_SHARED, assign_batches, build_batches
from megachat.evals.core_prompts import PromptRow, Question

LONGEST = 200


def some_questions(seed: int, count: int = 60) -> list[Question]:
    rng, questions = random.Random(seed), []
    for _ in range(count):
        prefix, choices = rng.randrange(1, 150), rng.choice([1, 2, 4])
        context = [rng.randrange(50) for _ in range(prefix)]
        rows = []
        for number in range(choices):
            tokens = [*context, 100 + number, *(rng.randrange(50) for _ in range(rng.randrange(70)))]
            crop = max(0, len(tokens) - LONGEST)
            rows.append(PromptRow(tuple(tokens[crop:]), prefix - crop, crop))
        questions.append(Question(tuple(rows), None if choices == 1 else 0))
    return questions


@pytest.mark.parametrize("seed", range(4))
def test_every_row_is_computed_once_after_its_context(seed):
    questions = some_questions(seed)
    rows = [row for question in questions for row in question.rows]
    exact = [question.gold is None for question in questions for _ in question.rows]
    seen = []
    for batch in build_batches(questions, 1000):
        for number, part in enumerate(batch.rows):
            before = batch.contexts[batch.context_of[number]] if batch.contexts else ()
            assert (
                before + part.tokens == rows[part.index].tokens and len(before) + part.start == rows[part.index].start
            )
            assert part.start >= 1, "the token that predicts the answer's first one must be in this pass"
            assert batch.exact == exact[part.index] and (not batch.contexts or len(before) >= LEAST_SHARED - 1)
            seen.append(part.index)
        one_question = len(batch.contexts) == 1 or len(batch.rows) == 1
        assert one_question or all(count * width <= 1000 for count, width in batch.shapes(1))
    assert sorted(seen) == list(range(len(rows)))
    computed = sum(batch.real_tokens for batch in build_batches(questions, 1000))
    assert computed < 0.8 * sum(len(row.tokens) for row in rows), "choices must share their context"


@pytest.mark.parametrize(("ranks", "parts"), [(1, 1), (2, 1), (3, 2), (5, 3)])
def test_ranks_have_equal_numbers_of_passes_and_similar_work(ranks, parts):
    batches = build_batches(some_questions(7, 200), 1000)
    assigned = assign_batches(batches, ranks, 2, parts)
    assert len({sum(batch.passes for batch in of_rank) for of_rank in assigned}) == 1
    kept = [batch for of_rank in assigned for batch in of_rank if batch is not IDLE]
    assert sorted(map(id, kept)) == sorted(map(id, batches))
    work = [sum(batch.computed_tokens(2, parts) for batch in of_rank) for of_rank in assigned]
    assert max(work) - min(work) <= max(batch.computed_tokens(2, parts) for batch in batches)


def test_nothing_to_share_and_nothing_to_do():
    assert build_batches([], 100) == [] and assign_batches([IDLE], 3, 1, 1)[1:] == [[IDLE], [IDLE]]
    (one,) = build_batches([Question((PromptRow((1, 2, 3), 2), PromptRow((1, 2, 4), 2)), 0)], 100)
    assert not one.contexts and one.shapes(4) == [(2, 4)] and one.real_tokens == 6
