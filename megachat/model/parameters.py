"""Naming, initializing and loading parameters by their place (see megachat.place)."""

import hashlib

import torch
from torch import nn

from megachat.place import Place, has_place, place_of


def placed_parameters(layers) -> list[nn.Parameter]:
    """The parameters of the layers in model order. Raises ValueError when one has no identity."""
    found = []
    for layer in layers:
        for local_name, parameter in layer.named_parameters():
            if not has_place(parameter):
                raise ValueError(f"parameter {local_name} of {type(layer).__name__} has no name")
            found.append(parameter)
    return found


def starting_value(where: Place, seed: int) -> torch.Tensor:
    """The whole tensor's initial value, float32 on the CPU, from a generator keyed by (seed, name): no layout can change it."""
    kind, *numbers = where.start
    if kind == "constant":
        return torch.full(where.whole, numbers[0])
    key = hashlib.sha256(f"{seed}/{where.name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "big") >> 1)
    value = torch.empty(where.whole)
    if kind == "normal":
        return value.normal_(0.0, numbers[0], generator=generator)
    return value.uniform_(numbers[0], numbers[1], generator=generator)


def load_whole(parameter: nn.Parameter, whole: torch.Tensor) -> None:
    """Copy this parameter's part of the whole tensor into it, cast to its dtype. Raises ValueError for another shape."""
    where = place_of(parameter)
    if tuple(whole.shape) != where.whole:
        raise ValueError(f"{where.name} is {tuple(whole.shape)}, not {where.whole}")
    offset = where.offset or (0,) * whole.ndim
    part = whole[tuple(slice(start, start + size) for start, size in zip(offset, parameter.shape, strict=True))]
    with torch.no_grad():
        parameter.copy_(part)


def initialize(layers, seed: int) -> None:
    """Give every parameter of the layers its starting value."""
    for parameter in placed_parameters(layers):
        where = place_of(parameter)
        if where.start[0] == "constant":
            with torch.no_grad():
                parameter.fill_(where.start[1])
        else:
            load_whole(parameter, starting_value(where, seed))
