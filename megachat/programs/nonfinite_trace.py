"""Names the first module of a model whose output, or whose gradient, is not finite."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from megachat.device import dtype_name


def tensor_facts(tensor: torch.Tensor) -> dict:
    """Returns shape, dtype, min and max of the finite elements (None without any), and the share that is not finite."""
    values = tensor.detach()
    finite = values.isfinite()
    inside = values[finite].float()
    return {
        "shape": list(values.shape),
        "dtype": dtype_name(values.dtype),
        "min": inside.min().item() if inside.numel() else None,
        "max": inside.max().item() if inside.numel() else None,
        "not_finite": 1 - finite.float().mean().item() if values.numel() else 0.0,
    }


@dataclass
class _Visit:
    """A call of a module, and the facts of the gradients of its outputs and inputs, as the backward pass makes them."""

    module: nn.Module
    name: str
    output_gradients: list[dict] = field(default_factory=list)
    input_gradients: list[dict] = field(default_factory=list)
    tokens: torch.Tensor | None = None  # bool [tokens], of the first input gradient that is not finite


@dataclass(frozen=True, kw_only=True)
class Culprit:
    """Where values first are not finite, though all that went in were finite.

    name: the module. inputs, outputs: facts of tensors, or of their gradients in the backward pass. passed_to: in the
    forward pass, the module inside of it that first got such values, or None. parameters: those of the module itself
    with values or gradients that are not finite. tokens: bool [tokens] of the row, None if that cannot be said.
    """

    during: Literal["forward", "backward"]
    name: str
    kind: str
    inputs: list[dict]
    outputs: list[dict]
    passed_to: str | None = None
    passed: list[dict] = field(default_factory=list)
    parameters: dict[str, dict]
    tokens: torch.Tensor | None


def _alias(value: Any) -> Any:
    """Returns a view of a tensor that has a gradient. The gradient of the view is what one module contributes to it,
    or gets, however many modules use the tensor.
    """
    return value.view_as(value) if isinstance(value, torch.Tensor) and value.requires_grad else value


def _floats(values: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]


def _finite(tensors: Iterable[torch.Tensor]) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


def _bad_tokens(tensors: Iterable[torch.Tensor]) -> torch.Tensor | None:
    """Returns which tokens are not finite in the first tensor [1 row, tokens, ...] that has some."""
    for tensor in tensors:
        bad = ~tensor.detach().isfinite()
        if tensor.ndim >= 3 and tensor.shape[0] == 1 and bad.any():
            return bad.flatten(2).any(dim=2)[0].cpu()
    return None


class Trace:
    """Watches one forward and backward pass of the named modules; `culprit` is what it has seen."""

    def __init__(self, modules: dict[str, nn.Module]):
        self._modules = modules
        self._visits: list[_Visit] = []
        self._forward: Culprit | None = None
        self._passed: tuple[str, list[torch.Tensor]] | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watches the passes that run inside."""
        handles: list = []
        for name, module in self._modules.items():
            handles.append(module.register_forward_pre_hook(self._entered(name), with_kwargs=True))
            handles.append(module.register_forward_hook(self._finished(name), with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _entered(self, name: str):
        def entered(module: nn.Module, args, kwargs) -> tuple:
            if not (self._forward or self._passed or _finite(inputs := _floats((args, kwargs)))):
                self._passed = name, inputs
            return tree_map(_alias, (args, kwargs))

        return entered

    def _finished(self, name: str):
        def finished(module: nn.Module, args, kwargs, output) -> Any:
            output = tree_map(_alias, output)
            inputs, outputs = _floats((args, kwargs)), _floats(output)
            if not self._forward and _finite(inputs) and not _finite(outputs):
                self._forward = self._forward_culprit(name, module, inputs, outputs)
            self._watch_gradients(_Visit(module, name), inputs, outputs)
            return output

        return finished

    def _forward_culprit(self, name: str, module: nn.Module, inputs: list, outputs: list) -> Culprit:
        passed_to, passed = self._passed or (None, [])
        bad = {key: tensor for key, tensor in module.named_parameters(recurse=False) if not _finite([tensor])}
        return Culprit(
            during="forward",
            name=name,
            kind=type(module).__name__,
            inputs=[tensor_facts(tensor) for tensor in inputs],
            outputs=[tensor_facts(tensor) for tensor in outputs],
            passed_to=passed_to,
            passed=[tensor_facts(tensor) for tensor in passed],
            parameters={key: tensor_facts(tensor) for key, tensor in bad.items()},
            tokens=_bad_tokens([*passed, *outputs]),
        )

    def _watch_gradients(self, visit: _Visit, inputs: list, outputs: list) -> None:
        self._visits.append(visit)

        def of_input(gradient: torch.Tensor) -> None:
            visit.input_gradients.append(tensor_facts(gradient))
            if visit.tokens is None:
                visit.tokens = _bad_tokens([gradient])

        def of_output(gradient: torch.Tensor) -> None:
            visit.output_gradients.append(tensor_facts(gradient))

        for tensors, note in ((outputs, of_output), (inputs, of_input)):
            for tensor in tensors:
                if tensor.requires_grad:
                    tensor.register_hook(note)

    @property
    def culprit(self) -> Culprit | None:
        """The first module in the forward pass, else in the backward pass, that makes finite values not finite."""
        return self._forward or self._backward_culprit()

    def _backward_culprit(self) -> Culprit | None:
        culprits: list[Culprit] = []
        for visit in reversed(self._visits):
            local = dict(visit.module.named_parameters(recurse=False))
            bad = {key: each.grad for key, each in local.items() if each.grad is not None and not _finite([each.grad])}
            got, gave = visit.output_gradients, visit.input_gradients
            got_finite, gave_finite = (all(facts["not_finite"] == 0 for facts in each) for each in (got, gave))
            if got and got_finite and (bad or not gave_finite):
                culprits.append(
                    Culprit(
                        during="backward",
                        name=visit.name,
                        kind=type(visit.module).__name__,
                        inputs=gave,
                        outputs=got,
                        parameters={key: tensor_facts(gradient) for key, gradient in bad.items()},
                        tokens=visit.tokens,
                    )
                )
        innermost = (
            each for each in culprits if not any(other.name.startswith(f"{each.name}.") for other in culprits)
        )  # the last one of the forward pass is the first one of the backward pass
        return next(innermost, None)
