"""Compares a layout with one process, in float32, tensor by tensor: losses, every gradient, and every weight.

Both take two steps. The layout's optimizers get the gradients of the one process after its own gradients were written:
AdamW takes a step of full size where a gradient is rounding noise around zero, as its epsilon is 1e-10. Given equal
gradients the new weights are equal, so that the verdict does not depend on the rates.

Each run writes its gradients and weights as named rectangles, as a checkpoint does. The comparison reads whole tensors,
so it does not depend on how they were cut.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from megachat.checkpoint.index import by_tensor, read_index
from megachat.checkpoint.storage import load_checkpoint, save_rectangles
from megachat.config import Config
from megachat.convert.architecture import weight_shapes
from megachat.convert.megachat import whole_piece
from megachat.errors import UserError
from megachat.files import write_json
from megachat.job.join import start_mesh
from megachat.model.parameters import starting_value
from megachat.parallel.rectangles import TensorShard
from megachat.parallel.zero_state import parameter_shard
from megachat.place import Place
from megachat.planning.layouts import layout_name
from megachat.planning.plan import resolve_without_text
from megachat.programs.verify_config import VERIFY_STEPS, verification_config
from megachat.schedule import scheduled_values
from megachat.train.build import TrainingModel, build_training_model
from megachat.train.state import state_pieces
from megachat.train.step import set_schedules, update

NUMBERS_FILE = "numbers.json"  # of a step
COPY = " on tensor rank "  # in the name of a copy: its rank follows
LOSS_TOLERANCE = 1e-6  # relative
TENSOR_TOLERANCE = 1e-5  # relative to the tensor's scale, which is its largest element
# A gradient that is zero but for rounding has no scale; at least this share of the largest element of all gradients (or
# weights) is used.
LEAST_SCALE = 1e-3
# A scalar's gradient is a sum over all tokens and channels that nearly cancels. With few blocks backout_lambda's is
# zero but for this sum's rounding, so that its least scale is ten times that of the others.
SCALAR_GRADIENT_TOLERANCE = 1e-3
SCALAR_LEAST_SCALE = 10
# Relative to the tensor's largest update. Equal gradients are equal to the bit unless they are clipped, by factors that
# differ in the last bit; orthogonalization magnifies this at most about a thousand times.
UPDATE_TOLERANCE = 1e-4
WEIGHT_ROUNDING = 4 * torch.finfo(torch.float32).eps  # of a weight, when decay and update are applied
NOISE = 0.05


@dataclass(frozen=True)
class Comparison:
    """One tensor, the loss, or the gradient norm of one step in two runs. error: largest difference over the tensor's
    scale; outside: share of elements beyond the tolerance."""

    name: str
    error: float
    outside: float
    tolerance: float
    passed: bool


def warm_up(training: TrainingModel) -> None:
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


def _live_weights(training: TrainingModel) -> dict:
    return {name.removeprefix("model/"): p for name, p in state_pieces(training).items() if name.startswith("model/")}


def _copied(pieces: dict) -> dict:
    return {
        name: (whole, [(offsets, sizes, view.clone()) for offsets, sizes, view in rectangles])
        for name, (whole, rectangles) in pieces.items()
    }


def shards_of_shares(training: TrainingModel, shares: list[torch.Tensor]) -> list[TensorShard]:
    """Returns the gradients in shares of ZeroState.gradient_shares() as views of them."""
    return [
        parameter_shard("gradient", parameter, start, share[here])
        for index, share in enumerate(shares)
        for parameter, start, here in training.engine.adamw.share_slices(index)
    ]


def run_rank(config: Config, vocab_size: int, device: torch.device, folder: Path, reference: Path | None) -> None:
    """Takes VERIFY_STEPS steps and writes what each computed into `folder`/STEP. All ranks call it, with their launch
    variables set.

    reference: the folder of another run, whose gradients the optimizers get instead of these.
    """
    mesh = start_mesh(config, device)
    plan = resolve_without_text(config, mesh.world.size, vocab_size)
    training = build_training_model(config, plan, mesh, torch.ones(vocab_size, dtype=torch.int64))
    warm_up(training)
    copies = training.engine.adamw.names_of_copies()
    for step in range(VERIFY_STEPS):
        pieces: dict[str, tuple] = {}

        def keep(kind: str, tensors: dict, pieces=pieces) -> None:
            for name, piece in tensors.items():
                pieces[f"{kind}/{name}{COPY * (name in copies)}{mesh.tensor.rank if name in copies else ''}"] = piece

        def replace_gradients(step=step, keep=keep) -> None:
            shares, row_gradients = training.engine.adamw.gradient_shares(), training.rows.gradient_shards()
            shards = training.muon.gradient_shards() + row_gradients + shards_of_shares(training, shares)
            gradients = by_tensor((shard.name, shard) for shard in shards)  # live for Muon, else views of the copies
            keep("gradient", _copied(gradients))
            if reference:
                load_checkpoint(reference / str(step), {f"gradient/{name}": piece for name, piece in gradients.items()})
                training.engine.adamw.set_gradient_shares(shares)
                training.rows.set_gradient_shards(row_gradients)

        before = _copied(_live_weights(training))
        set_schedules(training, step)
        rows = related_rows(step, plan.rows_per_step, plan.dims.sequence_len + 1, vocab_size)
        local_rows = rows[mesh.data.rank :: mesh.data.size]
        loss, outcome = update(training, local_rows, inspect_gradients=replace_gradients)
        weights = _live_weights(training)
        keep("weight", weights)
        for name, (_, rectangles) in before.items():
            for (_, _, old), (_, _, new) in zip(rectangles, weights[name][1], strict=True):
                torch.sub(new, old, out=old)
        keep("update", before)
        save_rectangles(folder / str(step), pieces, mesh.world)
        if mesh.world.rank == 0:
            scheduled = scheduled_values(training.config.optimizer, step, plan.steps)
            decay = scheduled.multiplier("matrix") * plan.rates["matrix"] * plan.weight_decay * scheduled.decay
            decay *= max((matrix.multiplier for matrix in training.muon.plan.matrices), default=0.0)
            write_json(folder / str(step) / NUMBERS_FILE, {"loss": loss.item(), "norm": outcome.norm, "decay": decay})


def compare_runs(run: Path, reference: Path, order: list[str]) -> Iterator[Comparison]:
    """Yields every loss, gradient, gradient norm and weight of two runs, in the order in which training computes them.
    order: parameter names from the first layer to the last.

    Raises UserError if the runs do not hold the same tensors.
    """
    for step in range(VERIFY_STEPS):
        yield from _compare_step(step, run / str(step), reference / str(step), order)


def _compare_step(step: int, run: Path, reference: Path, order: list[str]) -> Iterator[Comparison]:
    numbers, expected = (json.loads((folder / NUMBERS_FILE).read_text()) for folder in (run, reference))
    index, reference_index = read_index(run), read_index(reference)
    names = {f"{kind}/{name}" for kind in ("gradient", "weight", "update") for name in order}
    for missing in sorted(({name.partition(COPY)[0] for name in index} ^ names) | (reference_index.keys() ^ names)):
        raise UserError(f"the two runs do not hold the same tensors: {missing} is not in both")

    def pairs(kind: str) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
        """Yields (name, the run's tensor, the reference's), also for copies on other ranks of the tensor axis."""
        whole, values = _load_saved_tensors(reference, kind, reference_index), _load_saved_tensors(run, kind, index)
        for name in order:
            for copy in sorted(key for key in values if key.partition(COPY)[0] == f"{kind}/{name}"):
                yield f"{copy}, step {step}", values[copy], whole[f"{kind}/{name}"]

    yield _compare_numbers(f"loss/step {step}", numbers["loss"], expected["loss"], LOSS_TOLERANCE)
    gradients = list(pairs("gradient"))
    least_scale = LEAST_SCALE * max(whole.abs().max().item() for _, _, whole in gradients)
    for title, values, whole in gradients:
        yield compare_values(title, values, whole, least_scale=least_scale)
    yield _compare_numbers(f"norm/step {step}", numbers["norm"], expected["norm"], TENSOR_TOLERANCE)
    for weight, moved in zip(pairs("weight"), pairs("update"), strict=True):
        yield compare_weights(weight[0], weight[1:], moved[1:], decay=expected["decay"])


def _compare_numbers(name: str, number: float, reference: float, tolerance: float) -> Comparison:
    error = abs(number - reference) / abs(reference)
    passed = error <= tolerance  # false for a NaN
    return Comparison(name, error, float(not passed), tolerance, passed)


def _load_saved_tensors(folder: Path, kind: str, index: dict) -> dict[str, torch.Tensor]:
    shapes = {name: tuple(entry["shape"]) for name, entry in index.items() if name.startswith(f"{kind}/")}
    tensors = {name: torch.full(shape, torch.nan) for name, shape in shapes.items()}
    load_checkpoint(folder, {name: whole_piece(tensor) for name, tensor in tensors.items()})
    return tensors


def compare_values(
    name: str, values: torch.Tensor, reference: torch.Tensor, *, least_scale: float, tolerance: float = TENSOR_TOLERANCE
) -> Comparison:
    """Compares two tensors of one name that are linear in gradients. least_scale: lower bound of the scale to which the
    tolerance is relative."""
    if values.ndim == 1 and tolerance:
        tolerance, least_scale = SCALAR_GRADIENT_TOLERANCE, SCALAR_LEAST_SCALE * least_scale
    error = (values - reference).abs() / reference.abs().max().clamp_min(max(least_scale, 1e-12))
    return _compared(name, error, tolerance)


def compare_weights(
    name: str, weights: tuple[torch.Tensor, torch.Tensor], updates: tuple[torch.Tensor, torch.Tensor], *, decay: float
) -> Comparison:
    """Compares a weight after a step from equal gradients; both tuples are (the run's, the reference's).

    The scale is the largest update. Muon's decay, at most `decay` of a weight, applies where update and weight have one
    sign. Where an update is zero but for rounding, one of the two runs may not have moved the weight at all.
    """
    (weight, expected), scale = weights, updates[1].abs().max().clamp_min(1e-12)
    rest = ((weight - expected).abs() - WEIGHT_ROUNDING * expected.abs()).clamp_min(0)
    least = torch.minimum(updates[0].abs(), updates[1].abs()) - WEIGHT_ROUNDING * expected.abs()
    decayed = (least <= UPDATE_TOLERANCE * scale) * decay * expected.abs()
    return _compared(name, (rest - decayed).clamp_min(0) / scale, UPDATE_TOLERANCE)


def _compared(name: str, error: torch.Tensor, tolerance: float) -> Comparison:
    error = torch.where(error.isnan(), torch.inf, error)
    outside = int((error > tolerance).sum())
    return Comparison(name, error.max().item(), outside / error.numel(), tolerance, not outside)


def certificate(comparisons: list[Comparison], **facts) -> dict:
    """Returns JSON values: the facts, the verdict, the first difference, and every tensor with its error."""
    first = next((comparison for comparison in comparisons if not comparison.passed), None)
    return facts | {
        "passed": first is None,
        "first_difference": first and asdict(first),
        "compared": [asdict(comparison) for comparison in comparisons],
    }


def print_verdict(comparisons: list[Comparison]) -> None:
    """Prints the largest error of losses, gradients, norms and weights, and the first difference."""
    by_kind: dict[tuple[int, float], list[Comparison]] = {}
    kinds = ("loss", "gradient", "norm", "weight")
    for entry in comparisons:
        by_kind.setdefault((kinds.index(entry.name.split("/")[0]), entry.tolerance), []).append(entry)
    for (kind, tolerance), entries in sorted(by_kind.items()):
        what = "gradients of scalars" if tolerance == SCALAR_GRADIENT_TOLERANCE else kinds[kind]
        largest = max(entry.error for entry in entries)
        print(f"  {what}: {len(entries)} compared, largest error {largest:.2e}, tolerance {tolerance:g}")
    first = next((entry for entry in comparisons if not entry.passed), None)
    if first:
        share = f"{first.outside:.3%} of its elements outside {first.tolerance:g}"
        print(f"  DIFFERENT: {first.name} first: error {first.error:.3g}, {share}")
    else:
        print(f"  equal: {VERIFY_STEPS} steps, the weights after updates from equal gradients")


def verify_layout(
    config: Config, layout: dict[str, int], vocab_size: int, folder: Path, run_ranks, *, depth: int | None, rows: int
) -> dict:
    """Runs one process and the layout in subfolders of `folder`, compares them, prints the verdict; returns the
    certificate.

    layout: {"data": ..., "tensor": ..., "pipeline": ...}. rows: per data-parallel rank and step. run_ranks: (config,
    ranks, vocab_size, folder, reference) runs `run_rank` on every rank. Raises UserError if the layout does not fit or
    a rank fails.
    """
    one_process = verification_config(
        config, data=1, tensor=1, pipeline=1, depth=depth, rows_per_rank=rows * layout["data"]
    )
    config = verification_config(config, **layout, depth=depth, rows_per_rank=rows)
    ranks = math.prod(layout.values())
    plan = resolve_without_text(config, ranks, vocab_size)  # refuses what does not fit before anything is started
    print(
        f"{layout_name(layout)}: {ranks} ranks against one process; depth {plan.dims.depth}, "
        f"{plan.parameters['total']:,} parameters, {rows * layout['data']} rows of {plan.dims.sequence_len} tokens "
        "per step",
        flush=True,
    )
    run_ranks(one_process, 1, vocab_size, folder / "reference", None)
    run_ranks(config, ranks, vocab_size, folder / "layout", folder / "reference")
    comparisons = list(compare_runs(folder / "layout", folder / "reference", list(weight_shapes(plan.dims))))
    print_verdict(comparisons)
    settings = config.model_dump(mode="json", exclude_defaults=True)
    return certificate(comparisons, layout=layout, config=settings, vocab_size=vocab_size)
