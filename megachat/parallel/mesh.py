"""The mesh: the processes of the data, tensor and pipeline axes. Process groups are created here only."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from megachat.parallel.progress import Progress


@dataclass(frozen=True)
class Axis:
    """One axis of the mesh, as seen by this process.

    name: "data", "tensor", "pipeline", "stage", "world" or "saving". size: processes along it. rank: this process's
    index, 0 .. size - 1. group: the torch process group, which exists at size 1 too. ranks: the world ranks along it,
    in order. progress: the record of collectives; all axes of one mesh share it.
    """

    name: str
    size: int
    rank: int
    group: Any
    ranks: tuple[int, ...]
    progress: Progress = field(default_factory=Progress, compare=False, repr=False)


@dataclass(frozen=True)
class Mesh:
    """The axes and the device of this process, built once and passed along.

    stage: the data x tensor grid of this process's pipeline stage, where its rank is data.rank * tensor.size +
    tensor.rank. saving: all processes again, with a gloo group and a separate progress, for background threads.
    """

    world: Axis
    data: Axis
    tensor: Axis
    pipeline: Axis
    stage: Axis
    saving: Axis
    device: torch.device
    topology: Any  # DeepSpeed's ProcessTopology, for PipelineModule


def local_mesh(device: torch.device) -> Mesh:
    """Returns the mesh of one process, for evaluations without torch.distributed."""
    names = ("world", "data", "tensor", "pipeline", "stage", "saving")
    axes = {name: Axis(name, 1, 0, None, (0,)) for name in names}
    return Mesh(device=device, topology=None, **axes)


def build_mesh(device: torch.device, *, tensor: int = 1, pipeline: int = 1) -> Mesh:
    """Cuts the running world into axes; the data axis gets what tensor and pipeline leave.

    Ranks are numbered as by DeepSpeed's PipeModelDataParallelTopology: pipeline slowest, then data, tensor fastest.
    Every process of an initialized torch.distributed must call it. Raises ValueError if the product does not divide the
    world (the Plan refuses that earlier).
    """
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

    world = dist.get_world_size()
    if world % (tensor * pipeline):
        raise ValueError(f"tensor {tensor} x pipeline {pipeline} does not divide a world of {world}")
    topology = PipeModelDataParallelTopology(num_pp=pipeline, num_mp=tensor, num_dp=world // (tensor * pipeline))
    axes, progress = {}, Progress(cuda=device.type == "cuda")
    names = {"data": "data", "tensor": "model", "pipeline": "pipe"}  # ours -> DeepSpeed's
    groups = {name: topology.get_axis_comm_lists(theirs) for name, theirs in names.items()}
    groups["stage"] = [topology.get_axis_list("pipe", stage) for stage in range(pipeline)]
    for name, lists in groups.items():
        for ranks in lists or [[rank] for rank in range(world)]:
            group = dist.new_group(ranks)  # every process must take part in creating every group
            if dist.get_rank() in ranks:
                axes[name] = Axis(name, len(ranks), ranks.index(dist.get_rank()), group, tuple(ranks), progress)
    everyone = Axis("world", world, dist.get_rank(), dist.group.WORLD, tuple(range(world)), progress)
    saving = dataclasses.replace(everyone, name="saving", group=dist.new_group(backend="gloo"), progress=Progress())
    return Mesh(world=everyone, saving=saving, device=device, topology=topology, **axes)
