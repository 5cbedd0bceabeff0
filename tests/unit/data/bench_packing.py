"""Compare the loader with plain packing: share of cropped tokens, and speed with and without tokenizing. Run by hand; not a test.

python -m tests.unit.data.bench_packing --data ../shared/data/english --tokenizer DIR --row-tokens 513 --rows 2000
"""

import argparse
import itertools
import time

import numpy as np
import pyarrow.parquet as pq
import torch

from megachat.data.loader import Loader
from megachat.data.packing import REFILL_DOCUMENTS, Stream
from megachat.data.shards import open_shards, split_of
from megachat.data.tokenizer import Tokenizer, load_tokenizer
from megachat.data.tokenizer_training import import_nanochat
from tests.unit.data.scan_packing import scan_rows

STEP_ROWS = 16


def texts_without_end(folder):
    while True:
        for shard in split_of(open_shards(folder), "train"):
            file = pq.ParquetFile(shard.path)
            for group in range(file.num_row_groups):
                yield from file.read_row_group(group).column("text").to_pylist()


def tokenized_lists(folder, tokenizer: Tokenizer, threads):
    """Documents as lists of integers, 128 texts at a time, as a plain implementation gets them from tiktoken."""
    texts = texts_without_end(folder)
    while True:
        for ids in tokenizer._encoding.encode_ordinary_batch(list(itertools.islice(texts, 128)), num_threads=threads):
            ids.insert(0, tokenizer.bos)
            yield ids


def plain(documents, row_tokens, buffer_documents, rows):
    """Seconds after the first row (the buffer is then full), and the share of cropped tokens."""
    packed = scan_rows(documents, row_tokens, buffer_documents, refill=REFILL_DOCUMENTS)
    row, read, cropped = next(packed)
    start = time.perf_counter()
    for row, read, cropped in itertools.islice(packed, rows - 1):  # noqa: B007
        torch.tensor(row, dtype=torch.long)
    return time.perf_counter() - start, cropped / read


def packed_only(documents, row_tokens, buffer_documents, rows):
    """The same for one stream over documents that are already tokenized."""
    numbered = enumerate(documents)
    stream = Stream(lambda: next(numbered), row_tokens, (buffer_documents, REFILL_DOCUMENTS), 1 << 40)
    row = np.empty(row_tokens, dtype=np.int64)
    stream.pack(row)
    start = time.perf_counter()
    for _ in range(rows - 1):
        stream.pack(row)
    state = stream.state()
    return time.perf_counter() - start, state.cropped_tokens / state.read_tokens


def loaded(folder, tokenizer, row_tokens, rows, streams, buffer_documents, threads):
    with Loader(
        folder,
        tokenizer,
        split="train",
        row_tokens=row_tokens,
        rows=STEP_ROWS,
        streams=streams,
        buffer_documents=buffer_documents,
        tokenizer_threads=threads,
    ) as loader:
        next(loader)
        start = time.perf_counter()
        for _ in range(rows // STEP_ROWS - 1):
            next(loader)
        return time.perf_counter() - start, loader.cropped_share


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--tokenizer", required=True, help="a tokenizer folder, nanochat's or ours")
    parser.add_argument("--row-tokens", type=int, default=513)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--buffer-documents", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=2)
    asked = parser.parse_args()
    try:
        tokenizer = load_tokenizer(asked.tokenizer)
    except Exception:
        tokenizer = import_nanochat(asked.tokenizer)
    common = asked.row_tokens, asked.buffer_documents, asked.rows
    epoch = sum(shard.documents for shard in split_of(open_shards(asked.data), "train"))
    lists = list(itertools.islice(tokenized_lists(asked.data, tokenizer, asked.threads), epoch))
    arrays = [np.array(ids, dtype=tokenizer.dtype) for ids in lists]
    results = {
        "plain packing": plain(itertools.cycle(lists), *common),
        "our packing, one stream": packed_only(itertools.cycle(arrays), *common),
        "plain with tokenizing": plain(tokenized_lists(asked.data, tokenizer, asked.threads), *common),
        "our loader, one stream": loaded(asked.data, tokenizer, asked.row_tokens, asked.rows, 1, asked.buffer_documents, asked.threads),
        f"our loader, {asked.streams} streams": loaded(
            asked.data, tokenizer, asked.row_tokens, asked.rows, asked.streams, asked.buffer_documents, asked.threads
        ),
    }
    print(f"{asked.rows} rows of {asked.row_tokens} tokens, {np.mean([len(ids) for ids in lists]):.0f} tokens a document, {epoch} documents an epoch")
    for name, (seconds, cropped) in results.items():
        print(f"{name:28} {asked.rows * asked.row_tokens / seconds / 1e6:8.2f} M tokens/s, {100 * cropped:6.2f} % cropped")


if __name__ == "__main__":
    main()
