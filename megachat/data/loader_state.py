"""The loader's state in a checkpoint: one file per packing stream, so that any number of ranks can resume from it.

The files are NumPy arrays and JSON, without pickle.
"""

import contextlib
import hashlib
import io
import json
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from megachat.data.packing import EMPTY_STREAM, BufferedDocument, PostponedDocument, StreamState
from megachat.data.shards import Shard, footers_digest, shards_fingerprint
from megachat.data.tokenizer import Tokenizer
from megachat.errors import UserError, raise_if_unreadable
from megachat.files import write_atomically, write_json

HEADER_FILE = "loader.json"
_COUNTERS = ("next_document", "next_sequence", "rows", "read_tokens", "cropped_tokens")
_SKIPPED_TEXTS = "skipped_texts"
_ARRAYS = ("counters", "ledger", "sequence", "documents", "lengths", "tokens")
_MINIMA = {"step": 0, "rows": 1, "streams": 1, "row_tokens": 2}  # header keys that are counted with, and their least
# Header keys that must not change, because the rows depend on them; and what the user changes to restore them.
_SAME = {
    "split": "split",
    "row_tokens": "tokens per row",
    "rows": "rows per step",
    "streams": "packing streams (data.streams)",
    "buffer_documents": "documents in a buffer (data.buffer_documents)",
    "seed": "data seed (data.shuffle, run.seed)",
    "tokenizer": "tokenizer (SHA-256)",
    "data": "training shards (SHA-256 of names, sizes and document counts)",
    "texts": "texts in shards of the same names and sizes (SHA-256 of the files' footers)",
}


def stream_to_arrays(state: StreamState, dtype: np.dtype) -> dict[str, np.ndarray]:
    """Converts a stream's state to arrays: counters int64 [5], ledger uint8 [32], and the n documents in its buffer.
    If texts were skipped, also their number: int64 [].

    The documents are sequence, documents (numbers) and lengths, int64 [n], in the order in which they were read, and
    their kept tokens, concatenated.
    """
    documents = state.buffer.values()
    skipped = {_SKIPPED_TEXTS: np.array(state.skipped_texts, np.int64)} if state.skipped_texts else {}
    return skipped | {
        "counters": np.array([getattr(state, name) for name in _COUNTERS], dtype=np.int64),
        "ledger": np.frombuffer(state.ledger, dtype=np.uint8),
        "sequence": np.array(list(state.buffer), dtype=np.int64),
        "documents": np.array([document.number for document in documents], dtype=np.int64),
        "lengths": np.array([document.length for document in documents], dtype=np.int64),
        "tokens": np.concatenate([np.empty(0, dtype), *(document.tokens for document in documents)]),
    }


def stream_from_arrays(arrays: dict[str, np.ndarray], row_tokens: int) -> StreamState:
    """Inverts `stream_to_arrays`. Raises ValueError if the arrays do not fit together."""
    for name in ("counters", "sequence", "documents", "lengths"):
        if arrays[name].dtype != np.int64 or arrays[name].ndim != 1 or (arrays[name] < 0).any():
            raise ValueError(f"{name} is no list of counts")
    ids, ledger = arrays["tokens"], arrays["ledger"]
    if ids.dtype not in (np.uint16, np.uint32) or ids.ndim != 1 or ledger.dtype != np.uint8 or ledger.size != 32:
        raise ValueError("tokens or ledger are of another kind")
    if (np.diff(arrays["sequence"]) <= 0).any():
        raise ValueError("a document is there twice, or out of order")
    kept = np.minimum(arrays["lengths"], row_tokens)
    if len(arrays["tokens"]) != kept.sum() or not len(arrays["sequence"]) == len(arrays["documents"]) == len(kept):
        raise ValueError("documents and tokens do not fit together")
    tokens = np.split(arrays["tokens"], np.cumsum(kept)[:-1]) if len(kept) else []
    columns = (arrays[name].tolist() for name in ("sequence", "documents", "lengths"))
    buffer: dict[int, BufferedDocument | PostponedDocument] = {
        sequence: BufferedDocument(number, length, kept_tokens)
        for sequence, number, length, kept_tokens in zip(*columns, tokens, strict=True)
    }
    counters = dict(zip(_COUNTERS, arrays["counters"].tolist(), strict=True))
    skipped = int(arrays.get(_SKIPPED_TEXTS, 0))
    return StreamState(**counters, ledger=arrays["ledger"].tobytes(), buffer=buffer, skipped_texts=skipped)


def loader_settings(shards: list[Shard], tokenizer: Tokenizer, order: dict) -> dict:
    """Returns everything that a loader's rows depend on, for its header.

    order: the loader's split, row_tokens, rows, streams, buffer_documents and seed.
    """
    data = {"data": shards_fingerprint(shards), "texts": footers_digest(shards)}
    return {**order, "tokenizer": tokenizer.fingerprint, **data}


