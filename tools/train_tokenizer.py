"""Train a byte-level BPE tokenizer on a data folder's train shards, or import nanochat's.

    python tools/train_tokenizer.py --data data/python --vocab-size 4096 --out data/tokenizer
    python tools/train_tokenizer.py --import-nanochat ~/.cache/nanochat/tokenizer --out data/tokenizer

Writes ranks.tiktoken (`base64 rank` a line) and tokenizer.json, no pickle. Called again with the same arguments it does nothing.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a clone that was not installed

from megachat.data.shards import check_data_folder  # noqa: E402
from megachat.data.tokenizer import METADATA_FILE, load_origin, load_tokenizer, save_tokenizer  # noqa: E402
from megachat.errors import UserError, user_errors_end_the_program  # noqa: E402
from megachat.prepare.tokenizer_training import bytes_per_token, import_nanochat, read_texts, train_tokenizer  # noqa: E402

_SAMPLE_CHARS = 10_000_000


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, help="data folder; needed unless a tokenizer is imported, then used to report compression"
    )
    parser.add_argument("--vocab-size", type=int, help="tokens in all, the 9 special ones included (32768)")
    parser.add_argument("--out", type=Path, required=True, help="the tokenizer folder to make")
    parser.add_argument("--max-chars", type=int, default=2_000_000_000, help="characters to train on at most")
    parser.add_argument("--doc-cap", type=int, default=10_000, help="characters of one document at most")
    parser.add_argument(
        "--import-nanochat",
        type=Path,
        metavar="DIR",
        help="take nanochat's tokenizer.pkl from here instead of training",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the tokenizer in --out")
    return parser


def make(asked: argparse.Namespace) -> bool:
    """Make the tokenizer folder and report its compression. False if it was there already."""
    if not asked.data and not asked.import_nanochat:
        raise UserError("neither --data to train on nor --import-nanochat was given: give one of them")
    if asked.import_nanochat and asked.vocab_size is not None:
        raise UserError(
            "--vocab-size is for training, and --import-nanochat takes the tokenizer as it is: leave one of them out"
        )
    for option in ("max_chars", "doc_cap"):
        if getattr(asked, option) < 1:
            raise UserError(f"--{option.replace('_', '-')} is {getattr(asked, option)}: give 1 or more")
    data = check_data_folder(asked.data) if asked.data else None
    vocab_size = 32768 if asked.vocab_size is None else asked.vocab_size
    if asked.import_nanochat:
        tokenizer = import_nanochat(asked.import_nanochat)
        origin = {"imported_from": "nanochat", "fingerprint": tokenizer.fingerprint}
    else:
        origin = {
            "data": data.train_fingerprint,
            "vocab_size": vocab_size,
            "max_chars": asked.max_chars,
            "doc_cap": asked.doc_cap,
        }
    if (asked.out / METADATA_FILE).exists() and not asked.overwrite:
        load_tokenizer(asked.out)
        if load_origin(asked.out) == origin:
            return False
        raise UserError(f"{asked.out} holds another tokenizer: give another --out, or --overwrite to replace it")
    if not asked.import_nanochat:
        start = time.perf_counter()
        tokenizer = train_tokenizer(read_texts(asked.data, "train", asked.max_chars, asked.doc_cap), vocab_size)
        print(f"trained {tokenizer.vocab_size:,} tokens in {time.perf_counter() - start:.1f} s")
    save_tokenizer(asked.out, tokenizer, origin)
    tokenizer = load_tokenizer(asked.out)
    print(f"{asked.out}: {tokenizer.vocab_size:,} tokens, fingerprint {tokenizer.fingerprint[:12]}")
    for split in ("train", "validation") if asked.data else ():
        ratio = bytes_per_token(
            tokenizer, read_texts(asked.data, split, min(_SAMPLE_CHARS, asked.max_chars), asked.doc_cap)
        )
        print(f"{split}: {ratio:.3f} bytes a token")
    return True


@user_errors_end_the_program
def main(arguments: list[str] | None = None) -> None:
    asked = build_parser().parse_args(arguments)
    if not make(asked):
        print(f"{asked.out} holds exactly this already: nothing to do")


if __name__ == "__main__":
    main()
