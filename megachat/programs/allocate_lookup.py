"""Allocates the rows of a lookup table and shows the distribution: what `megachat lookup` does."""

import argparse
import json

import numpy as np

from megachat.data.tokenizer import Tokenizer, load_tokenizer
from megachat.files import check_writable
from megachat.planning.sizes import LOOKUP_ROWS_PER_TOKEN
from megachat.prepare.lookup_allocation import (
    Allocation,
    allocate,
    collect_words,
    sample_documents,
    save_allocation,
)
from megachat.text import text_table

LONGEST_WORDS = 20


def describe_allocation(allocation: Allocation) -> list[str]:
    """Return lines on how many tokens, and how much of the text, have how many rows."""
    rows, counts = allocation.rows_per_token, allocation.token_counts
    table = [("rows per token", "tokens", "share of the text")]
    least = 1
    while least <= rows.max():
        members = (rows >= least) & (rows < 2 * least)
        name = str(least) if least == 1 else f"{least} to {2 * least - 1}"
        table.append((name, f"{members.sum():,}", f"{counts[members].sum() / counts.sum():.1%}"))
        least *= 2
    sample = f"from {counts.sum():,} tokens of text"
    mean = f"a token of the text reads {allocation.mean_rows:.1f} rows on average"
    return [
        f"{allocation.rows:,} rows for {len(rows):,} tokens by {allocation.method}, {sample}",
        *text_table(table),
        f"{mean}, the median token has {np.median(rows):g}",
        f"hash {allocation.hash}",
    ]


def allocation_values(allocation: Allocation) -> dict:
    """Returns the allocation as JSON values: its hash and means, and how many tokens have how many rows."""
    rows, tokens = np.unique(allocation.rows_per_token, return_counts=True)
    return {
        "method": allocation.method,
        "rows": allocation.rows,
        "tokens": len(allocation.rows_per_token),
        "sample_tokens": int(allocation.token_counts.sum()),
        "mean_rows": float(allocation.mean_rows),
        "median_rows": float(np.median(allocation.rows_per_token)),
        "hash": allocation.hash,
        "tokens_by_rows": {int(count): int(number) for count, number in zip(rows, tokens, strict=True)},
    }


def longest_words(documents: list[np.ndarray], tokenizer: Tokenizer, *, published: bool) -> list[str]:
    """Return lines with the longest words that the scan collected, each with its count."""
    words = collect_words((ids.tolist() for ids in documents), tokenizer.vocab_size, published=published)
    longest = np.lexsort((-words.counts, -words.lengths))[:LONGEST_WORDS]
    return [
        f"{words.lengths[w]:5d} tokens, {words.counts[w]:,} x: {tokenizer.decode(words.tokens(w))!r}" for w in longest
    ]


def allocate_rows(options: argparse.Namespace) -> None:
    """Allocates, shows and perhaps writes the allocation. options: of `megachat lookup`.

    Raises UserError, before the text is read if the file cannot be written.
    """
    if options.out:
        check_writable(options.out)
    tokenizer = load_tokenizer(options.tokenizer)
    rows = options.rows or LOOKUP_ROWS_PER_TOKEN * tokenizer.vocab_size
    documents = list(sample_documents(options.data, tokenizer, options.sample_tokens))
    allocation = allocate(options.method, documents, tokenizer, rows, options.max_rows_per_token)
    lines = describe_allocation(allocation)
    if options.words:
        published = options.method == "lzw_published"
        lines += ["the longest words of the sample:", *longest_words(documents, tokenizer, published=published)]
    if options.out:
        save_allocation(allocation, options.out)
        lines.append(f"wrote {options.out}")
    print(json.dumps(allocation_values(allocation), indent=1) if options.json else "\n".join(lines))
