"""The loader's state in a checkpoint: one file a packing stream, so that any number of ranks can go on from it. NumPy arrays and JSON, no pickle."""

import contextlib
import hashlib
import io
import json
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from megachat.data.packing import FRESH, BufferedDocument, StreamState
from megachat.data.shards import Shard, footers_digest, shards_fingerprint
from megachat.data.tokenizer import Tokenizer
from megachat.errors import UserError
from megachat.files import write_atomically

HEADER_FILE = "loader.json"
_COUNTERS = ("next_document", "next_sequence", "rows", "read_tokens", "cropped_tokens")
# What must be as it was for the rows to go on; how the user changes it back.
_SAME = {
    "split": "split",
    "row_tokens": "tokens a row",
    "rows": "rows a step",
    "streams": "packing streams (data.streams)",
    "buffer_documents": "documents in a buffer (data.buffer_documents)",
    "seed": "data seed (data.shuffle, run.seed)",
    "tokenizer": "tokenizer (SHA-256)",
    "data": "training shards (SHA-256 over names, sizes and documents)",
    "texts": "texts in shards of the same names and sizes (SHA-256 over the files' footers)",
}


class TransientReadError(UserError):
    """The storage failed just now; what lies there may be whole."""


def stream_to_arrays(state: StreamState, dtype: np.dtype) -> dict[str, np.ndarray]:
    """A stream's state as arrays: counters int64 [5], ledger uint8 [32], and for the n documents in its buffer, in the order they came,
    sequence, documents (numbers) and lengths int64 [n] and their kept tokens end to end.
    """
    held = state.held
    return {
        "counters": np.array([getattr(state, name) for name in _COUNTERS], dtype=np.int64),
        "ledger": np.frombuffer(state.ledger, dtype=np.uint8),
        "sequence": np.fromiter(held, dtype=np.int64, count=len(held)),
        "documents": np.array([document.number for document in held.values()], dtype=np.int64),
        "lengths": np.array([document.length for document in held.values()], dtype=np.int64),
        "tokens": np.concatenate([np.empty(0, dtype), *(document.tokens for document in held.values())]),
    }


def stream_from_arrays(arrays: dict[str, np.ndarray], row_tokens: int) -> StreamState:
    """The inverse of `stream_to_arrays`. Raises ValueError when the arrays do not fit together."""
    kept = np.minimum(arrays["lengths"], row_tokens)
    ends = np.cumsum(kept)
    if len(arrays["tokens"]) != kept.sum() or not len(arrays["sequence"]) == len(arrays["documents"]) == len(kept):
        raise ValueError("documents and tokens do not fit together")
    pieces = np.split(arrays["tokens"], ends[:-1]) if len(kept) else []
    held = {
        sequence: BufferedDocument(number, length, tokens)
        for sequence, number, length, tokens in zip(
            arrays["sequence"].tolist(), arrays["documents"].tolist(), arrays["lengths"].tolist(), pieces, strict=True
        )
    }
    return StreamState(
        **dict(zip(_COUNTERS, arrays["counters"].tolist(), strict=True)), ledger=arrays["ledger"].tobytes(), held=held
    )


def loader_settings(shards: list[Shard], tokenizer: Tokenizer, order: dict) -> dict:
    """What a loader's rows depend on, for its header. order: its split, row_tokens, rows, streams, buffer_documents and seed."""
    return {
        **order,
        "tokenizer": tokenizer.fingerprint,
        "data": shards_fingerprint(shards),
        "texts": footers_digest(shards),
    }


def require_same_settings(header: dict, current: dict) -> None:
    """Raise UserError, naming both values, if a saved header belongs to other data, another tokenizer or other settings than `current`."""
    for key, words in _SAME.items():
        if (
            header.get(key, current[key] if key == "texts" else None) != current[key]
        ):  # early checkpoints do not tell of texts
            raise UserError(
                f"the checkpoint's loader state has {words} {_brief(header.get(key))} but this run has {_brief(current[key])}: "
                "go on with the checkpoint's or start a new run"
            )


def _brief(value: object) -> object:
    return value[:12] if isinstance(value, str) else value


def rows_before(step: int, rows: int, stream: int, streams: int) -> int:
    """Rows that a stream has packed when `step` steps are done."""
    return (step * rows - stream + streams - 1) // streams


