"""What torch.compile makes no graph of: kernels of packages, and collectives. It is marked where it is written, but torch.compiler.disable, which
loads the compiler, is left until something is compiled: that takes a quarter of the time in which a program starts."""

import functools
import sys
from collections.abc import Callable

import torch

_marked: list[Callable] = []


def outside_graphs(function: Callable) -> Callable:
    """Decorator of a module's function or a class's method: `leave_out_marked` will keep torch.compile from it and from what it calls."""
    _marked.append(function)
    return function


def leave_out_marked() -> None:
    """Put torch.compiler.disable around all that is marked, where its callers find it. To be called before torch.compile."""
    while _marked:
        function = _marked.pop()
        *owners, name = function.__qualname__.split(".")
        owner = functools.reduce(getattr, owners, sys.modules[function.__module__])
        setattr(owner, name, torch.compiler.disable(function))
