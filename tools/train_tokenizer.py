"""Train a byte-level BPE tokenizer on a data folder's train shards, or import nanochat's.

    python tools/train_tokenizer.py --data data/python --vocab-size 4096 --out data/tokenizer
    python tools/train_tokenizer.py --import-nanochat ~/.cache/nanochat/tokenizer --out data/tokenizer

Writes ranks.tiktoken (one line `base64 rank` per token) and tokenizer.json, no pickle. The same command again does
nothing.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a clone that was not installed

from megachat.data.shards import check_data_folder  # noqa: E402
from megachat.data.texts import BadTexts  # noqa: E402
from megachat.data.tokenizer import METADATA_FILE, load_origin, load_tokenizer, save_tokenizer  # noqa: E402
from megachat.errors import UserError, user_errors_end_the_program  # noqa: E402
from megachat.prepare.tokenizer_training import (  # noqa: E402
    bytes_per_token,
    import_nanochat,
    read_texts,
    train_tokenizer,
)

_SAMPLE_CHARS = 10_000_000
_VOCAB_SIZE = 32768


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, help="data folder to train on; with --import-nanochat only to report compression")
    add("--vocab-size", type=int, help=f"tokens, including the 9 special ones (default {_VOCAB_SIZE})")
    add("--out", type=Path, required=True, help="the tokenizer folder to make")
    add("--max-chars", type=int, default=2_000_000_000, help="characters to train on at most (default 2e9)")
    add("--doc-cap", type=int, default=10_000, help="characters per document at most (default 10000)")
    add("--import-nanochat", type=Path, metavar="DIR", help="import nanochat's tokenizer.pkl from this folder")
    bad = "refuse texts that are not UTF-8, or skip them, counted (default refuse)"
    add("--on-bad-text", choices=["refuse", "skip"], default="refuse", help=bad)
    add("--overwrite", action="store_true", help="replace the tokenizer in --out")
    return parser


def make_tokenizer(options: argparse.Namespace) -> bool:
    """Make the tokenizer folder and print its compression. Returns False if the folder already holds this tokenizer."""
    if not options.data and not options.import_nanochat:
        raise UserError("neither --data to train on nor --import-nanochat was given: give one of them")
    if options.import_nanochat and options.vocab_size is not None:
        raise UserError(
            "--vocab-size is for training, but --import-nanochat does not change the tokenizer: leave one of them out"
        )
    for option in ("max_chars", "doc_cap"):
        if getattr(options, option) < 1:
            raise UserError(f"--{option.replace('_', '-')} is {getattr(options, option)}: give 1 or more")
    data = check_data_folder(options.data) if options.data else None
    vocab_size = _VOCAB_SIZE if options.vocab_size is None else options.vocab_size
    if options.import_nanochat:
        tokenizer = import_nanochat(options.import_nanochat)
        origin = {"imported_from": "nanochat", "fingerprint": tokenizer.fingerprint}
    else:
        origin = {
            "data": data.train_fingerprint,
            "vocab_size": vocab_size,
            "max_chars": options.max_chars,
            "doc_cap": options.doc_cap,
        }
    if (options.out / METADATA_FILE).exists() and not options.overwrite:
        load_tokenizer(options.out)
        if load_origin(options.out) == origin:
            return False
        raise UserError(f"{options.out} holds another tokenizer: give another --out, or --overwrite to replace it")
    if not options.import_nanochat:
        start = time.perf_counter()
        bad_texts = BadTexts(options.on_bad_text, "give --on-bad-text skip", log=print)
        texts = read_texts(options.data, "train", options.max_chars, options.doc_cap, bad_texts)
        tokenizer = train_tokenizer(texts, vocab_size)
        if bad_texts.count:
            print(f"{bad_texts.count:,} texts that are not UTF-8 were left out")
        print(f"trained {tokenizer.vocab_size:,} tokens in {time.perf_counter() - start:.1f} s")
    try:
        save_tokenizer(options.out, tokenizer, origin)
    except OSError as error:
        raise UserError(f"{options.out} cannot be written ({error.strerror or error}): give another --out") from None
    tokenizer = load_tokenizer(options.out)
    print(f"{options.out}: {tokenizer.vocab_size:,} tokens, fingerprint {tokenizer.fingerprint[:12]}")
    for split in ("train", "validation") if options.data else ():
        texts = read_texts(
            options.data, split, min(_SAMPLE_CHARS, options.max_chars), options.doc_cap, BadTexts("skip")
        )
        print(f"{split}: {bytes_per_token(tokenizer, texts):.3f} bytes per token")
    return True


@user_errors_end_the_program
def main(arguments: list[str] | None = None) -> None:
    options = build_parser().parse_args(arguments)
    if not make_tokenizer(options):
        print(f"{options.out} already holds exactly this tokenizer: nothing to do")


if __name__ == "__main__":
    main()
