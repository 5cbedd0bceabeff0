"""How DeepSpeed's ZeRO-1 cuts a group of parameters, as a pure function."""

_ALIGNMENT = 2  # DeepSpeed aligns a rank's share to this many elements (nccl_start_alignment_factor)


def zero1_share(elements: int, ranks: int) -> int:
    """Elements of a group of `elements` whose state one of `ranks` data ranks holds, padding included; the same on every rank."""
    unit = _ALIGNMENT * ranks
    return -(-elements // unit) * unit // ranks


def zero1_owners(sizes: list[int], ranks: int) -> list[tuple[int, ...]]:
    """For parameters of `sizes` elements laid end to end in one group, the data ranks that hold a part of each one's state."""
    share = zero1_share(sum(sizes), ranks)
    owners, start = [], 0
    for size in sizes:
        owners.append(tuple(range(start // share, (start + size - 1) // share + 1)))
        start += size
    return owners
