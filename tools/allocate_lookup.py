"""Allocate the rows of a lookup table to tokens, from a sample of the training text, and show the distribution.

    python tools/allocate_lookup.py --data data/python --tokenizer data/tokenizer --out lookup.json
    python tools/allocate_lookup.py --data data/python --tokenizer data/tokenizer --method frequency

The same sample gives the same bytes on every machine. Without --out nothing is written.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a clone that was not installed

import numpy as np  # noqa: E402

from megachat.data.tokenizer import Tokenizer, load_tokenizer  # noqa: E402
from megachat.errors import UserError, user_errors_end_the_program  # noqa: E402
from megachat.prepare.lookup_allocation import (  # noqa: E402
    Allocation,
    allocate,
    collect_words,
    sample_documents,
    save_allocation,
)
from megachat.text import text_table  # noqa: E402

ROWS_PER_TOKEN = 4  # of the vocabulary, by default; the paper has 3.9
_LONGEST_WORDS = 20


def describe(allocation: Allocation) -> list[str]:
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


def longest_words(documents: list[np.ndarray], tokenizer: Tokenizer, *, published: bool) -> list[str]:
    """Return lines with the longest words that the scan collected, each with its count."""
    words = collect_words((ids.tolist() for ids in documents), tokenizer.vocab_size, published=published)
    longest = np.lexsort((-words.counts, -words.lengths))[:_LONGEST_WORDS]
    return [
        f"{words.lengths[w]:5d} tokens, {words.counts[w]:,} x: {tokenizer.decode(words.tokens(w))!r}" for w in longest
    ]


@user_errors_end_the_program
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, required=True, help="data folder; the sample is the beginning of its train split")
    add("--tokenizer", type=Path, required=True, help="tokenizer folder")
    add("--method", choices=("lzw", "lzw_published", "frequency", "uniform"), default="lzw", help="default lzw")
    add("--rows", type=int, help=f"rows of the table (default {ROWS_PER_TOKEN} per token of the vocabulary)")
    add("--max-rows-per-token", type=int, default=512, help="default 512")
    add("--sample-tokens", type=int, default=10_000_000, help="tokens of text to look at (default 10 million)")
    add("--words", action="store_true", help=f"also show the {_LONGEST_WORDS} longest words of the scan")
    add("--out", type=Path, help="file to write the allocation to")
    options = parser.parse_args(arguments)
    for name in ("rows", "max_rows_per_token", "sample_tokens"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(options, name)}: give 1 or more")
    tokenizer = load_tokenizer(options.tokenizer)
    rows = options.rows or ROWS_PER_TOKEN * tokenizer.vocab_size
    documents = list(sample_documents(options.data, tokenizer, options.sample_tokens))
    allocation = allocate(options.method, documents, tokenizer, rows, options.max_rows_per_token)
    for line in describe(allocation):
        print(line)
    if options.words:
        print("the longest words of the sample:")
        for line in longest_words(documents, tokenizer, published=options.method == "lzw_published"):
            print(line)
    if options.out:
        save_allocation(allocation, options.out)
        print(f"wrote {options.out}")
    return 0


if __name__ == "__main__":
    main()
