"""Hashes of n-grams: the table row and the sign pattern that belong to the last `order` ids at each position.

Pure functions of ids in int64 arithmetic that wraps around, so they are equal on every device and under torch.compile.
An n-gram is hashed by a multiply-xor of its ids: ((id + 1) * m_0) ^ ((id before + 1) * m_1) ^ ... The multipliers are
odd 64-bit numbers from a seed; MurmurHash3's finalizer follows. Sources: hashed values Engram (arXiv 2601.07372) and
nanochat's pull request 854; signs: Hashing Trick (arXiv 1504.04788), for bigrams modded-nanogpt's pull request 299.
"""

import torch

_BITS = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15  # increment of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014)
_ROWS, _SIGNS = 0, 1  # the two hashes of an n-gram


def multipliers(seed: int, order: int, purpose: int) -> list[int]:
    """Returns `order` odd 64-bit numbers as signed ints: outputs of SplitMix64 that starts from a hash of seed, order
    and purpose (0: rows, 1: signs). The first belongs to the latest id.
    """
    start = _split_mix(_split_mix(seed) + 2 * order + purpose)
    return [_signed(_split_mix(start + index * _GOLDEN) | 1) for index in range(order)]


def ngram_rows(
    ids: torch.Tensor, order: int, rows: int, seed: int, bos: int, before: torch.Tensor | None = None
) -> torch.Tensor:
    """Returns the table row, 0 to rows - 1, of the n-gram that ends at each position; int64 [batch, tokens].

    It is -1 where fewer than `order` ids were seen since the document's start. `bos` is the first id of its document,
    and an n-gram never crosses it. ids: int64 [batch, tokens]. before: int64 [batch, n], n >= order - 1, the ids that
    precede them, -1 where there is none; by default there are none.
    """
    windows = _windows(ids, order, before)
    hashed = _hash(windows, multipliers(seed, order, _ROWS))
    row = (_shifted(hashed, 32) * rows) >> 32
    inside = windows[-1] >= 0  # the earliest id of the n-gram; it may be the document's first
    for window in windows[:-1]:
        inside = inside & (window != bos)
    return torch.where(inside, row, -1)


def signs(ids: torch.Tensor, order: int, seed: int, width: int, before: torch.Tensor | None = None) -> torch.Tensor:
    """Returns a pattern of +1 and -1 for the n-gram that ends at each position, int8 [batch, tokens, width].

    It comes from a second hash, so n-grams that share a row have different patterns. Arguments as in `ngram_rows`.
    """
    hashed = _hash(_windows(ids, order, before), multipliers(seed, order, _SIGNS))
    counter = torch.arange(1, -(-width // 64) + 1, device=ids.device) * _signed(_GOLDEN)
    words = _finalize(hashed.unsqueeze(-1) + counter)
    # in two steps of 8, the larger one on bytes: a shift of whole words would need 8 bytes per sign
    eighths = torch.arange(8, device=ids.device)
    octets = ((words.unsqueeze(-1) >> 8 * eighths) & 255).to(torch.uint8)
    bits = (octets.unsqueeze(-1) >> eighths.to(torch.uint8)) & 1
    return (1 - 2 * bits.to(torch.int8)).flatten(2)[..., :width]


def _windows(ids: torch.Tensor, order: int, before: torch.Tensor | None) -> list[torch.Tensor]:
    """Returns the ids [batch, tokens] at distance 0, 1, ... order - 1 to the left of each position; -1: none."""
    if before is None:
        before = ids.new_full((ids.size(0), order - 1), -1)
    extended = torch.cat((before[:, before.size(1) - order + 1 :], ids), dim=1)
    return [extended[:, order - 1 - distance : extended.size(1) - distance] for distance in range(order)]


def _hash(windows: list[torch.Tensor], factors: list[int]) -> torch.Tensor:
    hashed = (windows[0] + 1) * factors[0]
    for window, factor in zip(windows[1:], factors[1:], strict=True):
        hashed = hashed ^ ((window + 1) * factor)
    return _finalize(hashed)


def _finalize(value: torch.Tensor) -> torch.Tensor:
    """MurmurHash3's 64-bit finalizer: every bit of the input changes each bit of the result half of the time."""
    value = (value ^ _shifted(value, 33)) * _signed(0xFF51AFD7ED558CCD)
    value = (value ^ _shifted(value, 33)) * _signed(0xC4CEB9FE1A85EC53)
    return value ^ _shifted(value, 33)


def _shifted(value: torch.Tensor, by: int) -> torch.Tensor:
    """Shifts right with zeros, as an unsigned number; torch's shift of int64 repeats the sign."""
    return (value >> by) & ((1 << (64 - by)) - 1)


def _signed(value: int) -> int:
    """Returns the int64 with the same 64 bits."""
    return value - (1 << 64) if value >> 63 else value


def _split_mix(value: int) -> int:
    """Returns SplitMix64's output, unsigned, for the state before it is incremented."""
    value = (value + _GOLDEN) & _BITS
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _BITS
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _BITS
    return value ^ (value >> 31)