def require_same_settings(header: dict, current: dict) -> None:
    """Raises UserError, with both values, if a saved header has other settings, another tokenizer or other data."""
    for key, name in _SAME.items():
        if key == "texts" and key not in header:  # early checkpoints do not have it
            continue
        if header.get(key) != current[key]:
            saved, new = (value[:12] if isinstance(value, str) else value for value in (header.get(key), current[key]))
            raise UserError(
                f"the checkpoint's loader state has {name} {saved} but this run has {new}: "
                "restore the checkpoint's value or start a new run"
            )


def combined_ledger(streams: dict[int, bytes | str]) -> str:
    """Returns the SHA-256 (hex) over the ledgers (bytes or hex) of all streams, in the order of their numbers."""
    digests = (ledger if isinstance(ledger, bytes) else bytes.fromhex(ledger) for _, ledger in sorted(streams.items()))
    return hashlib.sha256(b"".join(digests)).hexdigest()


def restarted_state(run_step: int, ledger: str | None, header: dict | None) -> dict:
    """Returns a state in which all streams restart with the first document; it and the new ledger record the restart.

    run_step: steps that the run has done. ledger: combined, of the documents before, None if unknown. header: of the
    loader state that cannot be continued, None if there is none.
    """
    restarts = [*(header or {}).get("restarts", []), {"step": run_step, "ledger": ledger}]
    return {"header": {"step": 0, "restarts": restarts}, "streams": None}


def initial_stream_state(restarts: list[dict]) -> StreamState:
    """Returns the state of a stream before its first row. Its ledger starts with the restarts' steps and ledgers."""
    if not restarts:
        return EMPTY_STREAM
    return replace(EMPTY_STREAM, ledger=hashlib.sha256(json.dumps(restarts, sort_keys=True).encode()).digest())


def step_of_run(header: dict) -> int:
    """Returns the run's step of a saved loader state; the header counts steps since the documents were restarted, and
    those whose rows were left out.
    """
    trained = header["step"] - sum(step < header["step"] for step in header.get("left_out", []))
    return trained + sum(restart["step"] for restart in header.get("restarts", [])[-1:])


def save_loader_state(folder: str | Path, state: dict, streams: Iterable[int]) -> None:
    """Writes `stream_00003.npz` for each of `streams`, and loader.json if stream 0 is among them.

    state: from `Loader.state()`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for stream in streams:
        content = io.BytesIO()
        np.savez(content, allow_pickle=False, **state["streams"][stream])
        write_atomically(_stream_path(folder, stream), content.getvalue())
        if stream == 0:
            write_json(folder / HEADER_FILE, state["header"])


def load_header(folder: str | Path) -> dict:
    """Reads loader.json. Raises UserError if it is missing or damaged, UnreadableError if the storage fails."""
    path = Path(folder) / HEADER_FILE
    with _errors_to_user(path):
        header = json.loads(path.read_text(encoding="utf-8"))
        optional = {"documents": 1} if "documents" in header else {}
        counts = [(header[key], least) for key, least in (_MINIMA | optional).items()]
        counts += [(restart["step"], 0) for restart in header.get("restarts", [])]
        counts += [(step, 0) for step in header.get("left_out", [])]
        if not all(type(value) is int and value >= least for value, least in counts):
            raise ValueError("a count is no integer or too small")
        return header


def load_loader_state(folder: str | Path, streams: Iterable[int]) -> dict:
    """Reads the state of the given streams, whichever ranks saved them.

    Raises UserError if a file is missing, damaged, or of another step or stream, UnreadableError if the storage
    fails.
    """
    folder = Path(folder)
    header, loaded = load_header(folder), {}
    count = header["streams"]
    for stream in streams:
        path = _stream_path(folder, stream)
        with _errors_to_user(path):
            if not 0 <= stream < count:
                raise UserError(
                    f"{folder} has {count} packing streams, not stream {stream}: set data.streams to {count}"
                )
            with np.load(path, allow_pickle=False) as file:
                arrays = loaded[stream] = {name: file[name] for name in _ARRAYS}
                if _SKIPPED_TEXTS in file:
                    arrays[_SKIPPED_TEXTS] = file[_SKIPPED_TEXTS]
            if "documents" in header and (arrays["documents"] % header["documents"] % count != stream).any():
                raise UserError(
                    f"{path} is of another stream or run: it has documents that do not belong to stream {stream}; "
                    "load another checkpoint"
                )
            rows = len(range(stream, header["step"] * header["rows"], count))
            if stream_from_arrays(arrays, header["row_tokens"]).rows != rows:
                raise UserError(
                    f"{path} is not of step {header['step']}, which {HEADER_FILE} has: load another checkpoint"
                )
    return {"header": header, "streams": loaded}


@contextlib.contextmanager
def _errors_to_user(path: Path) -> Iterator[None]:
    """Raises errors from reading a file of the loader's state as UserError."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"the loader state {path} is missing: load another checkpoint") from None
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise_if_unreadable(path, error)
        raise UserError(
            f"the loader state {path} is damaged ({type(error).__name__}): load another checkpoint"
        ) from None


def _stream_path(folder: Path, stream: int) -> Path:
    return folder / f"stream_{stream:05d}.npz"
