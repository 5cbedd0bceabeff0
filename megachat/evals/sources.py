"""Bits per byte of each source, for a data folder with sources in its manifest and in its validation shard.

The rows differ from those of training's validation, which crops documents when it packs them. Here the documents of one
source follow each other uncropped and are cut into rows, so that each token is predicted once. The sources' values are
close to the overall value, but do not average to it.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from megachat.data.shards import load_manifest, open_shards, split_shards
from megachat.data.texts import BadTexts, decode_texts, read_batches, row_location
from megachat.data.tokenizer import Tokenizer
from megachat.errors import UserError
from megachat.evals.bpb import IGNORED, ValidationRows
from megachat.parallel.mesh import Mesh
from megachat.planning.dimensions import up_to_multiple

_READ_DOCUMENTS = 256


def source_names(folder: Path) -> tuple[str, ...]:
    """Returns the sources in the manifest, if any. Raises UserError if the validation shard has no `source` column."""
    names = tuple((load_manifest(folder) or {}).get("sources") or ())
    shard = _validation_shard(folder)
    if names and "source" not in pq.read_schema(shard).names:
        raise UserError(
            f"{shard} has no `source` column, but the manifest lists sources: prepare the folder again with --overwrite"
        )
    return names


class TextRows(ValidationRows):
    """This rank's share of the rows of a text that is not cropped: each of its tokens but the first is predicted once.

    text: ids [n] of the documents, each with its BOS. tokens: per row. rows: number of rows of all ranks.
    """

    def __init__(self, text: np.ndarray, *, tokens: int, micro_rows: int, mesh: Mesh):
        self.rows = max(0, -(-(len(text) - 1) // tokens))
        padded = np.full(up_to_multiple(self.rows, micro_rows * mesh.data.size) * tokens + 1, IGNORED, np.int64)
        padded[: len(text)] = text
        batches: Iterable[torch.Tensor] = ()
        if self.rows:
            # a row's last target is the next row's first id
            rows = torch.from_numpy(padded).unfold(0, tokens + 1, tokens)
            batches = rows[mesh.data.rank :: mesh.data.size].split(micro_rows)
        super().__init__(batches, self.rows, micro_rows, mesh)


class SourceRows(TextRows):
    """This rank's share of the first rows of one source's validation documents.

    rows: number of rows of all ranks, at most `most_rows`; 0 if the validation shard has no document of the source.
    on_bad_text: "refuse" or "skip" texts that are not UTF-8.
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
        mesh: Mesh,
        on_bad_text: str = "refuse",
    ):
        text = read_tokens(_read_documents(folder, source, BadTexts(on_bad_text)), tokenizer, most_rows * tokens + 1)
        super().__init__(text, tokens=tokens, micro_rows=micro_rows, mesh=mesh)


def read_tokens(batches: Iterable[Sequence[str]], tokenizer: Tokenizer, most: float = math.inf) -> np.ndarray:
    """Returns the first `most` tokens of the documents, each with its BOS, int64 [n]."""
    documents, count = [np.zeros(0, np.int64)], 0
    for texts in batches:
        for tokens in tokenizer.encode_batch(texts):
            documents.append(tokens)
            count += len(tokens)
        if count >= most:
            break
    text = np.concatenate(documents)
    return text[: int(min(most, len(text)))].astype(np.int64)


def _read_documents(folder: Path, source: str, bad_texts: BadTexts) -> Iterator[list[str]]:
    """Yields the texts of the source's validation documents."""
    path = _validation_shard(folder)
    for group, first, batch in read_batches(path, _READ_DOCUMENTS, ("text", "source")):
        of_source = pc.equal(batch.column("source").cast(pa.string()), source).to_numpy(zero_copy_only=False)
        decoded, texts = decode_texts(batch.column("text")), []
        for row in np.flatnonzero(of_source).tolist():
            text = decoded[row]
            if isinstance(text, bytes):
                bad_texts.add(row_location(path, group, first + row), text)
            elif text:
                texts.append(text)
        yield texts


def _validation_shard(folder: Path) -> Path:
    return split_shards(open_shards(folder, min_shards=1), "validation")[0].path
