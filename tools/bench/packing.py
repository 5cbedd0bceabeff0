"""Measures the loader beside plain packing: speed with and without tokenizing, and the share of cropped tokens."""

import itertools
import time
from argparse import Namespace
from collections.abc import Iterator

import numpy as np
import pyarrow.parquet as pq
import torch

from megachat.data.loader import Loader
from megachat.data.packing import REFILL_DOCUMENTS, PackingStream
from megachat.data.shards import open_shards, split_shards
from megachat.data.tokenizer import Tokenizer, load_tokenizer
from tools.bench.scan_packing import scan_rows

STEP_ROWS = 16


def repeat_texts(folder) -> Iterator[str]:
    """Yields the training texts of a data folder again and again."""
    while True:
        for shard in split_shards(open_shards(folder), "train"):
            file = pq.ParquetFile(shard.path)
            for group in range(file.num_row_groups):
                yield from file.read_row_group(group).column("text").to_pylist()


def tokenized_lists(folder, tokenizer: Tokenizer, threads):
    """Yields documents as lists of integers, 128 texts per call of tiktoken, as a plain implementation would."""
    texts = repeat_texts(folder)
    while True:
        for ids in tokenizer._encoding.encode_ordinary_batch(list(itertools.islice(texts, 128)), num_threads=threads):
            ids.insert(0, tokenizer.bos)
            yield ids


def time_plain_packing(documents, row_tokens, buffer_documents, rows):
    """Returns the seconds after the first row, when the buffer is full, and the share of cropped tokens."""
    packed = scan_rows(documents, row_tokens, buffer_documents, refill=REFILL_DOCUMENTS)
    row, read, cropped = next(packed)
    start = time.perf_counter()
    for row, read, cropped in itertools.islice(packed, rows - 1):  # noqa: B007
        torch.tensor(row, dtype=torch.long)
    return time.perf_counter() - start, cropped / read


def time_our_packing(documents, row_tokens, buffer_documents, rows):
    """Returns the same for one stream over tokenized documents."""
    numbered = enumerate(documents)
    stream = PackingStream(lambda: next(numbered), row_tokens, (buffer_documents, REFILL_DOCUMENTS), 1 << 40)
    row = np.empty(row_tokens, dtype=np.int64)
    stream.pack(row)
    start = time.perf_counter()
    for _ in range(rows - 1):
        stream.pack(row)
    state = stream.state()
    return time.perf_counter() - start, state.cropped_tokens / state.read_tokens


def time_our_loader(folder, tokenizer, row_tokens, rows, streams, buffer_documents, threads):
    """Returns the same for the whole loader."""
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


def bench_loader(arguments: Namespace) -> dict:
    """Measures tokens per second of packing and of whole loaders, one after the other."""
    data, threads, buffer_documents, streams = arguments.data, 2, 1000, 8
    row_tokens, rows = arguments.row_tokens, arguments.rows
    tokenizer = load_tokenizer(arguments.tokenizer)
    epoch = sum(shard.documents for shard in split_shards(open_shards(data), "train"))
    lists = list(itertools.islice(tokenized_lists(data, tokenizer, threads), epoch))
    arrays = [np.array(ids, dtype=tokenizer.dtype) for ids in lists]
    sizes = row_tokens, buffer_documents, rows
    timings = {
        "plain_packing": time_plain_packing(itertools.cycle(lists), *sizes),
        "our_packing": time_our_packing(itertools.cycle(arrays), *sizes),
        "plain_with_tokenizing": time_plain_packing(tokenized_lists(data, tokenizer, threads), *sizes),
        "our_loader": time_our_loader(data, tokenizer, row_tokens, rows, streams, buffer_documents, threads),
    }
    settings = {"row_tokens": row_tokens, "rows": rows, "streams": streams}
    settings |= {"buffer_documents": buffer_documents, "threads": threads}
    results = {
        name: {"tokens_per_sec": round(rows * row_tokens / seconds), "cropped_percent": round(100 * cropped, 2)}
        for name, (seconds, cropped) in timings.items()
    }
    seconds = {name: timing[0] for name, timing in timings.items()}
    return {
        "what": "tokens per second",
        "asked": settings,
        "found": results,
        "packing_times_faster": round(seconds["plain_packing"] / seconds["our_packing"], 2),
        "loader_times_faster": round(seconds["plain_with_tokenizing"] / seconds["our_loader"], 2),
    }
