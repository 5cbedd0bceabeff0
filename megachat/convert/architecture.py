"""What a checkpoint must hold, from the model's sizes alone; and the model itself, from a checkpoint's tensors."""

from collections.abc import Iterable

import torch

from megachat.convert.opened import Opened
from megachat.errors import UserError
from megachat.model.gpt import ModelOptions, build_layers
from megachat.model.parameters import load_whole, placed_parameters
from megachat.optim.groups import assign
from megachat.optim.muon import second_moment_shape
from megachat.place import Place, place_of
from megachat.planning.dimensions import Dimensions, saved_dimensions


def dims_of(facts: dict) -> Dimensions:
    """The model's sizes in a checkpoint's facts. Raises UserError for keys or values that are not this version's."""
    return saved_dimensions(facts.get("model") or {})


def places(dims: Dimensions) -> list[Place]:
    """Every parameter once by its whole tensor, in model order; no tensor is made."""
    with torch.device("meta"):
        parameters = placed_parameters(build_layers(dims, ModelOptions()))
    return list({place_of(parameter).name: place_of(parameter) for parameter in parameters}.values())


def weight_shapes(dims: Dimensions) -> dict[str, tuple[int, ...]]:
    """Parameter name -> whole shape."""
    return {where.name: where.whole for where in places(dims)}


def state_shapes(dims: Dimensions) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of a complete checkpoint: weights, AdamW's moments, Muon's momentum and second moment."""
    wheres = places(dims)
    shapes = {f"model/{where.name}": where.whole for where in wheres}
    for name, group in assign(wheres).items():
        whole = shapes[f"model/{name}"]
        if group.optimizer == "muon":
            shapes |= {f"muon/{name}/momentum": whole, f"muon/{name}/second_moment": second_moment_shape(whole)}
        else:
            shapes |= {f"adamw/{name}/exp_avg": whole, f"adamw/{name}/exp_avg_sq": whole}
    return shapes


def shape_problems(found: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]]) -> list[str]:
    """What is missing, has another shape or is too much, in words."""
    problems = [f"{name} is missing" for name in wanted if name not in found]
    problems += [
        f"{name} is {list(found[name])}, not {list(shape)}"
        for name, shape in wanted.items()
        if name in found and found[name] != shape
    ]
    return problems + [f"{name} is no tensor of this architecture" for name in found if name not in wanted]


def has_optimizer(names: Iterable[str]) -> bool:
    """True when there is any optimizer state among the tensors."""
    return any(not name.startswith("model/") for name in names)


def tensor_problems(opened: Opened) -> list[str]:
    """`shape_problems` of a checkpoint; one without any optimizer state is complete with its weights."""
    wanted = state_shapes(dims_of(opened.facts))
    if not has_optimizer(opened.entries):
        wanted = {name: shape for name, shape in wanted.items() if name.startswith("model/")}
    return shape_problems({name: entry.shape for name, entry in opened.entries.items()}, wanted)


def build_model(opened: Opened, options: ModelOptions | None = None) -> torch.nn.ModuleList:
    """The whole model on the CPU with the checkpoint's weights, computing in float32 by default. In another dtype the matrices are kept in it,
    which gives the same numbers as converting them at each use. Raises UserError when they are not the architecture's."""
    if problems := tensor_problems(opened):
        raise UserError(f"{opened.folder}: {problems[0]}: it is not a checkpoint of this architecture")
    layers = build_layers(dims_of(opened.facts), options or ModelOptions())
    by_name: dict[str, list] = {}
    for parameter in placed_parameters(layers):
        by_name.setdefault(f"model/{place_of(parameter).name}", []).append(parameter)
    for name, whole in opened.tensors(by_name):
        for parameter in by_name[name]:
            load_whole(parameter, whole)
            if options and parameter.ndim == 2:
                parameter.data = parameter.data.to(options.compute_dtype)
    return layers.requires_grad_(False).eval()
