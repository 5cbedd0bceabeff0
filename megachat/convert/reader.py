"""A checkpoint of any format, opened for reading. Tensors have megachat's names and are read a few at a time."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from megachat.device import DTYPES
from megachat.files import refuse_damaged
from megachat.planning.dimensions import Dimensions, saved_dimensions

SHARD_BYTES = 2 << 30  # most in one file that is written for other programs
BATCH_BYTES = 256 << 20  # tensors are read in batches of this size, because each read has a fixed cost


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a tensor before it is read. dtype: a name in DTYPES."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def elements(self) -> int:
        """Returns the product of the shape."""
        return torch.Size(self.shape).numel()

    @property
    def bytes(self) -> int:
        """Returns the size in memory."""
        return self.elements * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class CheckpointReader:
    """A checkpoint whose tensors can be read by name.

    format: "megachat", "nanochat", "safetensors" or "huggingface". facts: the content of checkpoint.json, as far as the
    format has it. entries: every tensor by name. read: returns whole tensors by name. files: relative paths of the
    files that `folder` consists of. tokenizer_folders: where the format keeps the tokenizer, in order of preference.
    """

    format: str
    folder: Path
    facts: dict
    entries: Mapping[str, TensorInfo]
    read: Callable[[list[str]], dict[str, torch.Tensor]]
    files: tuple[str, ...]
    tokenizer_folders: tuple[Path, ...] = ()
    remarks: tuple[str, ...] = ()

    @property
    def dims(self) -> Dimensions:
        """Returns the model's sizes. Raises UserError for keys or values that this version does not know."""
        return saved_dimensions(self.facts.get("model") or {})

    @property
    def has_optimizer(self) -> bool:
        """True if there is any optimizer state among the tensors."""
        return any(not name.startswith("model/") for name in self.entries)

    def batches(self, names: Iterable[str], max_bytes: int) -> list[list[str]]:
        """Splits the names, in their order, into lists of at most `max_bytes` of tensors, or of one tensor."""
        batches: list[list[str]] = []
        filled = 0
        for name in names:
            if not batches or filled + self.entries[name].bytes > max_bytes:
                batches.append([])
                filled = 0
            batches[-1].append(name)
            filled += self.entries[name].bytes
        return batches

    def tensors(self, names: Iterable[str] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields (name, whole tensor) for all tensors, or for those named, with BATCH_BYTES in memory at a time."""
        for batch in self.batches(self.entries if names is None else names, BATCH_BYTES):
            yield from self.read(batch).items()

    def select(
        self, names: Iterable[str], change: Callable | None = None, facts: dict | None = None
    ) -> "CheckpointReader":
        """Returns a reader of these tensors, each replaced by change(name, tensor) if given, and of other facts."""

        def read(requested: list[str]) -> dict[str, torch.Tensor]:
            tensors = self.read(requested)
            return {name: change(name, tensor) for name, tensor in tensors.items()} if change else tensors

        entries = {name: self.entries[name] for name in names}
        return replace(self, entries=entries, read=read, facts=self.facts if facts is None else facts)


def load_arrays(path: Path) -> dict[str, np.ndarray]:
    """Returns the arrays of an .npz file. Raises UserError if it is damaged."""
    with refuse_damaged(path, "is damaged ({}): use another checkpoint"), np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}
