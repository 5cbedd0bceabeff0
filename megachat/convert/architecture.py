"""What a checkpoint must hold, from the model's sizes alone; and the model, built from a checkpoint's tensors."""

from collections.abc import Mapping

import torch

from megachat.convert.reader import CheckpointReader
from megachat.errors import UserError
from megachat.model.gpt import ModelOptions, build_layers
from megachat.model.parameters import load_whole, placed_parameters
from megachat.optim.groups import assign_groups
from megachat.optim.muon import second_moment_shape
from megachat.place import Place, place_of
from megachat.planning.dimensions import Dimensions

Shape = tuple[int, ...]


def _declared_parameters(dims: Dimensions, dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    with torch.device("meta"):
        return placed_parameters(build_layers(dims, ModelOptions(compute_dtype=dtype)))


def places(dims: Dimensions) -> list[Place]:
    """Returns every whole tensor of the model once, in model order; no memory is allocated."""
    return list({place_of(parameter).name: place_of(parameter) for parameter in _declared_parameters(dims)}.values())


def weight_shapes(dims: Dimensions) -> dict[str, Shape]:
    """Returns parameter name -> whole shape, in model order; per-layer scalars come with their first layer."""
    return {where.name: where.whole for where in places(dims)}


def table_names(dims: Dimensions) -> frozenset[str]:
    """Returns the names of the embedding tables: the parameters that the model stores in its compute dtype."""
    parameters = _declared_parameters(dims, torch.bfloat16)
    return frozenset(place_of(parameter).name for parameter in parameters if parameter.dtype == torch.bfloat16)


def state_shapes(dims: Dimensions) -> dict[str, Shape]:
    """Returns name -> shape of every tensor of a complete checkpoint: the weights and both optimizers' state."""
    wheres = places(dims)
    shapes = {f"model/{where.name}": where.whole for where in wheres}
    for name, group in assign_groups(wheres).items():
        whole = shapes[f"model/{name}"]
        if group.optimizer == "muon":
            shapes |= {f"muon/{name}/{kind}": shape for kind, shape in muon_shapes(whole).items()}
        else:
            shapes |= {f"adamw/{name}/exp_avg": whole, f"adamw/{name}/exp_avg_sq": whole}
    return shapes


def muon_shapes(matrix: Shape) -> dict[str, Shape]:
    """Returns name -> shape of Muon's state of a matrix."""
    rows, columns = matrix
    return {"momentum": matrix, "second_moment": second_moment_shape((rows, columns))}


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
    expected = state_shapes(checkpoint.dims)
    if not checkpoint.has_optimizer:
        expected = {name: shape for name, shape in expected.items() if name.startswith("model/")}
    return shape_problems({name: entry.shape for name, entry in checkpoint.entries.items()}, expected)


def build_model(checkpoint: CheckpointReader, options: ModelOptions | None = None) -> torch.nn.ModuleList:
    """Returns the whole model on the CPU with the checkpoint's weights. It computes in float32 by default.

    With another compute dtype the matrices are stored in it, which gives the same numbers as casting them at each use.
    Raises UserError if the tensors are not those of the architecture.
    """
    if problems := tensor_problems(checkpoint):
        raise UserError(f"{checkpoint.folder}: {problems[0]}: it is not a checkpoint of this architecture")
    layers = build_layers(checkpoint.dims, options or ModelOptions())
    by_name: dict[str, list] = {}
    for parameter in placed_parameters(layers):
        by_name.setdefault(f"model/{place_of(parameter).name}", []).append(parameter)
    for name, whole in checkpoint.tensors(by_name):
        for parameter in by_name[name]:
            load_whole(parameter, whole)
            if options and parameter.ndim == 2:
                parameter.data = parameter.data.to(options.compute_dtype)
    return layers.requires_grad_(False).eval()
