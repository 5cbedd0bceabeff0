"""Training a tokenizer on a data folder, and nanochat's pickled tokenizer: read without executing it, and written."""

import contextlib
import io
import itertools
import pickle
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow.parquet as pq
import tiktoken

from megachat.activity import ProgressBar, print_line, ticking
from megachat.data.shards import Shard, open_shards, split_shards
from megachat.data.texts import REFUSE, BadTexts, read_shard_texts
from megachat.data.tokenizer import LONGEST_RUN, SPECIAL_TOKENS, SPLIT_PATTERN, Tokenizer, split_long_runs
from megachat.errors import UserError, summary
from megachat.files import lfs_problem, write_atomically

NANOCHAT_FILE = "tokenizer.pkl"  # a pickled tiktoken.Encoding
SAMPLE_CHARS = 10_000_000  # of a text whose statistics are reported


def read_texts(
    folder: str | Path,
    split: str,
    max_chars: int,
    doc_cap: int,
    bad_texts: BadTexts = REFUSE,
    shards: list[Shard] | None = None,
) -> Iterator[str]:
    """Yields the first `doc_cap` characters of each document of a split in file order, `max_chars` in total.

    shards: those of the split to read; None for all.
    """
    left = max_chars
    for shard in shards or split_shards(open_shards(folder), split):
        for texts in read_shard_texts(shard.path, 256, bad_texts):
            for text in texts:
                text = text[: min(doc_cap, left)]
                left -= len(text)
                yield text
                if left <= 0:
                    return


def with_progress(texts: Iterator[str], documents: int, max_chars: int, merges: int) -> Iterator[str]:
    """Yields the texts and shows how many of those that are needed were read; then that the merges are learned.

    documents: in the split. max_chars: where `texts` ends.
    """
    with ProgressBar("reading documents", documents, "") as progress:
        count = chars = 0
        for count, text in enumerate(texts, 1):
            chars += len(text)
            yield text
            progress.update(1, total=min(documents, round(max_chars * count / max(1, chars))))
    print_line(f"read {count:,} documents, {chars:,} characters; learning {merges:,} merges ...")


def check_vocabulary(vocab_size: int, shards: Iterable[Shard] = ()) -> None:
    """Raises UserError for a vocabulary that is too small, or that the texts of these shards cannot give because they
    have fewer bytes than it needs merges. Footers are read only; what is refused is impossible, what passes may be.
    """
    least = 256 + len(SPECIAL_TOKENS)
    if vocab_size < least:
        raise UserError(
            f"a vocabulary of {vocab_size} tokens is too small: it needs the 256 bytes and {len(SPECIAL_TOKENS)} "
            f"special tokens, so {_give(least)} or more"
        )
    paths = [shard.path for shard in shards]
    most = least + sum(map(_text_bytes, paths))
    if paths and vocab_size > most:
        raise UserError(
            f"the text in {paths[0].parent} has about {most - least:,} bytes, too few for a vocabulary of "
            f"{vocab_size:,} tokens: give more text, or a smaller --vocab-size (of a speedrun: --set model.vocab_size)"
        )


def _give(size: int) -> str:
    return f"give --vocab-size {size} (of a speedrun: --set model.vocab_size={size})"


def _text_bytes(path: Path) -> int:
    """Returns the bytes of the text column, uncompressed; equal texts may count once."""
    with pq.ParquetFile(path) as file:
        metadata, column = file.metadata, file.schema.names.index("text")
    return sum(
        metadata.row_group(group).column(column).total_uncompressed_size for group in range(metadata.num_row_groups)
    )


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> Tokenizer:
    """Trains byte-level BPE with `vocab_size` tokens, including the special ones.

    Raises UserError if that is too few, or too many for the text.
    """
    check_vocabulary(vocab_size)
    special = len(SPECIAL_TOKENS)
    import rustbpe

    trainer = rustbpe.Tokenizer()
    with contextlib.ExitStack() as learning:

        def read() -> Iterator[str]:
            yield from _with_short_runs(texts)
            learning.enter_context(ticking("learning merges"))  # rustbpe calls nothing back and keeps Python's lock

        trainer.train_from_iterator(read(), vocab_size - special, pattern=SPLIT_PATTERN)
    ranks = {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}
    if len(ranks) + special < vocab_size:
        raise UserError(
            f"the text gives only {len(ranks) - 256} merges, a vocabulary of {len(ranks) + special} tokens, "
            f"not {vocab_size}: give more text, or {_give(len(ranks) + special)} or less"
        )
    return Tokenizer(ranks, name="megachat")


