"""The tokenizer: a folder with a rank file (tiktoken's text format, `base64 rank` a line) and tokenizer.json; encoding by tiktoken. No pickle."""

import base64
import binascii
import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import tiktoken

from megachat.errors import UserError
from megachat.files import write_atomically

RANK_FILE = "ranks.tiktoken"
METADATA_FILE = "tokenizer.json"
BOS = "<|bos|>"
SPECIAL_TOKENS = (
    BOS,
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    "<|assistant_end|>",
    "<|python_start|>",
    "<|python_end|>",
    "<|output_start|>",
    "<|output_end|>",
)
# nanochat's: GPT-4's with numbers in groups of two digits at most, which spends fewer tokens of a small vocabulary on numbers.
SPLIT_PATTERN = (
    r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"""
)


class Tokenizer:
    """Byte-level BPE. Ids 0..len(ranks)-1 are the merges (rank = id), then the special tokens in order.

    fingerprint: SHA-256 (hex) over ranks, special tokens and pattern, all that decides what a text becomes.
    """

    def __init__(
        self,
        ranks: dict[bytes, int],
        special_tokens: Sequence[str] = SPECIAL_TOKENS,
        pattern: str = SPLIT_PATTERN,
        name: str = "megachat",
    ):
        if sorted(ranks.values()) != list(range(len(ranks))) or any(bytes([byte]) not in ranks for byte in range(256)):
            raise UserError(
                f"the ranks of tokenizer {name} are not 0 to {len(ranks) - 1} with all 256 single bytes among them: train it again"
            )
        if not special_tokens or special_tokens[0] != BOS or len(set(special_tokens)) != len(special_tokens):
            raise UserError(
                f"the special tokens of tokenizer {name} are {', '.join(special_tokens) or 'none'}: they must differ and begin with {BOS}"
            )
        self.name, self.pattern, self.ranks = name, pattern, ranks
        self.special_tokens = {token: len(ranks) + index for index, token in enumerate(special_tokens)}
        self.vocab_size = len(ranks) + len(special_tokens)
        self.bos = self.special_tokens[BOS]
        self.dtype = np.uint16 if self.vocab_size <= 1 << 16 else np.uint32
        described = json.dumps([hashlib.sha256(rank_file_content(ranks)).hexdigest(), list(special_tokens), pattern])
        self.fingerprint = hashlib.sha256(described.encode()).hexdigest()
        try:
            self._encoding = tiktoken.Encoding(
                name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=self.special_tokens
            )
        except ValueError as error:
            raise UserError(
                f"the split pattern of tokenizer {name} is not a valid expression ({error}): train it again"
            ) from None

    def encode(self, text: str, *, bos: bool = False) -> np.ndarray:
        """Ids [n] of a text, uint16 (uint32 above 65,536 tokens); `bos` puts BOS in front. Names of special tokens in a text are ordinary text."""
        try:
            ids = self._encoding.encode_to_numpy(text, disallowed_special=())
        except UnicodeEncodeError:  # lone surrogates, which no UTF-8 can hold
            ids = self._encoding.encode_to_numpy(
                text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"), disallowed_special=()
            )
        tokens = np.empty(len(ids) + bos, dtype=self.dtype)
        tokens[:bos] = self.bos
        tokens[bos:] = ids
        return tokens

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> list[np.ndarray]:
        """Each text as `encode` gives it with BOS in front. tiktoken leaves the interpreter lock, so threads run at once."""
        if threads == 1 or len(texts) < 2:
            return [self.encode(text, bos=True) for text in texts]
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(lambda text: self.encode(text, bos=True), texts))

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of ids; bytes that are not UTF-8 become U+FFFD. Raises KeyError for an id outside the vocabulary."""
        return self._encoding.decode([int(i) for i in ids], errors="replace")

    def token_bytes(self) -> np.ndarray:
        """Bytes of each token, int32 [vocab_size]; special tokens count 0, so that bits per byte is about the text alone."""
        counts = np.zeros(self.vocab_size, dtype=np.int32)
        for token, rank in self.ranks.items():
            counts[rank] = len(token)
        return counts


def rank_file_content(ranks: dict[bytes, int]) -> bytes:
    """The rank file's content: a line for each rank, in order."""
    return b"".join(
        base64.b64encode(token) + b" %d\n" % rank for token, rank in sorted(ranks.items(), key=lambda item: item[1])
    )


def save_tokenizer(folder: str | Path, tokenizer: Tokenizer, origin: dict) -> None:
    """Write the rank file, then tokenizer.json, which vouches for it. origin: JSON-able, how the tokenizer was made."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    ranks = rank_file_content(tokenizer.ranks)
    metadata = {
        "name": tokenizer.name,
        "vocab_size": tokenizer.vocab_size,
        "pattern": tokenizer.pattern,
        "special_tokens": list(tokenizer.special_tokens),
        "rank_file": RANK_FILE,
        "rank_file_sha256": hashlib.sha256(ranks).hexdigest(),
        "fingerprint": tokenizer.fingerprint,
        "origin": origin,
    }
    (folder / METADATA_FILE).unlink(missing_ok=True)
    write_atomically(folder / RANK_FILE, ranks)
    write_atomically(folder / METADATA_FILE, json.dumps(metadata, indent=1, ensure_ascii=False).encode() + b"\n")


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a folder. Raises UserError when it is missing, cannot be understood or was altered."""
    folder = Path(folder)
    try:
        metadata = json.loads((folder / METADATA_FILE).read_text(encoding="utf-8"))
        content = (folder / RANK_FILE).read_bytes()
        if hashlib.sha256(content).hexdigest() != metadata["rank_file_sha256"]:
            raise UserError(
                f"{folder / RANK_FILE} was altered: its SHA-256 is not the one in {METADATA_FILE}; train the tokenizer again or copy the folder anew"
            )
        ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in content.splitlines())}
        tokenizer = Tokenizer(ranks, metadata["special_tokens"], metadata["pattern"], metadata["name"])
        recorded = metadata["vocab_size"], metadata["fingerprint"]
    except FileNotFoundError as error:
        raise UserError(
            f"there is no tokenizer at {folder} ({Path(error.filename).name} is missing): make one with tools/train_tokenizer.py"
        ) from None
    except (ValueError, KeyError, TypeError, OSError, binascii.Error) as error:
        raise UserError(
            f"the tokenizer at {folder} cannot be understood ({type(error).__name__}: {error}): train it again"
        ) from None
    if (tokenizer.vocab_size, tokenizer.fingerprint) != recorded:
        raise UserError(
            f"{folder / METADATA_FILE} was altered: it does not have its own fingerprint; train the tokenizer again or copy the folder anew"
        )
    return tokenizer


def load_origin(folder: str | Path) -> dict:
    """How the tokenizer of a folder was made, as given to `save_tokenizer`."""
    return json.loads((Path(folder) / METADATA_FILE).read_text(encoding="utf-8")).get("origin", {})
