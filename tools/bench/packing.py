"""The loader beside plain packing: share of cropped tokens, and speed with and without tokenizing. What `tools/bench.py loader` runs."""

import itertools
import time

import numpy as np
import pyarrow.parquet as pq
import torch

from megachat.data.loader import Loader
from megachat.data.packing import REFILL_DOCUMENTS, Stream
from megachat.data.shards import open_shards, split_shards
from megachat.data.tokenizer import Tokenizer, load_tokenizer
from tools.bench.scan_packing import scan_rows

STEP_ROWS = 16


def texts_without_end(folder):
    while True:
        for shard in split_shards(open_shards(folder), "train"):
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


def measure(data, tokenizer_folder, *, row_tokens, rows, streams, buffer_documents, threads) -> dict:
    """Name -> {tokens_per_sec, cropped_percent}: packing of documents that are already tokenized, and whole loaders; one after the other."""
    tokenizer = load_tokenizer(tokenizer_folder)
    common = row_tokens, buffer_documents, rows
    epoch = sum(shard.documents for shard in split_shards(open_shards(data), "train"))
    lists = list(itertools.islice(tokenized_lists(data, tokenizer, threads), epoch))
    arrays = [np.array(ids, dtype=tokenizer.dtype) for ids in lists]
    found = {
        "plain_packing": plain(itertools.cycle(lists), *common),
        "our_packing": packed_only(itertools.cycle(arrays), *common),
        "plain_with_tokenizing": plain(tokenized_lists(data, tokenizer, threads), *common),
        "our_loader": loaded(data, tokenizer, row_tokens, rows, streams, buffer_documents, threads),
    }
    return {
        name: {"tokens_per_sec": round(rows * row_tokens / seconds), "cropped_percent": round(100 * cropped, 2)}
        for name, (seconds, cropped) in found.items()
    }
