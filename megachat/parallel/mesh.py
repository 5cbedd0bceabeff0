"""The mesh: which processes form the data, tensor and pipeline axes. The only place where process groups are made."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from megachat.parallel.progress import Progress


@dataclass(frozen=True)
class Axis:
    """One axis of the mesh, as seen by this process.

    name: "data", "tensor", "pipeline", "stage" or "world". size: processes along it. rank: this process's place, 0 .. size - 1.
    group: the torch process group (always there, also at size 1). ranks: the world ranks along it, in order.
    progress: where collectives along it are written down; all axes of one mesh share it.
    """

    name: str
    size: int
    rank: int
    group: Any
    ranks: tuple[int, ...]
    progress: Progress = field(default_factory=Progress, compare=False, repr=False)


@dataclass(frozen=True)
class Mesh:
    """The axes and the device of this process; built once and passed along.

    stage: the data x tensor grid of this process's pipeline stage; its place there is data.rank * tensor.size + tensor.rank.
    saving: all processes once more, with a gloo group and a progress of its own, for what threads do beside the training.
    """

    world: Axis
    data: Axis
    tensor: Axis
    pipeline: Axis
    stage: Axis
    saving: Axis
    device: torch.device
    topology: Any  # DeepSpeed's ProcessTopology, for PipelineModule


def build_mesh(device: torch.device, *, tensor: int = 1, pipeline: int = 1) -> Mesh:
    """Cut the running world into axes; the data axis takes what tensor and pipeline leave.

    Ranks are numbered as DeepSpeed's PipeModelDataParallelTopology numbers them: pipeline slowest, then data, tensor fastest.
    Needs torch.distributed to be initialised; every process of the world must call it. Raises ValueError when the product does not
    divide the world (the Plan refuses that earlier, in a user's words).
    """
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

    world = dist.get_world_size()
    if world % (tensor * pipeline):
        raise ValueError(f"tensor {tensor} x pipeline {pipeline} does not divide a world of {world}")
    topology = PipeModelDataParallelTopology(num_pp=pipeline, num_mp=tensor, num_dp=world // (tensor * pipeline))
    axes, progress = {}, Progress()
    lists = {
        name: topology.get_axis_comm_lists(axis)
        for name, axis in (("data", "data"), ("tensor", "model"), ("pipeline", "pipe"))
    }
    lists["stage"] = [topology.get_axis_list("pipe", stage) for stage in range(pipeline)]
    for name, groups in lists.items():
        for ranks in groups or [[rank] for rank in range(world)]:
            group = dist.new_group(ranks)  # every process takes part in making every group, its own or not
            if dist.get_rank() in ranks:
                axes[name] = Axis(name, len(ranks), ranks.index(dist.get_rank()), group, tuple(ranks), progress)
    everyone = Axis("world", world, dist.get_rank(), dist.group.WORLD, tuple(range(world)), progress)
    aside = dataclasses.replace(everyone, name="saving", group=dist.new_group(backend="gloo"), progress=Progress())
    return Mesh(world=everyone, saving=aside, device=device, topology=topology, **axes)
