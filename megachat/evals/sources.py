"""Bits per byte of each source of a data folder whose manifest names sources and whose validation shard says which document is from which.

The rows are not those of training's validation, whose packing crops documents: a source's documents follow each other, whole, and are cut into
rows where these are full, so that each token is predicted once. The sources' values are therefore near, not on, the value of all together.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from megachat.data.shards import load_manifest, open_shards, split_shards
from megachat.data.tokenizer import Tokenizer
from megachat.errors import UserError
from megachat.parallel.mesh import Axis

_BATCH_DOCUMENTS = 256


def source_names(folder: Path) -> tuple[str, ...]:
    """The names in the folder's manifest; none where it has none. Raises UserError when its validation shard does not say them."""
    names = tuple((load_manifest(folder) or {}).get("sources") or ())
    shard = split_shards(open_shards(folder, min_shards=1), "validation")[0].path
    if names and "source" not in pq.read_schema(shard).names:
        raise UserError(
            f"{shard} has no `source` column, though the manifest names sources: prepare the folder again with --overwrite"
        )
    return names


class SourceRows:
    """The first rows of one source's validation documents, this rank's share; what ValidationRows is for all of them.

    micro_batches: (ids, targets) [micro_rows, tokens] int64, the same number on every rank; a target of -1 is not counted. rows: of all ranks,
    at most `most_rows`; 0 where the source has no document there.
    """

    def __init__(
        self,
        folder: Path,
        source: str,
        tokenizer: Tokenizer,
        *,
        tokens: int,
        most_rows: int,
        micro_rows: int,
        data: Axis,
    ):
        text = _tokens(folder, source, tokenizer, most_rows * tokens + 1)
        self.rows = -(-(len(text) - 1) // tokens) if len(text) > 1 else 0
        ids, targets = np.zeros((self.rows, tokens), np.int64), np.full((self.rows, tokens), -1, np.int64)
        ids.reshape(-1)[: len(text) - 1], targets.reshape(-1)[: len(text) - 1] = text[:-1], text[1:]
        self.micro_batches = []
        for first in range(0, self.rows, micro_rows * data.size):
            own = [(first + slot * data.size + data.rank) for slot in range(micro_rows)]
            held = [number if number < self.rows else -1 for number in own]
            batch = torch.from_numpy(ids[held]), torch.from_numpy(targets[held])
            for slot, number in enumerate(held):
                if number < 0:
                    batch[1][slot] = -1  # beyond the last row: computed to keep shapes, never counted
            self.micro_batches.append(batch)


def _tokens(folder: Path, source: str, tokenizer: Tokenizer, most: int) -> np.ndarray:
    """The first `most` tokens of the source's validation documents, each with its BOS."""
    found, count = [], 0
    for texts in _documents(folder, source):
        for tokens in tokenizer.encode_batch(texts):
            found.append(tokens)
            count += len(tokens)
        if count >= most:
            break
    return np.concatenate(found)[:most].astype(np.int64) if found else np.zeros(0, np.int64)


def _documents(folder: Path, source: str) -> Iterator[list[str]]:
    path = split_shards(open_shards(folder, min_shards=1), "validation")[0].path
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_BATCH_DOCUMENTS, columns=["text", "source"]):
                texts = batch.filter(pc.equal(batch.column("source").cast(pa.string()), source)).column("text")
                yield [text for text in texts.to_pylist() if text]
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"{path} is damaged ({str(error).splitlines()[0]}): prepare the folder again with --overwrite"
        ) from None
