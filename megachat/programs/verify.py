"""Does a layout compute what one process computes? Losses, every gradient, every weight after two steps, in float32, tensor by tensor.

Each run writes its gradients and weights as named rectangles, as a checkpoint does; the comparison reads whole tensors, so it does not care
how they were cut.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from megachat.checkpoint.load import load_checkpoint
from megachat.checkpoint.storage import read_index, save_rectangles
from megachat.config import Config
from megachat.errors import UserError
from megachat.files import write_json
from megachat.job.join import start_mesh
from megachat.model.gpt import ModelOptions, build_layers
from megachat.model.parameters import placed_parameters, starting_value
from megachat.parallel.rectangles import flat_rectangles
from megachat.place import Place, place_of
from megachat.planning.dimensions import Dimensions, up_to_multiple
from megachat.planning.plan import resolve
from megachat.train.build import Training, build_training
from megachat.train.state import state_pieces
from megachat.train.step import set_schedules, update

STEPS = 2
HEAD_MULTIPLE = 16  # channels a head of a model scaled down
LOSS_TOLERANCE = 1e-6  # relative
TENSOR_TOLERANCE = 1e-5  # relative to the tensor's scale: its largest element
LEAST_SCALE = (
    1e-3  # of the largest of all elements of its kind: a gradient that is zero but for rounding has no scale of its own
)
SCALAR_GRADIENT_TOLERANCE = 1e-3  # it is a sum over all tokens and channels that nearly cancels
SCALAR_LEAST_SCALE = (
    10  # times that of others: with few blocks backout_lambda's gradient is zero, and this sum's rounding all there is
)
# Where a gradient is rounding noise around zero, the sign of AdamW's whole step (its epsilon is 1e-10) and the mask of Muon's cautious decay
# are that noise's sign: this share of a weight's elements may lie outside the tolerance.
FLIPPED_SHARE = 2e-3
NOISE = 0.05


@dataclass(frozen=True)
class Difference:
    """One tensor, or the loss, of one step compared. error: largest difference over the tensor's scale; outside: share of elements beyond
    the tolerance."""

    name: str
    error: float
    outside: float
    tolerance: float
    passed: bool


def verification_config(
    config: Config, *, data: int, tensor: int, pipeline: int, depth: int | None, rows_a_rank: int
) -> Config:
    """The config to run on the layout: float32, micro-batches of one row (their shape is the same on every layout), short horizon.

    Another depth scales the model with its numbers of heads kept, so that every tensor axis of the config's own model fits.
    """
    sections = config.model_dump(mode="json")
    if depth and depth != config.model.depth:
        model = config.model
        heads = -(-model.depth * model.aspect_ratio // model.head_size)
        scaled = depth * model.aspect_ratio // heads // HEAD_MULTIPLE * HEAD_MULTIPLE
        head_size = max(
            scaled, up_to_multiple(depth, HEAD_MULTIPLE)
        )  # at least the blocks' number: aspect_ratio times depth rounds up to the width
        sections["model"] |= {"depth": depth, "head_size": head_size, "aspect_ratio": heads * head_size // depth}
    sections["precision"] |= {"compute": "float32", "compile": False, "fp8": "off", "attention": "auto"}
    sections["parallel"] |= {"tensor": tensor, "pipeline": pipeline}
    if tensor == 1:
        sections["parallel"]["sequence"] = False
    sections["batch"] = {"tokens": None, "micro_rows": 1, "accumulation": rows_a_rank}
    sections["horizon"] = {"steps": 20 * STEPS}
    return Config.model_validate_json(json.dumps(sections))


def warm_up(training: Training) -> None:
    """Add noise to every matrix and table, keyed by name. nanochat's zero starting matrices give nearly singular first gradients, whose
    orthogonalization magnifies rounding, in one process too."""
    with torch.no_grad():
        for name, (whole, rectangles) in state_pieces(training).items():
            if name.startswith("model/") and len(whole) == 2:
                noise = warm_noise(name.removeprefix("model/"), whole) if rectangles else None
                for offsets, sizes, view in rectangles:
                    view += noise[tuple(slice(first, first + size) for first, size in zip(offsets, sizes, strict=True))]
    training.engine.adamw.refresh_weights()
    training.muon.refresh_weights()


def warm_noise(name: str, whole: tuple[int, ...]) -> torch.Tensor:
    """The noise of one whole tensor, float32."""
    return NOISE * starting_value(Place(name, whole, 0, ("normal", 1.0)), seed=5)


def gradient_pieces(training: Training) -> dict:
    """Copies of this rank's part of the step's mean gradients as named rectangles; for `inspect_gradients` of train.step.update. Each element is there once over
    all ranks."""
    pieces: dict[str, tuple] = {}
    for name, whole, rectangles in training.muon.gradient_shards():
        pieces[name] = (tuple(whole), [(offsets, sizes, view.clone()) for offsets, sizes, view in rectangles])
    for parameter, begin, flat in training.engine.adamw.gradient_fragments():
        where = place_of(parameter)
        if where.cut != "whole" or training.mesh.tensor.rank == 0:
            rectangles = flat_rectangles(tuple(parameter.shape), flat.clone(), begin, where.offset or None)
            pieces.setdefault(where.name, (where.whole, []))[1].extend(rectangles)
    return pieces


def observe(config: Config, vocab_size: int, device: torch.device, folder: Path) -> None:
    """Take STEPS steps on the ranks that the launch variables name, and write what was computed into `folder`; all ranks call it."""
    mesh = start_mesh(config, device)
    plan = resolve(config, mesh.world.size, vocab_size)
    training = build_training(config, plan, mesh, torch.ones(vocab_size, dtype=torch.int64))
    warm_up(training)
    pieces, losses = {}, []

    def note_gradients() -> (
        None
    ):  # of the first step; those of later ones belong to weights that may differ by their flips
        pieces.update({f"gradient/{name}": piece for name, piece in gradient_pieces(training).items()})

    for step in range(STEPS):
        set_schedules(training, step)
        rows = related_rows(step, plan.rows_per_step, plan.dims.sequence_len + 1, vocab_size)[
            mesh.data.rank :: mesh.data.size
        ]
        loss, _ = update(training, rows, inspect_gradients=note_gradients if step == 0 else None)
        losses.append(loss.item())
    pieces.update(
        {
            f"weight/{name[6:]}": piece
            for name, piece in state_pieces(training, replicas=False).items()
            if name.startswith("model/")
        }
    )
    save_rectangles(folder, pieces, mesh.world)
    if mesh.world.rank == 0:
        write_json(folder / "losses.json", losses)


def parameter_order(dims: Dimensions) -> list[str]:
    """Names from the first layer to the last; the per-layer scalars where their first layer is."""
    with torch.device("meta"):
        parameters = placed_parameters(build_layers(dims, ModelOptions()))
    return list(dict.fromkeys(place_of(parameter).name for parameter in parameters))


def related_rows(step: int, rows: int, tokens: int, vocab_size: int) -> torch.Tensor:
    """[rows, tokens] int64 that depend on the step alone; neighbours are related, so that there is something to learn."""
    generator = torch.Generator().manual_seed(1000 + step)
    steps = torch.randint(0, 5, (rows, tokens), generator=generator)
    return (torch.randint(0, vocab_size, (rows, 1), generator=generator) + steps.cumsum(1)) % vocab_size


def compare(found: Path, wanted: Path, order: list[str]) -> Iterator[Difference]:
    """Every loss, gradient and weight of two observed runs, in the order in which training makes them. order: the parameters' names from the
    first layer to the last.

    Raises UserError when the runs do not hold the same tensors.
    """
    losses = [json.loads((folder / "losses.json").read_text()) for folder in (found, wanted)]
    indices = [read_index(folder) for folder in (found, wanted)]
    kinds = {"gradient": 0.0, "weight": FLIPPED_SHARE}
    names = {f"{kind}/{name}" for kind in kinds for name in order}
    for missing in sorted((indices[0].keys() ^ names) | (indices[1].keys() ^ names)):
        raise UserError(f"the two runs do not hold the same tensors: {missing} is not in both")
    loss_differences = [_loss_compared(step, *pair) for step, pair in enumerate(zip(*losses, strict=True))]
    yield loss_differences[0]
    for kind, share in kinds.items():
        shapes = {name: tuple(indices[1][f"{kind}/{name}"]["shape"]) for name in order}
        largest = max(_whole(wanted, f"{kind}/{name}", shape).abs().max().item() for name, shape in shapes.items())
        for name, shape in shapes.items():
            tensors = (_whole(folder, f"{kind}/{name}", shape) for folder in (found, wanted))
            yield compared(f"{kind}/{name}", *tensors, least_scale=LEAST_SCALE * largest, share=share)
        if kind == "gradient":
            yield from loss_differences[1:]


def _loss_compared(step: int, found: float, wanted: float) -> Difference:
    error = abs(found - wanted) / abs(wanted)
    passed = error <= LOSS_TOLERANCE  # false for a loss that is no number
    return Difference(f"loss/step {step}", error, float(not passed), LOSS_TOLERANCE, passed)


def _whole(folder: Path, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    whole = torch.full(shape, torch.nan)
    load_checkpoint(folder, {name: (shape, [((0,) * len(shape), shape, whole)])})
    return whole


def compared(
    name: str,
    found: torch.Tensor,
    wanted: torch.Tensor,
    *,
    least_scale: float,
    share: float,
    tolerance: float = TENSOR_TOLERANCE,
) -> Difference:
    """Two tensors of one name. least_scale: below which the tensor's largest element is none to measure by. share: of elements that may lie
    outside the tolerance, one at least; 0: none."""
    if found.ndim == 1 and not share:
        tolerance, least_scale = SCALAR_GRADIENT_TOLERANCE, SCALAR_LEAST_SCALE * least_scale
    error = (found - wanted).abs() / wanted.abs().max().clamp_min(max(least_scale, 1e-12))
    error = torch.where(error.isnan(), torch.inf, error)
    outside = int((error > tolerance).sum())
    allowed = max(1, int(share * error.numel())) if share else 0
    return Difference(name, error.max().item(), outside / error.numel(), tolerance, outside <= allowed)


def certificate(differences: list[Difference], **facts) -> dict:
    """JSON values: the verdict, the first difference, and every tensor with its error."""
    first = next((difference for difference in differences if not difference.passed), None)
    told = {"passed": first is None, "first_difference": first and asdict(first), "flipped_share": FLIPPED_SHARE}
    return facts | told | {"compared": [asdict(difference) for difference in differences]}
