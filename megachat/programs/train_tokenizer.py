"""Makes a tokenizer folder: what `megachat tokenizer` does."""

import argparse
import time

from megachat.data.shards import check_data_folder, open_shards, shard_range, shards_fingerprint, split_shards
from megachat.data.texts import BadTexts
from megachat.data.tokenizer import METADATA_FILE, SPECIAL_TOKENS, load_origin, load_tokenizer, save_tokenizer
from megachat.errors import UserError
from megachat.files import file_sha256
from megachat.prepare.tokenizer_training import (
    SAMPLE_CHARS,
    bytes_per_token,
    check_vocabulary,
    import_nanochat,
    read_texts,
    train_tokenizer,
    with_progress,
)


def make_tokenizer(options: argparse.Namespace) -> bool:
    """Makes the tokenizer folder and prints its compression. options: of `megachat tokenizer`.

    Returns False if the folder already holds this tokenizer.
    """
    data = check_data_folder(options.data) if options.data else None
    shards = shard_range(open_shards(options.data), *options.shards) if options.shards else None
    if options.import_nanochat:
        tokenizer = import_nanochat(options.import_nanochat)
        origin: dict = {"imported_from": "nanochat", "fingerprint": tokenizer.fingerprint}
    else:
        assert data  # the command requires it here
        origin = {
            "data": shards_fingerprint(shards) if shards else data.train_fingerprint,
            "vocab_size": options.vocab_size,
            "max_chars": options.max_chars,
            "doc_cap": options.doc_cap,
        }
        if shards:
            origin["shards"] = {shard.path.name: file_sha256(shard.path) for shard in shards}
    if (options.out / METADATA_FILE).exists() and not options.overwrite:
        load_tokenizer(options.out)
        if load_origin(options.out) == origin:
            return False
        raise UserError(f"{options.out} holds another tokenizer: give another --out, or --overwrite to replace it")
    if not options.import_nanochat:
        check_vocabulary(options.vocab_size, shards or split_shards(open_shards(options.data), "train"))
        start = time.perf_counter()
        bad_texts = BadTexts(options.on_bad_text, "give --on-bad-text skip", log=print)
        texts = read_texts(options.data, "train", options.max_chars, options.doc_cap, bad_texts, shards)
        assert data  # as above
        merges = options.vocab_size - len(SPECIAL_TOKENS) - 256
        documents = sum(shard.documents for shard in shards) if shards else data.train_documents
        texts = with_progress(texts, documents, options.max_chars, merges)
        tokenizer = train_tokenizer(texts, options.vocab_size)
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
        texts = read_texts(options.data, split, min(SAMPLE_CHARS, options.max_chars), options.doc_cap, BadTexts("skip"))
        print(f"{split}: {bytes_per_token(tokenizer, texts):.3f} bytes per token")
    return True