def combined_ledger(streams: dict[int, bytes | str]) -> str:
    """SHA-256 (hex) over the ledgers of all streams in the order of their numbers; a stream's ledger is given as bytes or hex."""
    digests = (ledger if isinstance(ledger, bytes) else bytes.fromhex(ledger) for _, ledger in sorted(streams.items()))
    return hashlib.sha256(b"".join(digests)).hexdigest()


def restarted_state(checkpoint_step: int, ledger: str | None, header: dict | None) -> dict:
    """A state in which all streams begin again with the first document; it remembers that it does, and so does their ledger.

    checkpoint_step: steps that the run has done. ledger: combined, of the documents before, None where it is not known. header: of the loader
    state that cannot be gone on with, None where there is none.
    """
    restarts = [*(header or {}).get("restarts", []), {"step": checkpoint_step, "ledger": ledger}]
    return {"header": {"step": 0, "restarts": restarts}, "streams": None}


def initial_stream_state(restarts: list[dict]) -> StreamState:
    """A stream before its first row. restarts: the times at which the documents were begun anew, the oldest first: their steps and ledgers are
    the beginning of the new ledger."""
    return (
        replace(FRESH, ledger=hashlib.sha256(json.dumps(restarts, sort_keys=True).encode()).digest())
        if restarts
        else FRESH
    )


def step_of_run(header: dict) -> int:
    """The run's step at which a loader state was saved; the header counts steps since the documents were last begun."""
    return header["step"] + sum(restart["step"] for restart in header.get("restarts", [])[-1:])


def save_loader_state(folder: str | Path, state: dict, mine: Iterable[int]) -> None:
    """Write `stream_00003.npz` for each stream in `mine`, and loader.json if stream 0 is among them. state: from `Loader.state()`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    mine = list(mine)
    for stream in mine:
        content = io.BytesIO()
        np.savez(content, allow_pickle=False, **state["streams"][stream])
        write_atomically(_path(folder, stream), content.getvalue())
    if 0 in mine:
        write_atomically(folder / HEADER_FILE, json.dumps(state["header"], indent=1).encode() + b"\n")


def load_header(folder: str | Path) -> dict:
    """What all streams share. Raises UserError for a file that is missing or damaged, TransientReadError where the storage fails."""
    path = Path(folder) / HEADER_FILE
    with _in_words(path):
        header = json.loads(path.read_text(encoding="utf-8"))
        [header[key] for key in ("step", "rows", "streams", "row_tokens")]
        return header


def load_loader_state(folder: str | Path, needed: Iterable[int]) -> dict:
    """The state with the streams in `needed`, whoever saved them. Raises UserError for a file that is missing, damaged, of another step or of
    another stream, TransientReadError where the storage fails."""
    folder = Path(folder)
    header, streams = load_header(folder), {}
    for stream in needed:
        path = _path(folder, stream)
        with _in_words(path):
            if not 0 <= stream < header["streams"]:
                raise UserError(
                    f"{folder} holds {header['streams']} packing streams, not stream {stream}: set data.streams to {header['streams']}"
                )
            with np.load(path, allow_pickle=False) as file:
                arrays = streams[stream] = {
                    name: file[name] for name in ("counters", "ledger", "sequence", "documents", "lengths", "tokens")
                }
            strangers = arrays["documents"] % header.get("documents", 1) % header["streams"] != stream
            if "documents" in header and strangers.any():
                raise UserError(
                    f"{path} is of another stream or run: it holds documents that are not stream {stream}'s; load another checkpoint"
                )
            packed = stream_from_arrays(arrays, header["row_tokens"]).rows
            if packed != rows_before(header["step"], header["rows"], stream, header["streams"]):
                raise UserError(f"{path} is not of step {header['step']} as {HEADER_FILE} is: load another checkpoint")
    return {"header": header, "streams": streams}


@contextlib.contextmanager
def _in_words(path: Path) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"the loader state {path} is missing: load another checkpoint") from None
    except OSError as error:
        raise TransientReadError(
            f"the loader state {path} cannot be read ({error.strerror or error}): make it readable and try again"
        ) from None
    except (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(
            f"the loader state {path} is damaged ({type(error).__name__}): load another checkpoint"
        ) from None


def _path(folder: Path, stream: int) -> Path:
    return folder / f"stream_{stream:05d}.npz"
