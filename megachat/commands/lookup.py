"""Allocate the rows of a lookup table to tokens, from a sample of the training text, and show the distribution.

    megachat lookup --data data/python --tokenizer data/tokenizer --out lookup.json
    megachat lookup --data data/python --tokenizer data/tokenizer --method frequency

The same sample gives the same bytes on every machine. Without --out nothing is written.
"""

import argparse
from pathlib import Path

from megachat.commands.options import Parser, require_minimum


def add_arguments(parser: Parser) -> None:
    """Adds the options of `megachat lookup`."""
    add = parser.add_argument
    add("--data", type=Path, required=True, help="data folder; the sample is the beginning of its train split")
    add("--tokenizer", type=Path, required=True, help="tokenizer folder")
    add("--method", choices=("lzw", "lzw_published", "frequency", "uniform"), default="lzw", help="default lzw")
    add("--rows", type=int, help="rows of the table (default 4 per token of the vocabulary)")
    add("--max-rows-per-token", type=int, default=512, help="default 512")
    add("--sample-tokens", type=int, default=10_000_000, help="tokens of text to look at (default 10 million)")
    add("--words", action="store_true", help="also show the 20 longest words of the scan")
    add("--out", type=Path, help="file to write the allocation to")
    add("--json", action="store_true", help="print one JSON document")


def run(options: argparse.Namespace) -> None:
    """Allocates, prints and perhaps writes the allocation."""
    require_minimum(options, rows=1, max_rows_per_token=1, sample_tokens=1)
    from megachat.programs.allocate_lookup import allocate_rows

    allocate_rows(options)
