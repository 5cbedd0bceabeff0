"""Where tokenizers come from: training on the shards of a data folder, and nanochat's pickle, read without running it, and written."""

import io
import pickle
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import tiktoken
import torch

from megachat.data.shards import open_shards, split_shards
from megachat.data.tokenizer import SPECIAL_TOKENS, SPLIT_PATTERN, Tokenizer
from megachat.errors import UserError
from megachat.files import write_atomically


def read_texts(folder: str | Path, split: str, max_chars: int, doc_cap: int) -> Iterator[str]:
    """The first `doc_cap` characters of each document of a split in the order of files, `max_chars` in all."""
    left = max_chars
    for shard in split_shards(open_shards(folder), split):
        try:
            with pq.ParquetFile(shard.path) as file:
                for batch in file.iter_batches(batch_size=256, columns=["text"]):
                    for text in batch.column("text").to_pylist():
                        if text:
                            text = text[: min(doc_cap, left)]
                            left -= len(text)
                            yield text
                        if left <= 0:
                            return
        except (pa.ArrowException, OSError) as error:
            raise UserError(
                f"{shard.path} is damaged ({str(error).splitlines()[0]}): download or prepare it again"
            ) from None


def train_tokenizer(texts: Iterator[str], vocab_size: int, name: str = "megachat") -> Tokenizer:
    """Byte-level BPE with `vocab_size` tokens in all, the special ones included. Raises UserError if that is too few or too many for the text."""
    least = 256 + len(SPECIAL_TOKENS)
    if vocab_size < least:
        raise UserError(
            f"a vocabulary of {vocab_size} tokens is too small: it needs the 256 bytes and {len(SPECIAL_TOKENS)} special tokens, "
            f"so give --vocab-size {least} or more"
        )
    import rustbpe

    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(texts, vocab_size - len(SPECIAL_TOKENS), pattern=SPLIT_PATTERN)
    ranks = {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}
    if len(ranks) + len(SPECIAL_TOKENS) < vocab_size:
        most = len(ranks) + len(SPECIAL_TOKENS)
        raise UserError(
            f"the text yields only {len(ranks) - 256} merges, a vocabulary of {most} tokens, not {vocab_size}: "
            f"give more text or --vocab-size {most} or less"
        )
    return Tokenizer(ranks, name=name)


def bytes_per_token(tokenizer: Tokenizer, texts: Iterator[str], threads: int = 2) -> float:
    """UTF-8 bytes of the texts over their tokens, BOS not counted."""
    total_bytes = total_tokens = 0
    batch: list[str] = []

    def count() -> None:
        nonlocal total_bytes, total_tokens
        total_bytes += sum(len(text.encode("utf-8", "replace")) for text in batch)
        total_tokens += sum(len(tokens) - 1 for tokens in tokenizer.encode_batch(batch, threads))
        batch.clear()

    for text in texts:
        batch.append(text)
        if len(batch) == 1024:
            count()
    count()
    return total_bytes / max(1, total_tokens)


class _PickledEncoding:
    """Stands in for tiktoken.Encoding: keeps what was pickled and does nothing else."""

    state: object = None

    def __setstate__(self, state: object) -> None:
        self.state = state


class _EncodingOnly(pickle.Unpickler):
    """Resolves the name of tiktoken's Encoding, to our stand-in; every other name is refused before anything is called."""

    def find_class(self, module: str, name: str) -> type:
        if (module, name) in {("tiktoken.core", "Encoding"), ("tiktoken", "Encoding")}:
            return _PickledEncoding
        raise UserError(
            f"it asks for {module}.{name}, and nothing but tiktoken.core.Encoding is allowed: take the file from a source you trust"
        )


def import_nanochat(folder: str | Path) -> Tokenizer:
    """The tokenizer of a nanochat tokenizer folder (tokenizer.pkl, a pickled tiktoken.Encoding). Runs nothing from the file; raises UserError."""
    path = Path(folder) / "tokenizer.pkl"
    try:
        state = _EncodingOnly(io.BytesIO(path.read_bytes())).load().state
        name, pattern, ranks, special = (state[key] for key in ("name", "pat_str", "mergeable_ranks", "special_tokens"))
    except FileNotFoundError:
        raise UserError(f"there is no nanochat tokenizer at {folder}: tokenizer.pkl is missing") from None
    except UserError as error:
        raise UserError(f"{path} is refused: {error}") from None
    except Exception as error:  # a damaged pickle may raise anything
        raise UserError(
            f"{path} is not a pickled tiktoken.Encoding ({type(error).__name__}: {error}): export it from nanochat again"
        ) from None
    sound = isinstance(name, str) and isinstance(pattern, str) and isinstance(ranks, dict) and isinstance(special, dict)
    if not sound or not all(isinstance(token, bytes) and isinstance(rank, int) for token, rank in ranks.items()):
        raise UserError(
            f"{path} does not hold a tokenizer's name, pattern, ranks and special tokens: export it from nanochat again"
        )
    order = sorted(special, key=special.__getitem__)
    if [special[token] for token in order] != list(range(len(ranks), len(ranks) + len(order))):
        raise UserError(
            f"{path} has special tokens whose ids do not follow the {len(ranks)} merges: only such tokenizers can be imported"
        )
    return Tokenizer(ranks, order, pattern, name)


def export_nanochat(tokenizer: Tokenizer, folder: str | Path) -> None:
    """Write nanochat's tokenizer folder: tokenizer.pkl, its pickled tiktoken.Encoding, and token_bytes.pt, int32 [vocab_size]."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    encoding = tiktoken.Encoding(
        tokenizer.name,
        pat_str=tokenizer.pattern,
        mergeable_ranks=tokenizer.ranks,
        special_tokens=tokenizer.special_tokens,
    )
    write_atomically(folder / "tokenizer.pkl", pickle.dumps(encoding))
    torch.save(torch.from_numpy(tokenizer.token_bytes()), folder / "token_bytes.pt")
