"""Tensors as rectangles of named wholes, through torch.distributed.checkpoint, with a JSON index in place of its pickled one.

Every rank offers the rectangles it holds; a loading rank asks for those it needs, however the file was cut. Nothing read from a checkpoint
is executed: the index is JSON and tensors are read with weights_only.
"""

import contextlib
import json
import math
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
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

from megachat.files import write_json
from megachat.parallel.mesh import Axis
from megachat.parallel.rectangles import Rectangle

INDEX_NAME = "tensors.json"

# name -> (whole shape, the rectangles of it that this rank holds)
RectanglesByName = Mapping[str, tuple[tuple[int, ...], list[Rectangle]]]


class _Whole(torch.Tensor):
    """A named tensor of which this rank holds some rectangles, in the form torch.distributed.checkpoint asks for (its _Checkpointable protocol)."""

    @staticmethod
    def __new__(cls, shape, rectangles):
        dtype = rectangles[0][2].dtype if rectangles else torch.float32
        whole = torch.Tensor._make_wrapper_subclass(cls, torch.Size(shape), dtype=dtype, device="cpu")
        whole.rectangles = rectangles
        return whole

    def __init__(self, shape, rectangles):
        pass

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise TypeError(f"{function} was called on rectangles, which can only be saved and loaded")

    def __create_write_items__(self, name, _):
        return [
            WriteItem(
                index=MetadataIndex(name, torch.Size(offsets)),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=torch.Size(sizes)),
                    properties=TensorProperties(dtype=view.dtype),
                    size=self.shape,
                ),
            )
            for offsets, sizes, view in self.rectangles
        ]

    def __create_chunk_list__(self):
        return [
            ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=torch.Size(sizes))
            for offsets, sizes, _ in self.rectangles
        ]

    def __get_tensor_shard__(self, index):
        return next(view for offsets, _, view in self.rectangles if tuple(offsets) == tuple(index.offset))


class _Writer(dcp.FileSystemWriter):
    """Writes each rank's tensors as torch does, and the index as JSON."""

    def write_data(self, plan, planner):
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:  # torch's complaint that its file is not as long as it should be, which hides why
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__context__
            raise cause or error from None

    def finish(self, metadata, results):
        tensors = {
            name: {"shape": list(entry.size), "dtype": str(entry.properties.dtype).removeprefix("torch."), "pieces": []}
            for name, entry in metadata.state_dict_metadata.items()
        }
        places = {result.index: result.storage_data for rank_results in results for result in rank_results}
        for name, entry in metadata.state_dict_metadata.items():
            held = sum(math.prod(chunk.sizes) for chunk in entry.chunks)
            if held != math.prod(entry.size):  # torch refuses overlaps itself, but would load a tensor with holes
                raise ValueError(f"the ranks hold {held} of the {math.prod(entry.size)} elements of {name}")
            for chunk in entry.chunks:
                place = places[MetadataIndex(name, chunk.offsets)]
                piece = {"offset": list(chunk.offsets), "size": list(chunk.sizes)}
                tensors[name]["pieces"].append(
                    piece | {"file": place.relative_path, "at": place.offset, "bytes": place.length}
                )
        write_json(Path(self.path) / INDEX_NAME, tensors)


class _Reader(dcp.FileSystemReader):
    """Reads what _Writer wrote."""

    def read_metadata(self, *args, **kwargs):
        metadata = Metadata(state_dict_metadata={}, storage_data={}, storage_meta=StorageMeta(load_id=self.load_id))
        for name, entry in read_index(Path(self.path)).items():
            chunks = []
            for piece in entry["pieces"]:
                chunks.append(
                    ChunkStorageMetadata(offsets=torch.Size(piece["offset"]), sizes=torch.Size(piece["size"]))
                )
                metadata.storage_data[MetadataIndex(name, piece["offset"])] = _StorageInfo(
                    piece["file"], piece["at"], piece["bytes"]
                )
            properties = TensorProperties(dtype=getattr(torch, entry["dtype"]))
            metadata.state_dict_metadata[name] = TensorStorageMetadata(
                properties=properties, size=torch.Size(entry["shape"]), chunks=chunks
            )
        return metadata


def read_index(folder: Path) -> dict:
    """Name -> shape, dtype and pieces of every tensor in the checkpoint folder."""
    return json.loads((folder / INDEX_NAME).read_text(encoding="utf-8"))


@contextlib.contextmanager
def _alone_on_purpose():
    """Without torch's warning that a process, such as a tool's, belongs to no group."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def save_rectangles(folder: Path, pieces: RectanglesByName, world: Axis) -> None:
    """Write every rank's rectangles; all ranks of `world` call it. Replicas must not be offered twice. Raises torch's CheckpointException on any
    failure."""
    state = {name: _Whole(shape, rectangles) for name, (shape, rectangles) in pieces.items()}
    with torch.no_grad(), _alone_on_purpose():
        dcp.save(
            state,
            storage_writer=_Writer(folder),
            process_group=world.group if world.size > 1 else None,
            no_dist=world.size == 1,
        )


def load_rectangles(folder: Path, pieces: RectanglesByName) -> None:
    """Fill the rectangles' tensors in place; all ranks call it, or one process that has none. Raises torch's CheckpointException naming what is
    missing or of another shape."""
    with torch.no_grad(), _alone_on_purpose():
        dcp.load(
            {name: _Whole(shape, rectangles) for name, (shape, rectangles) in pieces.items()},
            storage_reader=_Reader(folder),
        )
