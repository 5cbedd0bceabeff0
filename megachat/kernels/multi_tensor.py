"""The sum of squares by the multi-tensor kernel of Transformer Engine or NVIDIA apex, which needs a few launches where
torch needs one per tensor.
"""

import importlib
import math
from collections.abc import Callable, Sequence
from importlib import util

import torch

from megachat.errors import summary
from megachat.kernels.gradient_norm import SumOfSquares, torch_sum_of_squares
from megachat.kernels.te import te_l2norm, te_problem, te_version

_LARGEST = 2**30  # elements per tensor given to a kernel, which counts in 32 bits
_TOLERANCE = 1e-5


class KernelUnavailable(Exception):
    """A kernel cannot be used here; the message says why."""


def multi_tensor_sum_of_squares(applier: Callable, l2norm: Callable) -> SumOfSquares:
    """Builds `torch_sum_of_squares` from a multi-tensor kernel.

    applier, l2norm: of Transformer Engine or apex, which share one interface:
    applier(l2norm, int32 flag, [tensors of one dtype], False) -> (norm, unused).
    """

    def sum_of_squares(tensors: Sequence[torch.Tensor], before: torch.Tensor | None = None) -> torch.Tensor:
        if not tensors and before is None:
            raise ValueError("no tensors to sum, and no sum before them")
        by_dtype: dict[torch.dtype, list[torch.Tensor]] = {}
        for tensor in tensors:
            if tensor.numel():  # the kernels fail on an empty list, and may fail on an empty tensor
                by_dtype.setdefault(tensor.dtype, []).extend(tensor.detach().reshape(-1).split(_LARGEST))
        total = torch.zeros((), device=tensors[0].device) if before is None else before
        for same_dtype in by_dtype.values():
            flag = torch.zeros(1, dtype=torch.int32, device=same_dtype[0].device)
            norm, _ = applier(l2norm, flag, [same_dtype], False)
            total = total + norm.float().square().view(())
        return total

    return sum_of_squares


def load_te(device: torch.device) -> tuple[SumOfSquares, str]:
    """Returns (Transformer Engine's function, a description). Raises KernelUnavailable."""
    if problem := te_problem(device):
        raise KernelUnavailable(problem)
    try:
        return multi_tensor_sum_of_squares(*te_l2norm()), f"Transformer Engine {te_version()}"
    except Exception as error:  # its libraries raise many kinds while they are loaded
        raise KernelUnavailable(f"it has no multi_tensor_l2norm ({summary(error)})") from None


def load_apex(device: torch.device) -> tuple[SumOfSquares, str]:
    """Returns (NVIDIA apex's function, a description). Raises KernelUnavailable."""
    if util.find_spec("amp_C") is None:  # checked before the import: PyPI's apex is another program
        if util.find_spec("apex") is None:
            raise KernelUnavailable("it is not installed")
        raise KernelUnavailable(
            "the installed apex lacks amp_C: it is another package, or built without CUDA extensions"
        )
    try:
        l2norm = importlib.import_module("amp_C").multi_tensor_l2norm
        applier = importlib.import_module("apex.multi_tensor_apply").multi_tensor_applier
    except Exception as error:  # as above
        raise KernelUnavailable(f"it cannot be imported ({summary(error)})") from None
    return multi_tensor_sum_of_squares(applier, l2norm), "NVIDIA apex"


def check_sums(function: SumOfSquares, device: torch.device) -> None:
    """Compares the function with torch on the device, infinity and NaN included. Raises KernelUnavailable if it fails
    or differs.
    """
    few = [torch.linspace(-1, 1, size, device=device) for size in (1, 100_003)]
    for special in ([], [torch.inf], [torch.nan]):
        tensors = [*few, *(torch.full((3,), value, device=device) for value in special)]
        try:
            result, expected = function(tensors).item(), torch_sum_of_squares(tensors).item()
        except Exception as error:  # a kernel without code for this GPU
            raise KernelUnavailable(f"it fails ({summary(error)})") from None
        if not (math.isclose(result, expected, rel_tol=_TOLERANCE) or (math.isnan(result) and math.isnan(expected))):
            raise KernelUnavailable(f"it computes {result} where torch computes {expected}")
