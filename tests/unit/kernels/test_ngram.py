"""The hashes of n-grams against plain Python with big ints, golden values, distribution and document starts."""

import pytest
import torch

from megachat.kernels.ngram import multipliers, ngram_rows, signs
from megachat.planning.dimensions import LARGEST_ORDER

BITS = (1 << 64) - 1
BOS = 96


def random_ids(batch=3, tokens=200, vocabulary=97, seed=0) -> torch.Tensor:
    return torch.randint(0, vocabulary, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def murmur(value: int) -> int:
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        value = ((value ^ (value >> 33)) * factor) & BITS
    return value ^ (value >> 33)


def hashed(gram: list[int], factors: list[int]) -> int:
    """gram: in reading order."""
    value = 0
    for token, factor in zip(reversed(gram), factors, strict=True):
        value ^= (token + 1) * (factor % (1 << 64)) & BITS
    return murmur(value)


def plain_rows(row: list[int], order: int, rows: int, seed: int) -> list[int]:
    result, since_start = [], 0
    for at, token in enumerate(row):
        since_start = 1 if token == BOS else since_start + 1
        gram = row[at - order + 1 : at + 1]
        fits = since_start >= order and at >= order - 1
        result.append((hashed(gram, multipliers(seed, order, 0)) >> 32) * rows >> 32 if fits else -1)
    return result


@pytest.mark.parametrize("order", [2, 3, 5, LARGEST_ORDER])
@pytest.mark.parametrize("rows", [1, 1000, 2**31])
def test_rows_are_the_plain_hashes(order, rows):
    ids = random_ids(vocabulary=2**24 if rows == 1000 else 97)
    ids[:, 0] = BOS
    ids[1, [5, 6, 9, 100]] = BOS
    result = ngram_rows(ids, order, rows, 42, BOS)
    assert result.dtype == torch.int64
    assert result.tolist() == [plain_rows(row, order, rows, 42) for row in ids.tolist()]


@pytest.mark.parametrize("width", [1, 48, 64, 200])
def test_signs_are_the_bits_of_the_second_hash(width):
    ids, golden = random_ids(1, 30), 0x9E3779B97F4A7C15
    result = signs(ids, 3, 7, width)
    assert result.dtype == torch.int8 and result.shape == (1, 30, width)
    for at in range(2, 30):
        second = hashed(ids[0, at - 2 : at + 1].tolist(), multipliers(7, 3, 1))
        words = [murmur((second + (index + 1) * golden) & BITS) for index in range(-(-width // 64))]
        expected = [1 - 2 * (words[channel // 64] >> channel % 64 & 1) for channel in range(width)]
        assert result[0, at].tolist() == expected


def test_values_of_the_first_version():
    """Checkpoints depend on these: a change of the hash would read other rows."""
    ids = torch.tensor([[BOS, 1, 2, 3, 50000, 2, 3]])
    assert multipliers(42, 2, 0) == GOLDEN_MULTIPLIERS
    assert ngram_rows(ids, 2, 10**6, 42, BOS).tolist() == [GOLDEN_ROWS[0]]
    assert ngram_rows(ids, 3, 10**6, 42, BOS).tolist() == [GOLDEN_ROWS[1]]
    assert signs(ids, 2, 42, 8)[0, 3].tolist() == GOLDEN_SIGNS


GOLDEN_MULTIPLIERS = [5286772449821159249, -9180522649936911467]
GOLDEN_ROWS = [
    [-1, 313169, 82934, 88483, 804304, 75297, 88483],
    [-1, -1, 866179, 798627, 461135, 829759, 706388],
]
GOLDEN_SIGNS = [1, -1, -1, -1, -1, -1, 1, 1]


def test_rows_and_signs_are_uniform_and_independent():
    firsts, seconds = torch.meshgrid(torch.arange(300), torch.arange(300), indexing="ij")
    ids = torch.stack((firsts, seconds), dim=-1).view(-1, 2)
    buckets = 1000
    rows = {key: ngram_rows(ids, 2, buckets, *key, -2)[:, 1] for key in [(1,), (2,)]}
    expected = len(ids) / buckets
    for row in rows.values():
        chi_square = ((row.bincount(minlength=buckets) - expected) ** 2 / expected).sum().item()
        assert abs(chi_square - (buckets - 1)) < 5 * (2 * (buckets - 1)) ** 0.5
    # one n-gram in two tables: all 30 x 30 pairs of coarse rows are as frequent
    trigrams = torch.cat((torch.zeros_like(ids[:, :1]), ids), dim=1)
    thirds = ngram_rows(trigrams, 3, buckets, 1, -2)[:, 2]
    for other in (rows[2,], thirds):
        pairs = (rows[1,] * 30 // buckets * 30 + other * 30 // buckets).bincount(minlength=900).double()
        chi_square = ((pairs - len(ids) / 900) ** 2 / (len(ids) / 900)).sum().item()
        assert abs(chi_square - 899) < 5 * (2 * 899) ** 0.5 + 20  # 30 does not divide the rows evenly
    patterns = signs(ids, 2, 1, 64)[:, 1].double()
    assert patterns.mean(0).abs().max() < 5 / len(ids) ** 0.5
    assert (patterns.T @ patterns / len(ids) - torch.eye(64)).abs().max() < 5 / len(ids) ** 0.5
    in_one_row = patterns[rows[1,] == 0]
    assert len(in_one_row) > 50 and len(in_one_row.unique(dim=0)) == len(in_one_row)


@pytest.mark.parametrize("order", [2, 3, LARGEST_ORDER])
def test_only_the_last_ids_of_the_document_matter(order):
    ids = random_ids(vocabulary=90)
    ids[:, 0], ids[:, 70] = BOS, BOS
    rows, pattern = ngram_rows(ids, order, 5000, 3, BOS), signs(ids, order, 3, 32)
    assert (rows[:, : order - 1] == -1).all() and (rows[:, 70 : 69 + order] == -1).all()
    assert (rows[:, order - 1 : 70] >= 0).all() and (rows[:, 69 + order :] >= 0).all()
    changed = ids.clone()
    changed[:, 1 : 100 - order + 1] += 1  # all that position 100 does not see
    assert torch.equal(ngram_rows(changed, order, 5000, 3, BOS)[:, 100:], rows[:, 100:])
    assert torch.equal(signs(changed, order, 3, 32)[:, 100:], pattern[:, 100:])
    changed[:, 100 - order + 1] += 1
    assert not torch.equal(ngram_rows(changed, order, 5000, 3, BOS)[:, 100], rows[:, 100])
    for first, last in ((60, 80), (69, 71), (70, 72), (1, 2), (0, 1)):  # continues a text in pieces
        before = torch.cat((torch.full((3, 9), -1), ids[:, :first]), dim=1)[:, -7:]
        assert torch.equal(ngram_rows(ids[:, first:last], order, 5000, 3, BOS, before), rows[:, first:last])
        if first >= order:
            assert torch.equal(signs(ids[:, first:last], order, 3, 32, before), pattern[:, first:last])


def test_compiled_hashes_are_equal():
    ids = random_ids(1, 40)

    def both(ids):
        return ngram_rows(ids, 2, 100_003, 42, BOS), signs(ids, 2, 42, 72)

    for compiled, eager in zip(torch.compile(both, dynamic=False)(ids), both(ids), strict=True):
        assert torch.equal(compiled, eager)
