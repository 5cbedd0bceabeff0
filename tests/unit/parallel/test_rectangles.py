"""Ranges of a matrix as rectangles: every range of small shapes, and that views alias."""

import itertools

import torch

from megachat.parallel.rectangles import flat_rectangles


def test_every_range_of_small_matrices_is_covered_once_and_in_order():
    for rows, columns in itertools.product((1, 2, 3, 5), (1, 2, 4)):
        whole = torch.arange(rows * columns).view(rows, columns)
        for start, stop in itertools.combinations_with_replacement(range(rows * columns + 1), 2):
            flat = whole.reshape(-1)[start:stop].clone()
            result = flat_rectangles((rows, columns), flat, start)
            assert len(result) <= 3 and bool(result) == (stop > start)
            for (row, column), (height, width), view in result:
                assert view.shape == (height, width)
                assert torch.equal(view, whole[row : row + height, column : column + width])
            assert [value for _, _, view in result for value in view.flatten().tolist()] == list(range(start, stop))


def test_views_alias_the_flat_tensor():
    flat = torch.zeros(13)
    for _, _, view in flat_rectangles((4, 5), flat, 3):
        view.fill_(1)
    assert flat.sum() == 13


def test_a_base_shifts_the_offsets():
    assert [result[:2] for result in flat_rectangles((4, 5), torch.zeros(12), 3, (10, 100))] == [
        ((10, 103), (1, 2)),
        ((11, 100), (2, 5)),
    ]


def test_one_dimension():
    ((offsets, sizes, _),) = flat_rectangles((9,), torch.zeros(4), 2, (5,))
    assert (offsets, sizes) == ((7,), (4,))
    assert flat_rectangles((9,), torch.zeros(0), 2) == []