def _with_short_runs(texts: Iterator[str]) -> Iterator[str]:
    """Cuts long runs of blanks out of the texts and into pieces of LONGEST_RUN: rustbpe panics on a million of them."""
    for text in texts:
        if len(text) <= LONGEST_RUN:
            yield text
            continue
        for part, is_run in split_long_runs(text):
            length = LONGEST_RUN if is_run else max(1, len(part))
            yield from (part[start : start + length] for start in range(0, len(part), length))


def bytes_per_token(tokenizer: Tokenizer, texts: Iterator[str]) -> float:
    """Returns the texts' UTF-8 bytes per token, without BOS."""
    total_bytes = total_tokens = 0
    while batch := list(itertools.islice(texts, 1024)):
        total_bytes += sum(len(text.encode("utf-8", "replace")) for text in batch)
        total_tokens += sum(len(tokens) - 1 for tokens in tokenizer.encode_batch(batch, threads=2))
    return total_bytes / max(1, total_tokens)


class _PickledEncoding:
    """Replaces tiktoken.Encoding: keeps the pickled state and does nothing else."""

    state: object = None

    def __setstate__(self, state: object) -> None:
        self.state = state


class _EncodingUnpickler(pickle.Unpickler):
    """Resolves only the name of tiktoken's Encoding, to our replacement; refuses others before anything is called."""

    def find_class(self, module: str, name: str) -> type:
        if (module, name) in {("tiktoken.core", "Encoding"), ("tiktoken", "Encoding")}:
            return _PickledEncoding
        raise UserError(
            f"it refers to {module}.{name}, but only tiktoken.core.Encoding is allowed: "
            "use a file from a trusted source"
        )


def import_nanochat(folder: str | Path) -> Tokenizer:
    """Reads the tokenizer of a nanochat tokenizer folder (NANOCHAT_FILE).

    Executes nothing from the file. Raises UserError.
    """
    path = Path(folder) / NANOCHAT_FILE
    try:
        state = _EncodingUnpickler(io.BytesIO(path.read_bytes())).load().state
        name, pattern, ranks, special = (state[key] for key in ("name", "pat_str", "mergeable_ranks", "special_tokens"))
    except FileNotFoundError:
        raise UserError(f"there is no nanochat tokenizer at {folder}: {NANOCHAT_FILE} is missing") from None
    except UserError as error:
        raise UserError(f"{path} is refused: {error}") from None
    except Exception as error:  # a damaged pickle may raise anything
        problem = f"is not a pickled tiktoken.Encoding ({summary(error)}): export it from nanochat again"
        raise UserError(f"{path} {lfs_problem(path) or problem}") from None
    valid = isinstance(name, str) and isinstance(pattern, str) and isinstance(ranks, dict) and isinstance(special, dict)
    if not valid or not all(isinstance(token, bytes) and isinstance(rank, int) for token, rank in ranks.items()):
        raise UserError(
            f"{path} does not have a tokenizer's name, pattern, ranks and special tokens: export it from nanochat again"
        )
    order = sorted(special, key=special.__getitem__)
    if [special[token] for token in order] != list(range(len(ranks), len(ranks) + len(order))):
        raise UserError(
            f"{path} cannot be imported: the ids of its special tokens do not follow its {len(ranks)} merges"
        )
    return Tokenizer(ranks, order, pattern, name)


def export_nanochat_tokenizer(tokenizer: Tokenizer, folder: str | Path) -> None:
    """Writes nanochat's tokenizer folder: tokenizer.pkl, a tiktoken.Encoding, and token_bytes.pt, int32 [vocab]."""
    import torch  # here: the other functions do not need it, and importing it takes seconds

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    encoding = tiktoken.Encoding(
        tokenizer.name,
        pat_str=tokenizer.pattern,
        mergeable_ranks=tokenizer.ranks,
        special_tokens=tokenizer.special_tokens,
    )
    write_atomically(folder / NANOCHAT_FILE, pickle.dumps(encoding))
    torch.save(torch.from_numpy(tokenizer.token_bytes()), folder / "token_bytes.pt")
