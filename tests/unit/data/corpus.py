"""Small data folders and a tokenizer that needs no training."""

import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megachat.data.tokenizer import Tokenizer

SHARED = Path(__file__).parents[4] / "shared"
ENGLISH = SHARED / "data" / "english"
NANOCHAT = SHARED / "reference" / "nanochat_d4" / "tokenizer"
needs_shared = pytest.mark.skipif(
    not (ENGLISH.is_dir() and NANOCHAT.is_dir()),
    reason="../shared with the English shards and nanochat's tokenizer is absent",
)


def byte_tokenizer() -> Tokenizer:
    """A token for each byte and the special ones."""
    return Tokenizer({bytes([byte]): byte for byte in range(256)})


def write_folder(folder: Path, shards: list[list[str]], group: int = 7) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for index, texts in enumerate(shards):
        pq.write_table(
            pa.table({"text": pa.array(texts, pa.string())}),
            folder / f"shard_{index:05d}.parquet",
            row_group_size=group,
        )
    return folder


def random_texts(count: int, seed: int, longest: int = 90) -> list[str]:
    """Texts that differ, some longer than a row of the tests, many of equal length."""
    rng = random.Random(seed)
    return [
        "".join(rng.choice("abcdefgh ") for _ in range(rng.choice((3, 8, 8, 20, 31, rng.randint(1, longest)))))
        + str(index)
        for index in range(count)
    ]


def write_texts(path: Path, contents: list[bytes | None], group: int = 7, dictionary: bool = False) -> Path:
    """Writes bytes as a column of strings without checking that they are UTF-8, as careless writers do."""
    binary = pa.array(contents, pa.binary())
    texts = pa.Array.from_buffers(pa.string(), len(binary), binary.buffers(), binary.null_count)
    table = pa.Table.from_arrays([texts.dictionary_encode() if dictionary else texts], names=["text"])
    pq.write_table(table, path, row_group_size=group)
    return path
