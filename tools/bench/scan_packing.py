"""Best-fit packing written out plainly: the whole buffer is looked through for every placement. Test oracle and baseline of `bench_packing`."""

from collections.abc import Iterator


def scan_rows(
    documents: Iterator[list[int]], row_tokens: int, buffer_documents: int, refill: int = 1
) -> Iterator[tuple[list[int], int, int]]:
    """(row, tokens read so far, tokens cropped so far) without end. refill: documents added at a time while the buffer holds too few."""
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
