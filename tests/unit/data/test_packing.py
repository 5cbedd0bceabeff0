import itertools
import random

import numpy as np
import pytest

from megachat.data.packing import REFILL_DOCUMENTS, PackingStream, buffer_sizes, saving_rank, streams_of_rank
from tests.limits import calls_of
from tools.bench.scan_packing import scan_rows


def documents_of(seed, lengths, count=3000):
    """Return documents of random lengths; a token identifies its document."""
    rng = random.Random(seed)
    return [list(range(1000 * index, 1000 * index + rng.choice(lengths))) for index in range(count)]


def stream_over(documents, row_tokens, buffer):
    numbered = iter(enumerate(np.array(document, dtype=np.uint32) for document in documents))
    return PackingStream(lambda: next(numbered), row_tokens, buffer, len(documents))


def packed(stream, row_tokens, rows):
    out = np.zeros((rows, row_tokens), dtype=np.int64)
    for row in out:
        stream.pack(row)
    return out.tolist()


@pytest.mark.parametrize(("least", "refill"), [(1, 1), (40, 1), (100, 16), (200, 128)])
@pytest.mark.parametrize("lengths", [range(1, 60), [5, 5, 5, 16, 33], [1, 2, 64, 65, 66, 300], [32]])
def test_same_rows_as_looking_through_the_whole_buffer(least, refill, lengths):
    documents = documents_of(least, list(lengths))
    expected = list(itertools.islice(scan_rows(iter(documents), 65, least, refill), 120))
    stream = stream_over(documents, 65, (least, refill))
    assert packed(stream, 65, 120) == [row for row, _, _ in expected]
    state = stream.state()
    assert (state.read_tokens, state.cropped_tokens, state.rows) == (*expected[-1][1:], 120)


def test_a_state_stays_as_it_was_while_packing_goes_on():
    documents = documents_of(1, [3, 9, 40, 200])
    stream = stream_over(documents, 33, (50, 8))
    packed(stream, 33, 20)
    state = stream.state()
    expected = packed(stream, 33, 30)
    numbered = iter(
        [(index, np.array(documents[index], dtype=np.uint32)) for index in range(state.next_document, len(documents))]
    )
    again = PackingStream(lambda: next(numbered), 33, (50, 8), len(documents), state)
    assert packed(again, 33, 30) == expected
    assert again.state().ledger == stream.state().ledger != state.ledger


def test_ledger_tells_other_orders_and_epochs_apart():
    ledgers = set()
    for order, epoch_documents in (([0, 1], 2), ([1, 0], 2), ([0, 1], 1), ([0, 3], 2)):
        numbered = iter([(number, np.ones(4, dtype=np.uint16)) for number in (*order, 5, 6)])
        stream = PackingStream(lambda numbered=numbered: next(numbered), 8, (1, 1), epoch_documents)
        packed(stream, 8, 1)
        ledgers.add(stream.state().ledger)
    assert len(ledgers) == 4


def test_no_more_of_a_long_document_is_kept_than_a_row_can_take():
    stream = stream_over([list(range(5000))] * 40, 17, (20, 4))
    packed(stream, 17, 3)
    assert all(
        document.length == 5000 and len(document.tokens) == 17 and document.tokens.base is None
        for document in stream.state().buffer.values()
    )


def test_streams_of_ranks_are_those_whose_rows_they_take():
    for ranks, streams in itertools.product(range(1, 9), range(1, 13)):
        rows = 2 * ranks
        for rank in range(ranks):
            taken = {row % streams for row in range(rows * streams * ranks) if row % rows % ranks == rank}
            assert streams_of_rank(rank, ranks, streams, rows) == sorted(taken)
        for stream in range(streams):
            assert saving_rank(stream, ranks, streams, rows) == min(
                rank for rank in range(ranks) if stream in streams_of_rank(rank, ranks, streams, rows)
            )


def test_rows_that_cannot_be_dealt_are_refused():
    with pytest.raises(ValueError, match="7 rows"):
        streams_of_rank(0, 2, 8, 7)
    with pytest.raises(ValueError, match="7 rows"):
        saving_rank(0, 2, 8, 7)


def test_a_buffer_never_holds_more_than_an_epoch():
    assert buffer_sizes(10_000, 1000) == (1000, REFILL_DOCUMENTS)
    for share in range(1, 2000):
        least, refill = buffer_sizes(share, 1000)
        assert least >= 1 and refill >= 1 and least - 1 + refill <= max(share, 1000 - 1 + REFILL_DOCUMENTS)
        assert share > 1127 or least - 1 + refill <= share


def test_packing_takes_far_less_work_than_looking_through_the_buffer():
    """In calls: times depend on what else the machine does."""
    documents = documents_of(2, list(range(1, 600)), count=4000)
    arrays = [np.array(document, dtype=np.uint32) for document in documents]

    def calls(pack):
        pack()  # the first row fills the buffer
        return calls_of(lambda: [pack() for _ in range(20)])

    plain = scan_rows(itertools.cycle(documents), 1025, 1000, REFILL_DOCUMENTS)
    numbered = enumerate(itertools.cycle(arrays))
    stream, row = (
        PackingStream(lambda: next(numbered), 1025, (1000, REFILL_DOCUMENTS), len(documents)),
        np.empty(1025, dtype=np.int64),
    )
    assert calls(lambda: next(plain)) > 10 * calls(lambda: stream.pack(row))
