"""Silent data corruption: the report of numbers that should be equal, its evidence, and the end of the job."""

import math
import socket
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from megachat.errors import CorruptionError
from megachat.files import write_json
from megachat.parallel.collectives import all_gather_objects, all_reduce
from megachat.parallel.mesh import Mesh
from megachat.place import place_of

FOLDER = "corruption"  # in the run folder
MAX_TENSORS = 8  # whose values each rank keeps
_ADVICE = (
    "test {where} before it computes again, and continue from a checkpoint on other hosts with --resume auto; "
    "docs/reliability.md says how to read the evidence"
)


@dataclass(frozen=True)
class Difference:
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


def ranks_text(reports: list[dict[str, Any]], ranks: list[int]) -> str:
    """Returns the ranks with host and device."""
    return ", ".join(f"rank {rank} ({reports[rank]['host']}, {reports[rank]['device']})" for rank in ranks)


def gather_reports(mesh: Mesh, **values: Any) -> list[dict[str, Any]]:
    """Returns every rank's values, with its host, device and place in the mesh, in rank order; all ranks call it."""
    place = {"rank": mesh.world.rank, "host": socket.gethostname(), "device": str(mesh.device)}
    place |= {axis.name: axis.rank for axis in (mesh.data, mesh.tensor, mesh.pipeline)}
    return all_gather_objects(place | values, mesh.world, name="reports of corruption")


def corrupted(mesh: Mesh, folder: Path, what: str, report: dict[str, Any], tensors: dict[str, Any]) -> CorruptionError:
    """Returns the error of all ranks, after each has kept its evidence in the run folder.

    report: with the keys step, suspects and ranks; rank 0 writes it as report.json. tensors: this rank's plain values
    and tensors, for torch.load(weights_only=True); nothing is written if it is empty.
    """
    path = folder / FOLDER / f"step_{report['step']:06d}"
    evidence = f"the evidence is in {path}"
    try:
        path.mkdir(parents=True, exist_ok=True)
        if mesh.world.rank == 0:
            write_json(path / "report.json", report)
        if tensors:
            torch.save(tensors, path / f"rank_{mesh.world.rank:05d}.pt")
    except OSError as error:  # the verdict does not depend on it
        evidence = f"the evidence could not be written to {path} ({error.strerror})"
    advice = _ADVICE.format(where=ranks_text(report["ranks"], report["suspects"]))
    return CorruptionError(f"step {report['step']}: {what}; {evidence}; {advice}")


def as_values(differences: list[Difference]) -> list[dict[str, Any]]:
    """Returns the differences as JSON values, with their sentence; a largest difference that is not finite is null."""
    values = [asdict(difference) | {"text": str(difference)} for difference in differences]
    return [value | {"largest": value["largest"] if math.isfinite(value["largest"]) else None} for value in values]
