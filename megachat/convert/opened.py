"""A checkpoint of any format, opened for reading: its facts, and its tensors by megachat's names, a few in memory at a time."""

import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from megachat.checkpoint.facts import read_facts
from megachat.checkpoint.load import load_checkpoint
from megachat.checkpoint.resume import newest_complete
from megachat.checkpoint.storage import read_index
from megachat.errors import UserError

BATCH_BYTES = 256 << 20  # of tensors read at once: reading has a cost of its own each time


@dataclass(frozen=True)
class Entry:
    """What is known of a tensor before it is read. dtype: torch's name without "torch."."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def elements(self) -> int:
        """Product of the shape."""
        return torch.Size(self.shape).numel()

    @property
    def bytes(self) -> int:
        """Size in memory."""
        return self.elements * getattr(torch, self.dtype).itemsize


@dataclass(frozen=True)
class Opened:
    """form: "megachat", "nanochat", "safetensors" or "huggingface". facts: as in checkpoint.json, as far as the format has them.
    read: whole tensors of the names given, by name. files: what it consists of, in `folder`."""

    form: str
    folder: Path
    facts: dict
    entries: Mapping[str, Entry]
    read: Callable[[list[str]], dict[str, torch.Tensor]]
    files: tuple[str, ...]
    remarks: tuple[str, ...] = field(default=())

    def tensors(self, names: Iterable[str] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, whole tensor) one after the other, all of them or those named, BATCH_BYTES in memory at a time."""
        batch: list[str] = []
        for name in self.entries if names is None else names:
            if batch and sum(self.entries[other].bytes for other in (*batch, name)) > BATCH_BYTES:
                yield from self.read(batch).items()
                batch = []
            batch.append(name)
        if batch:
            yield from self.read(batch).items()


def open_megachat(step_folder: Path) -> Opened:
    """A complete checkpoint folder. Raises UserError when it is none."""
    facts = read_facts(step_folder)
    try:
        entries = {
            name: Entry(tuple(entry["shape"]), entry["dtype"]) for name, entry in read_index(step_folder).items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{step_folder}: its list of tensors cannot be read ({type(error).__name__}: {error}); give another step's folder"
        ) from None

    def read(names: list[str]) -> dict[str, torch.Tensor]:
        whole = {name: torch.empty(entries[name].shape, dtype=getattr(torch, entries[name].dtype)) for name in names}
        load_checkpoint(
            step_folder, {name: (tuple(t.shape), [((0,) * t.ndim, tuple(t.shape), t)]) for name, t in whole.items()}
        )
        return whole

    return Opened("megachat", step_folder, facts, entries, read, tuple(sorted(facts["files"])))


def step_folder_of(path: Path) -> Path:
    """A step's folder as it is; of a run folder its newest complete checkpoint. Raises UserError when there is none."""
    folder = path / "checkpoints"
    if not folder.is_dir():
        return path
    newest, passed_over = newest_complete(folder)
    if newest is None:
        raise UserError(f"{path} holds no complete checkpoint" + (f": {passed_over[0]}" if passed_over else " yet"))
    return newest


def load_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz file. Raises UserError when it is damaged."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}): take another checkpoint") from None


def files_below(folder: Path) -> tuple[str, ...]:
    """Relative paths of all files, sorted."""
    return tuple(sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()))
