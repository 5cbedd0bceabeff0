"""The `text` column of a parquet file: the types that hold strings, and texts that are not valid UTF-8."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megachat.errors import UserError
from megachat.files import refuse_damaged

_LOGGED = 10  # bad texts that are logged one by one


def holds_strings(kind: pa.DataType) -> bool:
    """Returns whether a column of this type holds strings, dictionary-encoded ones included. Bytes are not strings."""
    if pa.types.is_dictionary(kind):
        return holds_strings(kind.value_type)
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


class BadTexts:
    """Refuses texts that are not valid UTF-8, or skips, counts and logs them.

    policy: "refuse" or "skip". option: the option that skips them, for the error. log: gets one line for each of the
    first bad texts, in any epoch, and one when further ones are only counted.
    """

    def __init__(
        self,
        policy: str = "refuse",
        option: str = "set data.on_bad_text=skip",
        log: Callable[[str], None] = lambda line: None,
    ):
        self.policy, self.option, self.log, self.count = policy, option, log, 0
        self._lock, self._logged = threading.Lock(), set[str]()

    def add(self, location: str, content: bytes) -> None:
        """Counts a bad text. Raises UserError with its location if such texts are refused."""
        try:
            content.decode()
            raise ValueError(f"{location} is UTF-8 text")
        except UnicodeDecodeError as error:
            problem = f"{location} is not UTF-8 text (byte 0x{content[error.start]:02x} at position {error.start})"
        if self.policy == "refuse":
            raise UserError(f"{problem}: repair or remove it, or {self.option} to leave such texts out")
        with self._lock:
            self.count += 1
            if location in self._logged or len(self._logged) > _LOGGED:
                return
            self._logged.add(location)
            if len(self._logged) > _LOGGED:
                self.log(f"skipped more than {_LOGGED} texts that are not UTF-8: further ones are counted, not listed")
            else:
                self.log(f"skipped: {problem}")


REFUSE = BadTexts()


def row_location(path: Path, group: int, row: int) -> str:
    """Returns how messages name a row of a parquet file."""
    return f"{path}, row group {group}, row {row} (counted from 0)"


def decode_texts(texts: pa.Array | pa.ChunkedArray) -> list[str | bytes | None]:
    """Converts a column of strings. A text that is not valid UTF-8 stays bytes."""
    texts = texts.cast(pa.large_string())
    try:
        return texts.to_pylist()
    except UnicodeDecodeError:
        return [_decode(content) for content in texts.cast(pa.large_binary()).to_pylist()]


def count_words(texts: pa.ChunkedArray) -> np.ndarray:
    """Returns for each text (large_string) how many words it has at least, int64 [n], without decoding it.

    Words are separated by whitespace of ASCII. A byte with which other whitespace may begin takes one off, because a
    word may consist of it. The first word is not counted if no whitespace is before it, at the end of another text.
    """
    counts = [np.empty(0, np.int64)]
    for chunk in filter(len, texts.chunks):
        _, ends, content = chunk.buffers()
        offsets = np.frombuffer(ends, np.int64, len(chunk) + 1, 8 * chunk.offset)
        at = offsets - offsets[0]
        text = np.frombuffer(content, np.uint8, at[-1], offsets[0]) if at[-1] else np.empty(0, np.uint8)
        blank = (text == 0x20) | (text - 9 < 5)  # space, \t, \n, \v, \f, \r
        first = 1 + np.flatnonzero(blank[:-1] > blank[1:])  # letters of words
        other = np.flatnonzero((text == 0xC2) | (text - 0xE1 < 3))
        counts.append(np.diff(np.searchsorted(first, at)) - np.diff(np.searchsorted(other, at)))
    return np.concatenate(counts)


def _decode(content: bytes | None) -> str | bytes | None:
    try:
        return None if content is None else content.decode()
    except UnicodeDecodeError:
        return content


def read_batches(
    path: Path, batch_documents: int, columns: tuple[str, ...] = ("text",)
) -> Iterator[tuple[int, int, pa.RecordBatch]]:
    """Yields (row group, first row in it, batch) of a parquet file. Raises UserError if the file is damaged."""
    damaged = "is damaged ({}): download it or write it again"
    with refuse_damaged(path, damaged, pa.ArrowException), pq.ParquetFile(path) as file:
        for group in range(file.metadata.num_row_groups):
            row = 0
            for batch in file.iter_batches(batch_documents, row_groups=[group], columns=list(columns)):
                yield group, row, batch
                row += len(batch)


def read_shard_texts(path: Path, batch_documents: int, bad_texts: BadTexts) -> Iterator[list[str]]:
    """Yields the texts of a parquet file in batches, without empty ones. Raises UserError if the file is damaged."""
    for group, first, batch in read_batches(path, batch_documents):
        texts = []
        for row, text in enumerate(decode_texts(batch.column("text")), first):
            if isinstance(text, bytes):
                bad_texts.add(row_location(path, group, row), text)
            elif text:
                texts.append(text)
        yield texts
