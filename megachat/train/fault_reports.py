"""What each rank reports of a step whose loss or gradient is not finite."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

from megachat.model.parameters import placed_parameters
from megachat.place import place_of
from megachat.train.build import TrainingModel
from megachat.train.rank_reports import Report, gather_reports


class GradientReport(NamedTuple):
    """What a rank reports of its share of the reduced gradients. norm: with the loss scale. parameter: the first one,
    in the order of the backward pass, whose gradient is not finite.
    """

    norm: float
    parameter: str | None


@torch.no_grad()
def gradient_report(training: TrainingModel) -> GradientReport:
    """Reads this rank's share of the reduced gradients, before they are discarded; the host waits for it."""
    order = {place_of(each).name: number for number, each in enumerate(placed_parameters(training.layers))}
    named = sorted(_gradients(training), key=lambda pair: order.get(pair[0], -1), reverse=True)
    squares = _to_floats([gradient.float().square().sum() for _, gradient in named])
    bad = (name for (name, _), square in zip(named, squares, strict=True) if not math.isfinite(square))
    return GradientReport(math.sqrt(sum(squares)), next(bad, None))


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


def _to_floats(numbers: list[torch.Tensor]) -> list[float]:
    return torch.stack(numbers).tolist() if numbers else []


@torch.no_grad()
def fault_reports(training: TrainingModel, gradients: GradientReport | None) -> list[Report]:
    """Returns every rank's report, in rank order; all ranks call it after the step.

    The keys beside those of gather_reports:
    - loss: the mean over the rank's rows in nats, None where no loss is computed
    - gradient_norm, gradient: norm and parameter of GradientReport, None if they were not read
    - weight: the first parameter on the rank, in model order, that is not finite

    Numbers that are not finite are texts, as in JSON files.
    """
    parameters = placed_parameters(training.layers)
    training.muon.wait_for_gather()
    finite = _to_floats([parameter.detach().isfinite().all() for parameter in parameters])
    bad = (place_of(parameter).name for parameter, good in zip(parameters, finite, strict=True) if not good)
    loss, (norm, gradient) = training.engine.local_loss, gradients or (None, None)
    numbers = {"loss": None if loss is None else loss.item(), "gradient_norm": norm}
    shown = {key: value if value is None or math.isfinite(value) else str(value) for key, value in numbers.items()}
    return gather_reports(training.mesh, **shown, gradient=gradient, weight=next(bad, None))
