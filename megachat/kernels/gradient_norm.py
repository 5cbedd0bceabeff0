"""The sum of squares under the one gradient norm: in a few launches by Transformer Engine's or NVIDIA apex's multi-tensor kernel on a GPU, else by
torch."""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import util

import torch

from megachat.errors import summary
from megachat.kernels.te import te_l2norm, te_problem, te_version

SumOfSquares = Callable[..., torch.Tensor]  # (tensors, before=None) -> 0-d float32, as `torch_sum_of_squares`
_LARGEST = 2**30  # elements of a tensor that a kernel is given: they count in 32 bits
_TOLERANCE = 1e-5


@dataclass(frozen=True)
class GradientNorm:
    """name: "te", "apex" or "torch". reason: in words."""

    name: str
    sum_of_squares: SumOfSquares
    reason: str


def torch_sum_of_squares(tensors: Sequence[torch.Tensor], before: torch.Tensor | None = None) -> torch.Tensor:
    """0-d float32: of all elements of at least one tensor, or `before` and them. Inf and nan show.

    With `before`, 0-d float32, tensors are added to it in their order; without it sums are float64, so that the order does not show.
    """
    if before is None:
        return torch.stack([tensor.float().square().sum(dtype=torch.float64) for tensor in tensors]).sum().float()
    for tensor in tensors:
        before = before + tensor.float().square().sum()
    return before


class MultiTensor:
    """`torch_sum_of_squares` by a multi-tensor kernel. applier, l2norm: of Transformer Engine or apex, whose interfaces are one:
    applier(l2norm, int32 flag, [tensors of one dtype], False) -> (norm, unused)."""

    def __init__(self, applier: Callable, l2norm: Callable):
        self._applier, self._l2norm = applier, l2norm

    def __call__(self, tensors: Sequence[torch.Tensor], before: torch.Tensor | None = None) -> torch.Tensor:
        if not tensors and before is None:
            raise ValueError("no tensors and nothing before them")
        kinds: dict[torch.dtype, list[torch.Tensor]] = {}
        for tensor in tensors:
            if tensor.numel():  # the kernels fail at an empty list and may at an empty tensor
                kinds.setdefault(tensor.dtype, []).extend(tensor.detach().reshape(-1).split(_LARGEST))
        total = torch.zeros((), device=tensors[0].device) if before is None else before
        for same in kinds.values():
            flag = torch.zeros(1, dtype=torch.int32, device=same[0].device)
            norm, _ = self._applier(self._l2norm, flag, [same], False)
            total = total + norm.float().square().view(())
        return total


def choose_gradient_norm(device: torch.device, trial: torch.device | None = None) -> GradientNorm:
    """The first of Transformer Engine, apex and torch that works on the device; each is tried beside torch. trial: where, if not there."""
    if device.type != "cuda":
        return GradientNorm("torch", torch_sum_of_squares, "this device has no other")
    passed_over = []
    for name, build in (("te", _te), ("apex", _apex)):
        found, said = build(device)
        problem = said if found is None else _disagreement(found, trial or device)
        if problem is None:
            return GradientNorm(name, found, "; ".join([said, *passed_over]))
        passed_over.append(f"not {name}, because {problem}")
    return GradientNorm("torch", torch_sum_of_squares, "; ".join(passed_over))


def _te(device: torch.device) -> tuple[MultiTensor | None, str]:
    """(the function, its version), or (None, why not)."""
    problem = te_problem(device)
    if problem:
        return None, problem
    try:
        return MultiTensor(*te_l2norm()), f"Transformer Engine {te_version()}"
    except Exception as error:  # whatever its libraries raise while they are loaded
        return None, f"it has no multi_tensor_l2norm ({summary(error)})"


def _apex(device: torch.device) -> tuple[MultiTensor | None, str]:
    if (
        util.find_spec("amp_C") is None
    ):  # looked for first: PyPI's apex is another program, which is better not imported
        wrong = util.find_spec("apex") is not None
        return (
            None,
            "the apex here lacks amp_C: it is another package, or built without CUDA extensions"
            if wrong
            else "it is not installed",
        )
    try:
        l2norm = importlib.import_module("amp_C").multi_tensor_l2norm
        return MultiTensor(
            importlib.import_module("apex.multi_tensor_apply").multi_tensor_applier, l2norm
        ), "NVIDIA apex"
    except Exception as error:  # as above
        return None, f"it cannot be imported ({summary(error)})"


def _disagreement(function: SumOfSquares, device: torch.device) -> str | None:
    """Why not to use the function, if it fails or finds other sums than torch; also such that are not finite."""
    few = [torch.linspace(-1, 1, size, device=device) for size in (1, 100_003)]
    try:
        for tensors in (
            few,
            [*few, torch.full((3,), torch.inf, device=device)],
            [*few, torch.full((3,), torch.nan, device=device)],
        ):
            found, wanted = function(tensors).item(), torch_sum_of_squares(tensors).item()
            if not (
                found == wanted
                or found != found
                and wanted != wanted
                or abs(found - wanted) <= _TOLERANCE * abs(wanted)
            ):
                return f"it finds {found} where torch finds {wanted}"
    except Exception as error:  # a kernel without code for this GPU
        return f"it fails ({summary(error)})"
    return None
