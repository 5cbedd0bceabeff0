"""Declares, lists, initializes and loads parameters by their place (see megachat.place)."""

import hashlib
from collections.abc import Iterable

import torch
from torch import nn

from megachat.place import Cut, Place, has_place, place_of, set_place


def declare(parameter: nn.Parameter, name: str, block: int, start: tuple, cut: Cut = "whole") -> None:
    """Attaches the place of a parameter that is a whole tensor."""
    set_place(parameter, Place(name, tuple(parameter.shape), block, start, cut))


def placed_parameters(layers: Iterable[nn.Module]) -> list[nn.Parameter]:
    """Returns the parameters of the layers in model order. Raises ValueError if one has no place."""
    parameters = []
    for layer in layers:
        for local_name, parameter in layer.named_parameters():
            if not has_place(parameter):
                raise ValueError(f"parameter {local_name} of {type(layer).__name__} has no place")
            parameters.append(parameter)
    return parameters


def starting_value(place: Place, seed: int) -> torch.Tensor:
    """Returns the whole tensor's initial value, float32 on the CPU.

    Its generator is keyed by (seed, name), so the value is the same on every layout.
    """
    kind, *numbers = place.start
    if kind == "constant":
        return torch.full(place.whole, numbers[0])
    key = hashlib.sha256(f"{seed}/{place.name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "big") >> 1)
    value = torch.empty(place.whole)
    if kind == "normal":
        return value.normal_(0.0, numbers[0], generator=generator)
    return value.uniform_(numbers[0], numbers[1], generator=generator)


def load_whole(parameter: nn.Parameter, whole: torch.Tensor) -> None:
    """Copies this parameter's part of the whole tensor into it, cast to its dtype.

    Raises ValueError for another shape.
    """
    place = place_of(parameter)
    if tuple(whole.shape) != place.whole:
        raise ValueError(f"{place.name} is {tuple(whole.shape)}, not {place.whole}")
    offset = place.offset or (0,) * whole.ndim
    part = whole[tuple(slice(start, start + size) for start, size in zip(offset, parameter.shape, strict=True))]
    with torch.no_grad():
        parameter.copy_(part)


def initialize(layers: Iterable[nn.Module], seed: int) -> None:
    """Gives every parameter of the layers its initial value."""
    for parameter in placed_parameters(layers):
        place = place_of(parameter)
        if place.start[0] == "constant":
            with torch.no_grad():
                parameter.fill_(place.start[1])
        else:
            load_whole(parameter, starting_value(place, seed))
