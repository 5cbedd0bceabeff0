from itertools import accumulate, pairwise

import pytest

from megachat.planning.dimensions import balanced_cuts


@pytest.mark.parametrize("ranks", [1, 2, 3, 7, 8])
def test_cuts_balance_rows_between_tokens(ranks):
    sizes = [1 + 511 // (token + 1) for token in range(4000)]  # half of the rows belong to the first hundredth
    first = list(accumulate(sizes, initial=0))
    cuts = balanced_cuts(first, ranks)
    assert len(cuts) == ranks + 1 and cuts[0] == 0 and cuts[-1] == first[-1]
    assert set(cuts) <= set(first)
    assert all(abs(end - start - first[-1] / ranks) <= max(sizes) for start, end in pairwise(cuts))


def test_ranks_may_have_no_rows():
    assert balanced_cuts([0, 5, 6], 4) == (0, 0, 5, 5, 6)
    assert balanced_cuts([0, 9], 2) in ((0, 0, 9), (0, 9, 9))
