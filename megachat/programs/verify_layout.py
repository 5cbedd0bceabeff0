"""Compares a layout with one process: losses, every gradient, and every weight after two steps, in float32, tensor by
tensor.

Each run writes its gradients and weights as named rectangles, as a checkpoint does. The comparison reads whole tensors,
so it does not depend on how they were cut.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from megachat.checkpoint.storage import load_checkpoint, read_index, save_rectangles
from megachat.config import Config
from megachat.convert.architecture import weight_shapes
from megachat.convert.megachat import whole_piece
from megachat.errors import UserError
from megachat.files import write_json
from megachat.job.join import start_mesh
from megachat.model.parameters import starting_value
from megachat.parallel.rectangles import flat_rectangles
from megachat.place import Place, place_of
from megachat.planning.dimensions import up_to_multiple
from megachat.planning.plan import resolve
from megachat.train.build import Training, build_training
from megachat.train.state import state_pieces
from megachat.train.step import set_schedules, update

STEPS = 2
HEAD_MULTIPLE = 16  # channels per head of a model that is scaled down
LOSS_TOLERANCE = 1e-6  # relative
TENSOR_TOLERANCE = 1e-5  # relative to the tensor's scale, which is its largest element
# A gradient that is zero but for rounding has no scale; at least this share of the largest element of all gradients (or
# weights) is used.
LEAST_SCALE = 1e-3
# A scalar's gradient is a sum over all tokens and channels that nearly cancels. With few blocks backout_lambda's is
# zero but for this sum's rounding, so that its least scale is ten times that of the others.
SCALAR_GRADIENT_TOLERANCE = 1e-3
SCALAR_LEAST_SCALE = 10
# Where a gradient is rounding noise around zero, the noise decides the sign of AdamW's whole step (its epsilon is
# 1e-10) and the mask of Muon's cautious decay. This share of a weight's elements may lie outside the tolerance.
FLIPPED_SHARE = 2e-3
NOISE = 0.05


@dataclass(frozen=True)
class Comparison:
    """One tensor, or the loss, of one step in two runs. error: largest difference over the tensor's scale; outside:
    share of elements beyond the tolerance."""

    name: str
    error: float
    outside: float
    tolerance: float
    passed: bool


def verification_config(
    config: Config, *, data: int, tensor: int, pipeline: int, depth: int | None, rows_per_rank: int
) -> Config:
    """Returns the config to run on a layout: float32, micro-batches of one row (the same shape on every layout), a
    short horizon.

    Another depth scales the model with its numbers of heads kept, so that it can be cut over every tensor axis that
    fits the config's model.
    """
    sections = config.model_dump(mode="json")
    if depth and depth != config.model.depth:
        model = config.model
        heads = -(-model.depth * model.aspect_ratio // model.head_size)
        scaled = depth * model.aspect_ratio // heads // HEAD_MULTIPLE * HEAD_MULTIPLE
        # at least the number of blocks: aspect_ratio times depth is rounded up to the width
        head_size = max(scaled, up_to_multiple(depth, HEAD_MULTIPLE))
        sections["model"] |= {"depth": depth, "head_size": head_size, "aspect_ratio": heads * head_size // depth}
    sections["precision"] |= {"compute": "float32", "compile": False, "fp8": "off", "attention": "auto"}
    sections["parallel"] |= {"tensor": tensor, "pipeline": pipeline}
    if tensor == 1:
        sections["parallel"]["sequence"] = False
    sections["batch"] = {"tokens": None, "micro_rows": 1, "accumulation": rows_per_rank}
    sections["horizon"] = {"steps": 20 * STEPS}
    return Config.model_validate_json(json.dumps(sections))


def warm_up(training: Training) -> None:
    """Adds noise to every matrix and table, keyed by name. nanochat's zero starting matrices give nearly singular first
    gradients, whose orthogonalization magnifies rounding, in one process too."""
    with torch.no_grad():
        for name, (whole, rectangles) in state_pieces(training).items():
            if name.startswith("model/") and len(whole) == 2 and rectangles:
                noise = warm_noise(name.removeprefix("model/"), whole)
                for offsets, sizes, view in rectangles:
                    view += noise[tuple(slice(first, first + size) for first, size in zip(offsets, sizes, strict=True))]
    training.engine.adamw.refresh_weights()
    training.muon.refresh_weights()


def warm_noise(name: str, whole: tuple[int, ...]) -> torch.Tensor:
    """Returns the noise of one whole tensor, float32."""
    return NOISE * starting_value(Place(name, whole, 0, ("normal", 1.0)), seed=5)


def related_rows(step: int, rows: int, tokens: int, vocab_size: int) -> torch.Tensor:
    """Returns [rows, tokens] int64 that depend only on the step. Neighboring tokens are related, so that there is
    something to learn."""
    generator = torch.Generator().manual_seed(1000 + step)
    steps = torch.randint(0, 5, (rows, tokens), generator=generator)
    return (torch.randint(0, vocab_size, (rows, 1), generator=generator) + steps.cumsum(1)) % vocab_size


def gradient_pieces(training: Training) -> dict:
    """Copies this rank's part of the step's mean gradients as named rectangles; for `inspect_gradients` of
    train.step.update. Over all ranks, each element exists once."""
    pieces: dict[str, tuple] = {}
    for _, name, whole, rectangles in training.muon.gradient_shards():
        pieces[name] = (tuple(whole), [(offsets, sizes, view.clone()) for offsets, sizes, view in rectangles])
    for parameter, begin, flat in training.engine.adamw.gradient_fragments():
        where = place_of(parameter)
        if where.cut != "whole" or training.mesh.tensor.rank == 0:
            rectangles = flat_rectangles(tuple(parameter.shape), flat.clone(), begin, where.offset or None)
            pieces.setdefault(where.name, (where.whole, []))[1].extend(rectangles)
    return pieces


def run_rank(config: Config, vocab_size: int, device: torch.device, folder: Path) -> None:
    """Takes STEPS steps and writes losses, first gradients and weights into `folder`. All ranks call it, with their
    launch variables set."""
    mesh = start_mesh(config, device)
    plan = resolve(config, mesh.world.size, vocab_size)
    training = build_training(config, plan, mesh, torch.ones(vocab_size, dtype=torch.int64))
    warm_up(training)
    pieces, losses = {}, []

    def copy_gradients() -> None:
        pieces.update({f"gradient/{name}": piece for name, piece in gradient_pieces(training).items()})

    for step in range(STEPS):
        set_schedules(training, step)
        rows = related_rows(step, plan.rows_per_step, plan.dims.sequence_len + 1, vocab_size)
        local_rows = rows[mesh.data.rank :: mesh.data.size]
        # only the first step's gradients, because the weights of later steps may differ by flipped signs
        loss, _ = update(training, local_rows, inspect_gradients=None if step else copy_gradients)
        losses.append(loss.item())
    for name, piece in state_pieces(training, replicas=False).items():
        if name.startswith("model/"):
            pieces[f"weight/{name.removeprefix('model/')}"] = piece
    save_rectangles(folder, pieces, mesh.world)
    if mesh.world.rank == 0:
        write_json(folder / "losses.json", losses)


def compare_runs(run: Path, reference: Path, order: list[str]) -> Iterator[Comparison]:
    """Yields every loss, gradient and weight of two runs, in the order in which training computes them. order:
    parameter names from the first layer to the last.

    Raises UserError if the runs do not hold the same tensors.
    """
    losses = [json.loads((folder / "losses.json").read_text()) for folder in (run, reference)]
    index, reference_index = read_index(run), read_index(reference)
    shares = {"gradient": 0.0, "weight": FLIPPED_SHARE}
    names = {f"{kind}/{name}" for kind in shares for name in order}
    for missing in sorted((index.keys() ^ names) | (reference_index.keys() ^ names)):
        raise UserError(f"the two runs do not hold the same tensors: {missing} is not in both")
    loss_comparisons = [_compare_losses(step, *pair) for step, pair in enumerate(zip(*losses, strict=True))]
    yield loss_comparisons[0]
    for kind, share in shares.items():
        shapes = {f"{kind}/{name}": tuple(reference_index[f"{kind}/{name}"]["shape"]) for name in order}
        largest = max(_load_tensor(reference, *item).abs().max().item() for item in shapes.items())
        for name, shape in shapes.items():
            pair = (_load_tensor(folder, name, shape) for folder in (run, reference))
            yield compare_values(name, *pair, least_scale=LEAST_SCALE * largest, share=share)
        if kind == "gradient":
            yield from loss_comparisons[1:]


def _compare_losses(step: int, loss: float, reference: float) -> Comparison:
    error = abs(loss - reference) / abs(reference)
    passed = error <= LOSS_TOLERANCE  # false for a NaN
    return Comparison(f"loss/step {step}", error, float(not passed), LOSS_TOLERANCE, passed)


def _load_tensor(folder: Path, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    whole = torch.full(shape, torch.nan)
    load_checkpoint(folder, {name: whole_piece(whole)})
    return whole


def compare_values(
    name: str,
    values: torch.Tensor,
    reference: torch.Tensor,
    *,
    least_scale: float,
    share: float,
    tolerance: float = TENSOR_TOLERANCE,
) -> Comparison:
    """Compares two tensors of one name. least_scale: lower bound of the scale to which the tolerance is relative.
    share: of the elements that may lie outside the tolerance, at least one; 0: none may."""
    if values.ndim == 1 and not share:
        tolerance, least_scale = SCALAR_GRADIENT_TOLERANCE, SCALAR_LEAST_SCALE * least_scale
    error = (values - reference).abs() / reference.abs().max().clamp_min(max(least_scale, 1e-12))
    error = torch.where(error.isnan(), torch.inf, error)
    outside = int((error > tolerance).sum())
    allowed = max(1, int(share * error.numel())) if share else 0
    return Comparison(name, error.max().item(), outside / error.numel(), tolerance, outside <= allowed)


def certificate(comparisons: list[Comparison], **facts) -> dict:
    """Returns JSON values: the facts, the verdict, the first difference, and every tensor with its error."""
    first = next((comparison for comparison in comparisons if not comparison.passed), None)
    return facts | {
        "passed": first is None,
        "first_difference": first and asdict(first),
        "flipped_share": FLIPPED_SHARE,
        "compared": [asdict(comparison) for comparison in comparisons],
    }


def print_verdict(comparisons: list[Comparison]) -> None:
    """Prints the largest error of losses, gradients and weights, and the first difference."""
    by_kind: dict[tuple[str, float], list[Comparison]] = {}
    for entry in comparisons:
        by_kind.setdefault((entry.name.split("/")[0], entry.tolerance), []).append(entry)
    for kind, tolerance in sorted(by_kind, key=lambda key: (("loss", "gradient", "weight").index(key[0]), key[1])):
        entries = by_kind[kind, tolerance]
        beyond = sum(entry.outside > 0 for entry in entries)
        what = "gradients of scalars" if tolerance == SCALAR_GRADIENT_TOLERANCE else kind
        largest = max(entry.error for entry in entries)
        print(
            f"  {what}: {len(entries)} compared, largest error {largest:.2e}, tolerance {tolerance:g}"
            + (f", with elements beyond it: {beyond}" if beyond else "")
        )
    first = next((entry for entry in comparisons if not entry.passed), None)
    if first:
        share = f"{first.outside:.3%} of its elements outside {first.tolerance:g}"
        print(f"  DIFFERENT: {first.name} first: error {first.error:.3g}, {share}")
    else:
        print(
            f"  equal ({FLIPPED_SHARE:.1%} of a weight's elements may differ: rounding decides the sign of some steps)"
        )


def verify_layout(
    config: Config, layout: dict[str, int], vocab_size: int, folder: Path, run_ranks, *, depth: int | None, rows: int
) -> dict:
    """Runs one process and the layout in subfolders of `folder`, compares them, prints the verdict; returns the
    certificate.

    layout: {"data": ..., "tensor": ..., "pipeline": ...}. rows: per data-parallel rank and step. run_ranks: (config,
    ranks, vocab_size, folder) runs `run_rank` on every rank. Raises UserError if the layout does not fit or a rank
    fails.
    """
    one_process = verification_config(
        config, data=1, tensor=1, pipeline=1, depth=depth, rows_per_rank=rows * layout["data"]
    )
    config = verification_config(config, **layout, depth=depth, rows_per_rank=rows)
    ranks = math.prod(layout.values())
    plan = resolve(config, ranks, vocab_size)  # refuses what does not fit before anything is started
    print(
        f"{layout_name(layout)}: {ranks} ranks against one process; depth {plan.dims.depth}, "
        f"{plan.parameters['total']:,} parameters, {rows * layout['data']} rows of {plan.dims.sequence_len} tokens "
        "per step",
        flush=True,
    )
    run_ranks(one_process, 1, vocab_size, folder / "reference")
    run_ranks(config, ranks, vocab_size, folder / "layout")
    comparisons = list(compare_runs(folder / "layout", folder / "reference", list(weight_shapes(plan.dims))))
    print_verdict(comparisons)
    settings = config.model_dump(mode="json", exclude_defaults=True)
    return certificate(comparisons, layout=layout, config=settings, vocab_size=vocab_size)


def layout_name(layout: dict[str, int]) -> str:
    """Returns a layout as it is given on the command line: "dp=1,tp=2,pp=1"."""
    return f"dp={layout['data']},tp={layout['tensor']},pp={layout['pipeline']}"
