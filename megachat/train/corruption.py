"""Silent data corruption: the report of numbers that should be equal, its evidence, and the end of the job."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from megachat.errors import CorruptionError, how_to_resume, summary
from megachat.files import free_name, write_json
from megachat.parallel.collectives import all_gather_objects, all_reduce, barrier
from megachat.parallel.mesh import Mesh
from megachat.place import place_of
from megachat.train.rank_reports import ranks_text

FOLDER = "corruption"  # in the run folder
MAX_TENSORS = 8  # whose values each rank keeps
_ADVICE = (
    "test {where} before it computes again, and continue from a checkpoint on other hosts with {how}; "
    "docs/reliability.md says how to read the evidence"
)


@dataclass(frozen=True)
class TensorDifference:
    """A tensor whose two versions differ. different: of its elements, in a bit. largest: absolute difference, inf if
    one of two different elements is not finite or the shapes differ.
    """

    tensor: str
    elements: int
    different: int
    largest: float

    def __str__(self) -> str:
        return f"{self.tensor}: {self.different:,} of {self.elements:,} elements by at most {self.largest:.3g}"


def on_any_rank(problem: torch.Tensor, mesh: Mesh, name: str) -> bool:
    """Returns whether any rank has a problem, 0-d bool; all ranks call it, and the host waits for the device."""
    worst = problem.to(mesh.device, torch.float32)
    all_reduce(worst, mesh.world, "max", name=name)
    return worst.item() > 0


def parameter_name(parameter: torch.nn.Parameter) -> str:
    """Returns the checkpoint name of a parameter, with its index if it is one element of a named tensor."""
    place = place_of(parameter)
    part = place.offset if place.cut == "whole" and place.offset else ()
    return place.name + (f"[{', '.join(map(str, part))}]" if part else "")


def corrupted(mesh: Mesh, folder: Path, what: str, report: dict[str, Any], tensors: dict[str, Any]) -> CorruptionError:
    """Returns the error of all ranks, after each has kept its evidence in the run folder, beside earlier evidence.

    report: with the keys step, suspects and ranks; rank 0 writes it as report.json. tensors: this rank's plain values
    and tensors, for torch.load(weights_only=True); nothing is written if it is empty.
    """
    path = all_gather_objects(free_name(folder / FOLDER / f"step_{report['step']:06d}", ""), mesh.world)[0]
    evidence = f"the evidence is in {path}"
    try:
        path.mkdir(parents=True, exist_ok=True)
        if mesh.world.rank == 0:
            write_json(path / "report.json", report)
        if tensors:
            torch.save(tensors, path / f"rank_{mesh.world.rank:05d}.pt")
    except (OSError, RuntimeError) as error:  # torch.save raises both; the verdict does not depend on it
        evidence = f"the evidence could not be written to {path} ({summary(error)})"
    barrier(mesh.world, name="evidence of corruption")  # a launcher ends all ranks when the first has ended
    advice = _ADVICE.format(where=ranks_text(report["ranks"][rank] for rank in report["suspects"]), how=how_to_resume())
    return CorruptionError(f"step {report['step']}: {what}; {evidence}; {advice}")


def as_values(differences: list[TensorDifference]) -> list[dict[str, Any]]:
    """Returns the differences as JSON values, with their sentence; a largest difference that is not finite is null."""
    values = [asdict(difference) | {"text": str(difference)} for difference in differences]
    return [value | {"largest": value["largest"] if math.isfinite(value["largest"]) else None} for value in values]
