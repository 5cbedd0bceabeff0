"""Saving and loading named tensors as rectangles, with torch.distributed.checkpoint and a JSON index.

Every rank saves the rectangles that it stores. A loading rank reads the rectangles that it needs, however the file was
cut. Nothing that is read from a checkpoint is executed: the index is JSON instead of torch's pickle, and tensors are
read with weights_only.
"""

import contextlib
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from megachat.checkpoint.index import INDEX_NAME, read_index
from megachat.device import DTYPES, dtype_name
from megachat.errors import UserError, raise_if_unreadable, summary
from megachat.files import write_json
from megachat.parallel.collectives import FailedOnRank
from megachat.parallel.mesh import Axis
from megachat.parallel.rectangles import Rectangle, RectanglesByName


def save_rectangles(folder: Path, tensors: RectanglesByName, world: Axis) -> None:
    """Writes every rank's rectangles; all ranks of `world` call it, and no element is on two ranks.

    Raises FailedOnRank, the same on every rank, on any failure.
    """
    try:
        with torch.no_grad(), _without_group_warning(), _without_crc32():
            dcp.save(
                {name: _WholeTensor(shape, rectangles) for name, (shape, rectangles) in tensors.items()},
                storage_writer=_Writer(folder),
                process_group=world.group if world.size > 1 else None,
                no_dist=world.size == 1,
            )
    except CheckpointException as error:  # no Exception; it has one error per failed rank
        rank, (cause, _) = min(error.failures.items(), key=lambda failure: failure[0])
        raise FailedOnRank(rank, cause) from error


def load_checkpoint(checkpoint: Path, tensors: RectanglesByName) -> None:
    """Fills this rank's rectangles from the checkpoint, in place.

    All ranks call it, or one process without a process group. Raises UserError when the checkpoint has no tensor of
    that name and shape, does not hold every element of it once, or cannot be read.
    """
    index = read_index(checkpoint)
    saved = {name: tuple(entry["shape"]) for name, entry in index.items()}
    for name, (shape, _) in tensors.items():
        if name not in saved:
            raise UserError(
                f"{checkpoint} has no tensor {name}: it was made by another model; use the config it was made with"
            )
        if saved[name] != tuple(shape):
            raise UserError(
                f"{checkpoint} has {name} with shape {list(saved[name])}, but the model has {list(shape)}: "
                "use the config it was made with"
            )
    try:
        with torch.no_grad(), _without_group_warning():
            dcp.load(
                {name: _WholeTensor(shape, rectangles) for name, (shape, rectangles) in tensors.items()},
                storage_reader=_Reader(checkpoint, index),
            )
    except CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        raise_if_unreadable(getattr(cause, "filename", None) or checkpoint, cause)
        raise UserError(
            f"{checkpoint} could not be read on rank {rank}: {summary(cause)}; use another step's checkpoint"
        ) from error


class _WholeTensor(torch.Tensor):
    """A named tensor of which this rank stores some rectangles (torch.distributed.checkpoint's _Checkpointable)."""

    rectangles: list[Rectangle]

    @staticmethod
    def __new__(cls, shape: tuple[int, ...], rectangles: list[Rectangle]) -> "_WholeTensor":
        dtype = rectangles[0][2].dtype if rectangles else torch.float32
        whole = torch.Tensor._make_wrapper_subclass(cls, torch.Size(shape), dtype=dtype, device=torch.device("cpu"))
        whole.rectangles = rectangles
        return whole

    def __init__(self, shape: tuple[int, ...], rectangles: list[Rectangle]):
        pass

    @classmethod
    def __torch_dispatch__(cls, *args, **kwargs):
        raise TypeError(f"{args[0]} was called on rectangles, which can only be saved and loaded")

    def __create_write_items__(self, name: str, _: object) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(name, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, TensorProperties(dtype=view.dtype), self.shape),
            )
            for chunk, (_, _, view) in zip(self.__create_chunk_list__(), self.rectangles, strict=True)
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes, _ in self.rectangles]

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        return next(view for offsets, _, view in self.rectangles if tuple(offsets) == tuple(index.offset or ()))


class _Writer(dcp.FileSystemWriter):
    """Writes each rank's tensors as torch does, and the index as JSON."""

    def write_data(self, plan, planner):
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            # torch reports that its file has the wrong length, which hides the cause: look for the OSError behind it.
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__context__
            raise cause or error from None

    def finish(self, metadata, results):
        locations = {result.index: result.storage_data for rank_results in results for result in rank_results}
        index = {}
        for name, entry in metadata.state_dict_metadata.items():
            count, pieces = math.prod(entry.size), []
            saved = sum(math.prod(chunk.sizes) for chunk in entry.chunks)
            if saved != count:  # torch refuses overlaps, but would load a tensor with holes
                raise ValueError(f"the ranks store {saved} of the {count} elements of {name}")
            for chunk in entry.chunks:
                location = locations[MetadataIndex(name, chunk.offsets)]
                pieces.append(
                    {
                        "offset": list(chunk.offsets),
                        "size": list(chunk.sizes),
                        "file": location.relative_path,
                        "at": location.offset,
                        "bytes": location.length,
                    }
                )
            dtype = dtype_name(entry.properties.dtype)
            index[name] = {"shape": list(entry.size), "dtype": dtype, "pieces": pieces}
        write_json(Path(self.path) / INDEX_NAME, index)


class _Reader(dcp.FileSystemReader):
    """Reads what _Writer wrote. index: from `read_index`."""

    def __init__(self, folder: Path, index: dict[str, dict]):
        super().__init__(folder)
        self._index = index

    def read_metadata(self, *args, **kwargs):
        tensors: dict[str, Any] = {}
        locations = {}
        for name, entry in self._index.items():
            chunks = []
            for piece in entry["pieces"]:
                chunks.append(ChunkStorageMetadata(torch.Size(piece["offset"]), torch.Size(piece["size"])))
                locations[MetadataIndex(name, piece["offset"])] = _StorageInfo(
                    piece["file"], piece["at"], piece["bytes"]
                )
            properties = TensorProperties(dtype=DTYPES[entry["dtype"]])
            tensors[name] = TensorStorageMetadata(properties, torch.Size(entry["shape"]), chunks)
        return Metadata(tensors, storage_data=locations, storage_meta=StorageMeta(load_id=self.load_id))


@contextlib.contextmanager
def _without_crc32() -> Iterator[None]:
    """Leaves out the CRC-32 of each tensor, which takes a third of torch.save's time. torch.load does not need it,
    and checkpoint.json has a SHA-256 of each file.
    """
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


@contextlib.contextmanager
def _without_group_warning() -> Iterator[None]:
    """Suppresses torch's warning about a process without a process group, which a tool does not need."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
