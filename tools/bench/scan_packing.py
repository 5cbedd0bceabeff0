"""Best-fit packing written plainly: scans the whole buffer for every placement. Oracle of the tests, and a baseline."""

from collections.abc import Iterator


def scan_rows(
    documents: Iterator[list[int]], row_tokens: int, buffer_documents: int, refill: int = 1
) -> Iterator[tuple[list[int], int, int]]:
    """Yields (row, tokens read so far, tokens cropped so far). refill: documents added to the buffer at a time."""
    buffer: list[list[int]] = []
    read = cropped = 0
    while True:
        row: list[int] = []
        while len(row) < row_tokens:
            while len(buffer) < buffer_documents:
                buffer.extend(next(documents) for _ in range(refill))
            space = row_tokens - len(row)
            best = -1
            for index, document in enumerate(buffer):
                if len(document) <= space and (best < 0 or len(document) > len(buffer[best])):
                    best = index
            if best < 0:
                best = min(range(len(buffer)), key=lambda index: len(buffer[index]))
            document = buffer.pop(best)
            row.extend(document[:space])
            read += len(document)
            cropped += max(0, len(document) - space)
        yield row, read, cropped
