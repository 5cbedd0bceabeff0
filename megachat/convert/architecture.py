"""What a checkpoint must hold, from the model's sizes alone; and the model, built from a checkpoint's tensors."""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch

from megachat.checkpoint.index import state_name
from megachat.convert.reader import CheckpointReader
from megachat.errors import UserError
from megachat.model.gpt import ModelOptions, build_layers
from megachat.model.parameters import load_whole, placed_parameters
from megachat.optim.groups import assign_groups
from megachat.optim.muon import second_moment_shape
from megachat.optim.row_update import row_state_shapes
from megachat.parallel.rectangles import MASTER, MOMENTS
from megachat.place import Place, place_of
from megachat.planning.dimensions import Dimensions
from megachat.planning.stage_state import stage_parameters

Shape = tuple[int, ...]
DIVERGED = "its training had diverged, so use an earlier checkpoint"


def _declared_parameters(dims: Dimensions, dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    return stage_parameters(dims, (0, dims.depth + 2), dtype)


def places(dims: Dimensions) -> list[Place]:
    """Returns every whole tensor of the model once, in model order; no memory is allocated."""
    return list({place_of(parameter).name: place_of(parameter) for parameter in _declared_parameters(dims)}.values())


def weight_shapes(dims: Dimensions) -> dict[str, Shape]:
    """Returns parameter name -> whole shape, in model order; per-layer scalars come with their first layer."""
    return {place.name: place.whole for place in places(dims)}


def neutral_tensors(dims: Dimensions) -> dict[str, torch.Tensor]:
    """Returns name -> values without effect, for the residual mix, smear and backout."""
    neutral = places(replace(dims, lambdas="neutral"))
    return {place.name: neutral_tensor(place) for place in neutral if place.cut == "whole"}


def neutral_tensor(place: Place) -> torch.Tensor:
    """Returns the values without effect of a tensor of a model with neutral lambdas."""
    kind, *value = place.start
    return torch.full(place.whole, value[0] if kind == "constant" else 0.0)


def table_names(dims: Dimensions) -> frozenset[str]:
    """Returns the names of the embedding tables: the parameters that the model stores in its compute dtype."""
    parameters = _declared_parameters(dims, torch.bfloat16)
    return frozenset(place_of(parameter).name for parameter in parameters if parameter.dtype == torch.bfloat16)


def state_shapes(dims: Dimensions, row_optimizer: str = "adamw") -> dict[str, Shape]:
    """Returns name -> shape of every tensor of a complete checkpoint: the weights and the optimizers' state.

    row_optimizer: ngram.optimizer.
    """
    all_places = places(dims)
    shapes = {f"model/{place.name}": place.whole for place in all_places}
    for name, group in assign_groups(all_places).items():
        for kind, shape in moment_shapes(group.optimizer, shapes[f"model/{name}"], row_optimizer).items():
            shapes[state_name(group.optimizer, name, kind)] = shape
    return shapes


def moment_shapes(optimizer: str, whole: Shape, row_optimizer: str = "adamw") -> dict[str, Shape]:
    """Returns the shape of each state of a parameter beside its master, by kind. optimizer: Group.optimizer."""
    if optimizer == "muon":
        return {"momentum": whole, "second_moment": second_moment_shape((whole[0], whole[1]))}
    if optimizer == "rows":
        return {kind: each for kind, each in row_state_shapes(row_optimizer, *whole).items() if kind != MASTER}
    return dict.fromkeys(MOMENTS, whole)


def shape_problems(actual: Mapping[str, Shape], expected: Mapping[str, Shape]) -> list[str]:
    """Returns one phrase per tensor that is missing, has another shape, or does not belong."""
    problems = [f"{name} is missing" for name in expected if name not in actual]
    problems += [
        f"{name} is {list(actual[name])}, not {list(shape)}"
        for name, shape in expected.items()
        if name in actual and actual[name] != shape
    ]
    return problems + [f"{name} is no tensor of this architecture" for name in actual if name not in expected]


def tensor_problems(checkpoint: CheckpointReader) -> list[str]:
    """Returns `shape_problems` of a checkpoint; one without any optimizer state is complete with its weights."""
    rowwise = any(name.startswith("rows/") and name.endswith("/mean_square") for name in checkpoint.entries)
    expected = state_shapes(checkpoint.dims, "rowwise" if rowwise else "adamw")
    if not checkpoint.has_optimizer:
        expected = {name: shape for name, shape in expected.items() if name.startswith("model/")}
    return shape_problems({name: entry.shape for name, entry in checkpoint.entries.items()}, expected)


def require_architecture(checkpoint: CheckpointReader) -> None:
    """Raises UserError if the checkpoint has `tensor_problems`."""
    if problems := tensor_problems(checkpoint):
        raise UserError(f"{checkpoint.folder}: {problems[0]}: it is not a checkpoint of this architecture")


def value_problems(checkpoint: CheckpointReader) -> list[str]:
    """Returns one phrase per tensor with elements that are NaN or infinite; reads all of them, a few at a time."""
    return [phrase for name, tensor in checkpoint.tensors() if (phrase := value_problem(name, tensor))]


def value_problem(name: str, tensor: torch.Tensor) -> str | None:
    """Returns a phrase if elements of the tensor are NaN or infinite."""
    count = int((~tensor.isfinite()).sum())
    return f"{name} has {count:,} elements that are NaN or infinite" if count else None


def require_finite(checkpoint: CheckpointReader) -> None:
    """Raises UserError if a tensor of the checkpoint has elements that are NaN or infinite."""
    if problems := value_problems(checkpoint):
        more = f", and {len(problems) - 1} other tensors have such" if len(problems) > 1 else ""
        raise UserError(f"{checkpoint.folder}: {problems[0]}{more}: {DIVERGED}")


def build_model(checkpoint: CheckpointReader, options: ModelOptions | None = None) -> torch.nn.ModuleList:
    """Returns the whole model on the CPU with the checkpoint's weights. It computes in float32 by default.

    With another compute dtype the matrices are stored in it, which gives the same numbers as casting them at each use.
    Raises UserError if the tensors are not those of the architecture, or have elements that are NaN or infinite.
    """

    def refuse_bad_values(name: str, whole: torch.Tensor) -> None:
        if problem := value_problem(name, whole):
            raise UserError(f"{checkpoint.folder}: {problem}: {DIVERGED}")

    layers = build_trainable(checkpoint, options or ModelOptions(), refuse_bad_values)
    if options:
        for parameter in placed_parameters(layers):
            if parameter.ndim == 2:
                parameter.data = parameter.data.to(options.compute_dtype)
    return layers.requires_grad_(False).eval()


def build_trainable(
    checkpoint: CheckpointReader,
    options: ModelOptions,
    check: Callable[[str, torch.Tensor], object] = lambda name, whole: None,
) -> torch.nn.ModuleList:
    """Returns the whole model on the CPU as training has it: in training mode, with float32 matrices.

    check: called with the name and values of each tensor. Raises UserError as require_architecture.
    """
    require_architecture(checkpoint)
    layers = build_layers(checkpoint.dims, options)
    by_name: dict[str, list] = {}
    for parameter in placed_parameters(layers):
        by_name.setdefault(f"model/{place_of(parameter).name}", []).append(parameter)
    for name, whole in checkpoint.tensors(by_name):
        check(name, whole)
        for parameter in by_name[name]:
            load_whole(parameter, whole)
    return layers
