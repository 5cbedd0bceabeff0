"""What every rank reports, with its host, device and place in the mesh."""

import socket
from collections.abc import Iterable
from typing import Any

from megachat.parallel.collectives import all_gather_objects
from megachat.parallel.mesh import Mesh

Report = dict[str, Any]


def gather_reports(mesh: Mesh, **values: Any) -> list[Report]:
    """Returns every rank's values, with its host, device and place in the mesh, in rank order; all ranks call it."""
    report = {"rank": mesh.world.rank, "host": socket.gethostname(), "device": str(mesh.device)}
    report |= {axis.name: axis.rank for axis in (mesh.data, mesh.tensor, mesh.pipeline)}
    return all_gather_objects(report | values, mesh.world, name="reports of the ranks")


def ranks_text(reports: Iterable[Report]) -> str:
    """Returns the ranks of the reports with host and device."""
    return ", ".join(f"rank {report['rank']} ({report['host']}, {report['device']})" for report in reports)
