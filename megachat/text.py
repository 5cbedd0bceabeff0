"""Text layout for people: tables, short lists of numbers."""

from collections.abc import Iterable, Sequence


def text_table(rows: Sequence[Sequence[str]], right: Iterable[int] = ()) -> list[str]:
    """Returns one line per row, with columns of equal width. right: the columns that are aligned to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    right = set(right)
    return [
        "  ".join(
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def markdown_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Returns a Markdown table, one line per row and one below the first, which has the titles."""
    titles, *others = rows
    return [f"| {' | '.join(row)} |" for row in (titles, ["---"] * len(titles), *others)]


def plural(count: int, noun: str) -> str:
    """Returns "1 rank", "2 ranks", "2 micro-batches"."""
    ending = "es" if noun.endswith("ch") else "s"
    return f"{count:,} {noun}{ending * (count != 1)}"


def shortened(names: Iterable[str], most: int = 5) -> str:
    """Returns the first names, separated by commas, and how many more there are."""
    names = list(names)
    rest = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def neighbor_ranges(numbers: Iterable[int]) -> list[list[int]]:
    """Returns the first and the last of each run of neighbors in sorted numbers: 0, 1, 2, 5 -> [[0, 2], [5, 5]]."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ranges


def number_ranges(numbers: Iterable[int]) -> str:
    """Returns sorted numbers with neighbors joined: 0, 1, 2, 5 -> "0-2,5"."""
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in neighbor_ranges(numbers))
