"""Train a byte-level BPE tokenizer on a data folder's train shards, or import nanochat's.

    megachat tokenizer --data data/python --vocab-size 4096 --out data/tokenizer
    megachat tokenizer --data data/climbmix --shards 0-7 --out data/tokenizer32k
    megachat tokenizer --import-nanochat ~/.cache/nanochat/tokenizer --out data/tokenizer

Writes ranks.tiktoken (one line `base64 rank` per token) and tokenizer.json, no pickle. The same command again does
nothing.
"""

import argparse
import re
from pathlib import Path

from megachat.commands.options import Parser, require_minimum
from megachat.errors import UserError

DEFAULT_VOCAB_SIZE = 32768


def add_arguments(parser: Parser) -> None:
    """Adds the options of `megachat tokenizer`."""
    add = parser.add_argument
    add("--data", type=Path, help="data folder to train on; with --import-nanochat only to report compression")
    add("--vocab-size", type=int, help=f"tokens, including the 9 special ones (default {DEFAULT_VOCAB_SIZE})")
    add("--out", type=Path, required=True, help="the tokenizer folder to make")
    add("--max-chars", type=int, default=2_000_000_000, help="characters to train on at most (default 2e9)")
    add("--doc-cap", type=int, default=10_000, help="characters per document at most (default 10000)")
    which = "train on the shards with these numbers in their names only, and record their SHA-256 (default: all)"
    add("--shards", metavar="FIRST-LAST", help=which)
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
    options.shards = _range(options.shards)
    if options.shards and options.import_nanochat:
        raise UserError("--shards is for training, but --import-nanochat does not train: leave one of them out")
    require_minimum(options, max_chars=1, doc_cap=1)
    options.vocab_size = DEFAULT_VOCAB_SIZE if options.vocab_size is None else options.vocab_size
    from megachat.programs.train_tokenizer import make_tokenizer

    if not make_tokenizer(options):
        print(f"{options.out} already holds exactly this tokenizer: nothing to do")


def _range(text: str | None) -> tuple[int, int] | None:
    """Returns "0-7" as (0, 7), "3" as (3, 3). Raises UserError."""
    if text is None:
        return None
    match = re.fullmatch(r"([0-9]{1,9})(?:-([0-9]{1,9}))?", text)
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
    if first > last:
        raise UserError(f"--shards is {text!r}, but must be two numbers of shards in order, such as 0-7")
    return first, last
