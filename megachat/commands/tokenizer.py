"""Train a byte-level BPE tokenizer on a data folder's train shards, or import nanochat's.

    megachat tokenizer --data data/python --vocab-size 4096 --out data/tokenizer
    megachat tokenizer --import-nanochat ~/.cache/nanochat/tokenizer --out data/tokenizer

Writes ranks.tiktoken (one line `base64 rank` per token) and tokenizer.json, no pickle. The same command again does
nothing.
"""

import argparse
from pathlib import Path

from megachat.commands.options import Parser, require_minimum
from megachat.errors import UserError

VOCAB_SIZE = 32768


def add_arguments(parser: Parser) -> None:
    """Adds the options of `megachat tokenizer`."""
    add = parser.add_argument
    add("--data", type=Path, help="data folder to train on; with --import-nanochat only to report compression")
    add("--vocab-size", type=int, help=f"tokens, including the 9 special ones (default {VOCAB_SIZE})")
    add("--out", type=Path, required=True, help="the tokenizer folder to make")
    add("--max-chars", type=int, default=2_000_000_000, help="characters to train on at most (default 2e9)")
    add("--doc-cap", type=int, default=10_000, help="characters per document at most (default 10000)")
    add("--import-nanochat", type=Path, metavar="DIR", help="import nanochat's tokenizer.pkl from this folder")
    bad = "refuse texts that are not UTF-8, or skip them, counted (default refuse)"
    add("--on-bad-text", choices=["refuse", "skip"], default="refuse", help=bad)
    add("--overwrite", action="store_true", help="replace the tokenizer in --out")


def run(options: argparse.Namespace) -> None:
    """Makes the tokenizer folder."""
    if not options.data and not options.import_nanochat:
        raise UserError("neither --data to train on nor --import-nanochat was given: give one of them")
    if options.import_nanochat and options.vocab_size is not None:
        raise UserError(
            "--vocab-size is for training, but --import-nanochat does not change the tokenizer: leave one of them out"
        )
    require_minimum(options, max_chars=1, doc_cap=1)
    options.vocab_size = VOCAB_SIZE if options.vocab_size is None else options.vocab_size
    from megachat.programs.train_tokenizer import make_tokenizer

    if not make_tokenizer(options):
        print(f"{options.out} already holds exactly this tokenizer: nothing to do")
