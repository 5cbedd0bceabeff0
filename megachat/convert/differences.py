"""Compares two checkpoints tensor by tensor and fact by fact, whatever layout or format wrote them."""

import json
from dataclasses import dataclass

import numpy as np
import torch

from megachat.config import config_from_values
from megachat.convert.reader import CheckpointReader, load_arrays
from megachat.files import LOADER, RANDOM
from megachat.text import shortened

# A difference in _FACTS counts: training continues from them. One in _NOTES does not, nor does a duration.
_FACTS = ("step", "model", "tokenizer", "adamw_steps", "loss_scaler", "loop", "ledger")
_NOTES = ("config", "layout", "format_version", "architecture_version")
_PLACES = ("config.run.name", "config.run.folder", "config.data.tokenizer")  # a conversion gives a run new ones
_DURATIONS = ("loop.training_s",)
_KIND_TITLES = {  # for people
    "tensor": "tensors with other values",
    "shape": "tensors with other shapes",
    "only": "only in one of the two",
    "fact": "facts",
    "note": "notes, which do not count",
}


@dataclass(frozen=True)
class CheckpointDifference:
    """One difference between two checkpoints.

    kind: "tensor" (values), "shape", "only" (present in one of the two), "loader" and "random" (saved arrays), "fact",
    "setting", or "note": what may differ between equal checkpoints, for example the layout. relative: Frobenius norm of
    right - left over that of left; max_abs: largest element of right - left; elements: how many differ. All three are 0
    for anything but a tensor.
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


def summarize(differences: list[CheckpointDifference]) -> str:
    """Returns how many differences count, and a line for each kind: how many and the largest of tensors, or names."""
    counted = sum(difference.counts for difference in differences)
    lines = [f"{counted} differences" if counted else "equal"]
    for kind in dict.fromkeys(difference.kind for difference in differences):
        of_kind = [difference for difference in differences if difference.kind == kind]
        names = shortened((each.name for each in of_kind), 3)
        if kind == "tensor":
            names = f"most in {max(of_kind, key=lambda each: each.relative)}"
        lines.append(f"  {len(of_kind)} {_KIND_TITLES.get(kind, kind)}: {names}")
    return "\n".join(lines)


def compare_checkpoints(left: CheckpointReader, right: CheckpointReader) -> list[CheckpointDifference]:
    """Returns every difference, notes last; an empty list if both are the same to the bit. Reads a few tensors at a
    time.

    Facts and arrays that only one of the formats can hold are not compared.
    """
    differences = []
    for name in dict.fromkeys((*left.entries, *right.entries)):
        one, other = left.entries.get(name), right.entries.get(name)
        if one is None or other is None:
            differences.append(
                CheckpointDifference(
                    "only", name, "the first" if other is None else "", "the second" if one is None else ""
                )
            )
        elif one.shape != other.shape:
            differences.append(CheckpointDifference("shape", name, str(list(one.shape)), str(list(other.shape))))
        elif one.dtype != other.dtype:
            differences.append(CheckpointDifference("note", f"{name} dtype", one.dtype, other.dtype))
    common = [name for name in left.entries if name in right.entries]
    common = [name for name in common if left.entries[name].shape == right.entries[name].shape]
    for (name, first), (_, second) in zip(left.tensors(common), right.tensors(common), strict=True):
        if (difference := compare_tensors(name, first, second)) is not None:
            differences.append(difference)
    differences += _compare_arrays(left, right) + _compare_facts(left.facts, right.facts)
    return sorted(differences, key=lambda difference: not difference.counts)


def compare_tensors(name: str, left: torch.Tensor, right: torch.Tensor) -> CheckpointDifference | None:
    """Returns None if both are equal to the bit in the wider dtype. NaN equals NaN, and no number."""
    dtype = torch.promote_types(left.dtype, right.dtype)
    left, right = left.to(dtype).contiguous(), right.to(dtype).contiguous()
    if torch.equal(left.flatten().view(torch.uint8), right.flatten().view(torch.uint8)):
        return None
    equal = (left == right) | (left.isnan() & right.isnan())  # the difference of two equal infinities would be NaN
    distance = torch.where(equal, 0.0, right.float() - left.float())
    distance = torch.where(distance.isnan(), torch.inf, distance)
    norm = torch.linalg.vector_norm(left.float(), dtype=torch.float64).item()
    size = torch.linalg.vector_norm(distance, dtype=torch.float64).item()
    relative = size / norm if norm > 0 else float("inf") if size else 0.0
    return CheckpointDifference(
        "tensor", name, "", "", relative, distance.abs().max().item(), int((distance != 0).sum())
    )


def _flatten(value, prefix: str) -> dict[str, object]:
    if isinstance(value, dict):
        parts = (_flatten(inner, f"{prefix}.{key}") for key, inner in value.items())
        return {name: leaf for part in parts for name, leaf in part.items()}
    if isinstance(value, (list, tuple)) and any(isinstance(inner, dict) for inner in value):
        return _flatten(dict(enumerate(value)), prefix)
    if isinstance(value, (list, tuple)):
        return {prefix: list(value)} if value else {}  # older checkpoints lack what new ones have an empty list of
    return {prefix: value}


def _compare_facts(left: dict, right: dict) -> list[CheckpointDifference]:
    differences = []
    for key in (*_FACTS, *_NOTES):
        if left.get(key) is None or right.get(key) is None:
            continue
        one, other = _flatten(left[key], key), _flatten(right[key], key)
        for name in dict.fromkeys((*one, *other)):
            if one.get(name) != other.get(name) and name not in _DURATIONS:
                kind = "fact" if key in _FACTS else "note"
                differences.append(CheckpointDifference(kind, name, str(one.get(name)), str(other.get(name))))
    return differences


def compare_settings(left: dict, right: dict) -> tuple[int, list[CheckpointDifference]]:
    """Returns (how many settings the facts of both checkpoints have, each that differs).

    Settings are a config's, with its defaults, but not those that say where a run is (_PLACES), and what nanochat's
    files say beside tensors: meta file and parameter groups.
    """
    count, differences = 0, []
    for key in ("config", "imported"):
        if left.get(key) is None or right.get(key) is None:
            continue
        one, other = (
            _flatten(_with_defaults(side[key]) if key == "config" else side[key], key) for side in (left, right)
        )
        names = [name for name in dict.fromkeys((*one, *other)) if name not in _PLACES]
        count += len(names)
        for name in names:
            if name not in one or name not in other or json.dumps(one[name]) != json.dumps(other[name]):
                differences.append(CheckpointDifference("setting", name, str(one.get(name)), str(other.get(name))))
    return count, differences


def _with_defaults(config: dict) -> dict:
    return config_from_values(config, "the checkpoint's config").model_dump(mode="json")


def _compare_arrays(left: CheckpointReader, right: CheckpointReader) -> list[CheckpointDifference]:
    differences = []
    for kind in (LOADER, RANDOM):
        prefix = f"{kind}/"
        one, other = (
            {name for name in side.files if name.startswith(prefix) and name.endswith(".npz")} for side in (left, right)
        )
        if not one or not other:
            continue  # a format without such files
        if one != other:  # random state belongs to ranks, and another layout has other ranks
            counted = "note" if kind == RANDOM else LOADER
            differences.append(CheckpointDifference(counted, kind, f"{len(one)} files", f"{len(other)} files"))
            continue
        for name in sorted(one):
            first, second = load_arrays(left.folder / name), load_arrays(right.folder / name)
            for key in dict.fromkeys((*first, *second)):
                pair = first.get(key), second.get(key)
                if pair[0] is None or pair[1] is None or not np.array_equal(pair[0], pair[1]):
                    shown = [_array_in_words(array) for array in pair]
                    differences.append(CheckpointDifference(kind, f"{name}: {key}", shown[0], shown[1]))
    return differences


def _array_in_words(array: np.ndarray | None) -> str:
    if array is None:
        return "absent"
    return f"{list(array.shape)} of {array.dtype}" if array.size > 8 else str(array.tolist())
