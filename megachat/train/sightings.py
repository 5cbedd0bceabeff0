"""What each rank saw of a step whose loss or gradient is not finite."""

import math
import socket
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from megachat.model.parameters import placed_parameters
from megachat.parallel.collectives import all_gather_objects
from megachat.place import place_of
from megachat.train.build import TrainingModel


@dataclass(frozen=True)
class GradientSighting:
    """A rank's share of the reduced gradients. norm: with the loss scale. parameter: the first one, in the order of the
    backward pass, whose gradient is not finite.
    """

    norm: float
    parameter: str | None


@dataclass(frozen=True)
class RankSighting:
    """What a rank saw. loss: the mean over its rows in nats, None where no loss is computed. weight: the first
    parameter on this rank, in model order, that is not finite.
    """

    rank: int
    host: str
    data: int
    tensor: int
    pipeline: int
    loss: float | None
    gradients: GradientSighting | None
    weight: str | None

    def values(self) -> dict:
        """Returns everything as JSON; numbers that are not finite are texts."""
        gradients = self.gradients or GradientSighting(0.0, None)
        seen = {"loss": self.loss, "gradient_norm": gradients.norm if self.gradients else None}
        shown = {key: value if value is None or math.isfinite(value) else str(value) for key, value in seen.items()}
        place = {key: getattr(self, key) for key in ("rank", "host", "data", "tensor", "pipeline")}
        return place | shown | {"gradient": gradients.parameter, "weight": self.weight}


@torch.no_grad()
def gradient_sighting(training: TrainingModel) -> GradientSighting:
    """Returns what this rank sees of the reduced gradients, before they are discarded; the host waits for it."""
    order = {place_of(each).name: number for number, each in enumerate(placed_parameters(training.layers))}
    named = sorted(_gradients(training), key=lambda pair: order.get(pair[0], -1), reverse=True)
    squares = _read([gradient.float().square().sum() for _, gradient in named])
    bad = (name for (name, _), square in zip(named, squares, strict=True) if not math.isfinite(square))
    return GradientSighting(math.sqrt(sum(squares)), next(bad, None))


def _gradients(training: TrainingModel) -> Iterator[tuple[str, torch.Tensor]]:
    for _, name, _, rectangles in training.muon.gradient_shards():
        for _, _, gradient in rectangles:
            yield name, gradient
    for name, (_, gradient) in training.rows.gradient_rows().items():
        yield name, gradient
    adamw = training.engine.adamw
    for index, share in enumerate(adamw.gradient_shares()):
        for parameter, _, here in adamw.share_slices(index):
            yield place_of(parameter).name, share[here]


def _read(numbers: list[torch.Tensor]) -> list[float]:
    return torch.stack(numbers).tolist() if numbers else []


@torch.no_grad()
def rank_sightings(training: TrainingModel, gradients: GradientSighting | None) -> list[RankSighting]:
    """Returns what every rank saw, in rank order; all ranks call it after the step."""
    mesh, parameters = training.mesh, placed_parameters(training.layers)
    training.muon.wait_for_gather()
    finite = _read([parameter.detach().isfinite().all() for parameter in parameters])
    bad = (place_of(parameter).name for parameter, good in zip(parameters, finite, strict=True) if not good)
    loss = training.engine.local_loss
    local = RankSighting(
        mesh.world.rank,
        socket.gethostname(),
        mesh.data.rank,
        mesh.tensor.rank,
        mesh.pipeline.rank,
        None if loss is None else loss.item(),
        gradients,
        next(bad, None),
    )
    return all_gather_objects(local, mesh.world)
