"""What differs between two checkpoints, tensor by tensor, whatever layout or format wrote them."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from megachat.convert.formats import open_checkpoint
from megachat.convert.opened import Opened, load_arrays

# What training goes on with. Not among them: seconds, which no two runs share, the config, the layout and the files.
_FACTS = ("step", "model", "tokenizer", "adamw_steps", "loss_scaler", "loop", "ledger")
_NOTES = ("config", "layout", "format_version", "architecture_version")
_SECONDS = ("loop.training_s",)


@dataclass(frozen=True)
class Difference:
    """One thing that differs.

    kind: "tensor" (other values), "shape", "only" (in one of the two only), "loader" and "random" (saved arrays), "fact", or "note": what
    may differ between checkpoints that are equal, such as the layout. relative: norm of right - left over that of left (Frobenius);
    max_abs: largest element of right - left; elements: how many differ; all three 0 for what is no tensor.
    """

    kind: str
    name: str
    left: str = ""
    right: str = ""
    relative: float = 0.0
    max_abs: float = 0.0
    elements: int = 0

    @property
    def counts(self) -> bool:
        """True unless it is only a note."""
        return self.kind != "note"

    def __str__(self) -> str:
        if self.kind == "tensor":
            return f"{self.name}: relative {self.relative:.3e}, largest {self.max_abs:.3e}, {self.elements:,} elements"
        if self.kind == "only":
            return f"{self.name}: only in {self.left or self.right}"
        return f"{self.name}: {self.left} and {self.right}"


def difference(left: Path, right: Path) -> list[Difference]:
    """Everything that differs: notes last; empty when both are the same to the bit.

    left, right: step folders, run folders (then the newest complete checkpoint), or folders of the other formats. Facts and arrays that only
    one format can hold are not compared. Raises UserError when one cannot be read.
    """
    return differences_of(open_checkpoint(left), open_checkpoint(right))


def differences_of(left: Opened, right: Opened) -> list[Difference]:
    """`difference` of checkpoints that are open. Reads a few tensors at a time."""
    found = []
    for name in [*left.entries, *(name for name in right.entries if name not in left.entries)]:
        pair = left.entries.get(name), right.entries.get(name)
        if None in pair:
            found.append(Difference("only", name, "the first" * (pair[1] is None), "the second" * (pair[0] is None)))
        elif pair[0].shape != pair[1].shape:
            found.append(Difference("shape", name, str(list(pair[0].shape)), str(list(pair[1].shape))))
        elif pair[0].dtype != pair[1].dtype:
            found.append(Difference("note", f"{name} dtype", pair[0].dtype, pair[1].dtype))
    common = [
        name
        for name, entry in left.entries.items()
        if name in right.entries and right.entries[name].shape == entry.shape
    ]
    for (name, one), (_, other) in zip(left.tensors(common), right.tensors(common), strict=True):
        if (changed := compared(name, one, other)) is not None:
            found.append(changed)
    facts = _facts_that_differ(left.facts, right.facts)
    found += _arrays_that_differ(left, right) + facts
    return sorted(found, key=lambda difference: not difference.counts)


def compared(name: str, left: torch.Tensor, right: torch.Tensor) -> Difference | None:
    """None when the two are equal to the bit once both have the wider dtype. NaN equals NaN; it is infinitely far from a number."""
    dtype = torch.promote_types(left.dtype, right.dtype)
    left, right = left.to(dtype).contiguous(), right.to(dtype).contiguous()
    if torch.equal(left.flatten().view(torch.uint8), right.flatten().view(torch.uint8)):
        return None
    distance = torch.where(
        left == right, 0.0, (right.float() - left.float())
    )  # the same infinity in both is no difference
    distance = torch.where(left.isnan() & right.isnan(), 0.0, distance)
    distance = torch.where(distance.isnan(), torch.inf, distance)
    norm = torch.linalg.vector_norm(left.float(), dtype=torch.float64).item()
    size = torch.linalg.vector_norm(distance, dtype=torch.float64).item()
    relative = size / norm if norm > 0 else float("inf") if size else 0.0
    return Difference("tensor", name, "", "", relative, distance.abs().max().item(), int((distance != 0).sum()))


def _flat(value, prefix: str) -> dict[str, object]:
    if isinstance(value, dict):
        return {name: leaf for key, inner in value.items() for name, leaf in _flat(inner, f"{prefix}.{key}").items()}
    return {prefix: list(value) if isinstance(value, tuple) else value}


def _facts_that_differ(left: dict, right: dict) -> list[Difference]:
    found = []
    for key in (*_FACTS, *_NOTES):
        if left.get(key) is None or right.get(key) is None:
            continue
        one, other = _flat(left[key], key), _flat(right[key], key)
        for name in dict.fromkeys((*one, *other)):
            if one.get(name) != other.get(name) and name not in _SECONDS:
                found.append(
                    Difference("fact" if key in _FACTS else "note", name, str(one.get(name)), str(other.get(name)))
                )
    return found


def _arrays_that_differ(left: Opened, right: Opened) -> list[Difference]:
    found = []
    for kind in ("loader", "random"):
        files = [
            {name for name in opened.files if name.startswith(f"{kind}/") and name.endswith(".npz")}
            for opened in (left, right)
        ]
        if not all(files):
            continue  # a format without them
        if files[0] != files[1]:  # random numbers belong to ranks: another layout has others
            found.append(
                Difference(
                    "note" if kind == "random" else "loader", kind, f"{len(files[0])} files", f"{len(files[1])} files"
                )
            )
            continue
        for name in sorted(files[0]):
            one, other = (load_arrays(opened.folder / name) for opened in (left, right))
            changed = [
                key
                for key in dict.fromkeys((*one, *other))
                if key not in one or key not in other or not np.array_equal(one[key], other[key])
            ]
            found += [
                Difference(kind, f"{name}: {key}", _brief(one.get(key)), _brief(other.get(key))) for key in changed
            ]
    return found


def _brief(array: np.ndarray | None) -> str:
    if array is None:
        return "absent"
    return f"{list(array.shape)} of {array.dtype}" if array.size > 8 else str(array.tolist())
