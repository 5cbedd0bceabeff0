"""Copies of weights and optimizer state are compared by hashes of their bits.

These are copies:
- the weights, on all data ranks; on all ranks of the stage if the tensor axis does not cut them
- AdamW's state of weights that the tensor axis does not cut, on all tensor ranks
- on each rank the weights and their masters, once these are rounded to the weights' dtype

Shards of ZeRO and of the Muon partition, and rows of sparse tables, exist once. A pipeline stage has no copy of another
stage's parameters.
"""

from collections import Counter
from pathlib import Path
from typing import Any

import torch

from megachat.kernels.bit_hash import bit_hash
from megachat.parallel.collectives import all_reduce
from megachat.parallel.mesh import Axis
from megachat.parallel.rectangles import MASTER, MOMENTS
from megachat.place import is_tensor_shard
from megachat.train.build import TrainingModel
from megachat.train.corruption import MAX_TENSORS, corrupted, on_any_rank, parameter_name
from megachat.train.rank_reports import gather_reports, ranks_text

ROUNDED = "master"  # kind of copies on one rank: its weights, and its masters rounded to their dtype
# Kind of copies (the axis along which they are compared, or ROUNDED) -> the axes along which there are others with the
# same name.
_APART = {
    "data": ("tensor", "pipeline"),
    "tensor": ("data", "pipeline"),
    "stage": ("pipeline",),
    ROUNDED: ("data", "tensor", "pipeline"),
}


@torch.no_grad()
def compare_replicas(run: TrainingModel, step: int, folder: Path) -> None:
    """Compares all copies before step `step`; all ranks call it between two steps.

    folder: the run folder, which gets the evidence. Raises CorruptionError on all ranks if copies differ.
    """
    run.mesh.world.progress.note(f"hashes of copies before step {step}")
    run.muon.wait_for_gather()  # else weights are hashed while they arrive
    compared = [
        ("data", *_weights(run, run.mesh.data, cut=True)),
        ("stage", *_weights(run, run.mesh.stage, cut=False)),
        ("tensor", *_adamw_state(run)),
        (ROUNDED, *_masters(run)),
    ]
    if not on_any_rank(torch.cat([differs for *_, differs in compared]).any(), run.mesh, "hashes compared"):
        return
    different = {
        kind: {name: tensor for (name, tensor), flag in zip(copies.items(), differs.tolist(), strict=True) if flag}
        for kind, copies, differs in compared
    }
    hashes = {kind: {name: bit_hash(t).item() for name, t in copies.items()} for kind, copies in different.items()}
    reports = gather_reports(run.mesh, hashes=hashes)
    differences = disagreements(reports)
    # Suspects without a majority would accuse ranks that others clear: they count only where nothing is decided.
    accusing = [entry for entry in differences if entry["decided"]] or differences
    suspects = sorted({rank for entry in accusing for rank in entry["suspects"]})
    kept = {f"{kind}: {name}": t.cpu().clone() for kind, copies in different.items() for name, t in copies.items()}
    report = {"check": "hashes", "step": step, "suspects": suspects, "differences": differences, "ranks": reports}
    more = f"; {len(differences) - 1} more tensors differ" if len(differences) > 1 else ""
    what = f"{_replica_sentence(accusing[0], reports)}{more}"
    raise corrupted(run.mesh, folder, what, report, dict(list(kept.items())[:MAX_TENSORS]))


def disagreements(reports: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns each tensor whose copies differ: their kind as "axis", the hash on each rank, the suspects, and whether
    they are decided.

    The suspects are the ranks without the hash that most ranks have; all of them, undecided, if no hash has a majority.
    Where the weights are not their rounded masters, one of both is wrong, on that rank.
    """
    copies: dict[tuple, dict[int, int]] = {}
    for report in reports:
        for kind, hashes in report["hashes"].items():
            place = tuple(report[axis] for axis in _APART[kind])
            for name, value in hashes.items():
                copies.setdefault((kind, name, place), {})[report["rank"]] = value
    result = []
    for (kind, name, _), ranks in copies.items():
        value, count = Counter(ranks.values()).most_common(1)[0]
        majority = kind != ROUNDED and 2 * count > len(ranks)
        suspects = [rank for rank in ranks if not majority or ranks[rank] != value]
        result.append(
            {
                "tensor": name,
                "axis": kind,
                "hashes": ranks,
                "suspects": suspects,
                "decided": majority or kind == ROUNDED,
            }
        )
    return result


def _replica_sentence(entry: dict[str, Any], reports: list[dict[str, Any]]) -> str:
    ranks = ranks_text(reports[rank] for rank in entry["suspects"])
    others = [rank for rank in entry["hashes"] if rank not in entry["suspects"]]
    if entry["axis"] == ROUNDED:
        return f"on {ranks} the weights of {entry['tensor']} are not their rounded masters"
    if others:
        return f"{entry['tensor']} on {ranks} differs from its copies on ranks {others}"
    return f"the copies of {entry['tensor']} on {ranks} differ, without a majority"


Copies = tuple[dict[str, torch.Tensor], torch.Tensor]  # by name, and for each whether it differs, bool on the device


def _weights(run: TrainingModel, axis: Axis, *, cut: bool) -> Copies:
    """Returns the weights that the tensor axis cuts, or those that it does not cut. axis: of their copies."""
    parameters = [p for p in run.layers.parameters() if axis.size > 1 and is_tensor_shard(p) == cut]
    weights = {parameter_name(parameter): parameter.detach() for parameter in parameters}
    return weights, _differ(_hashes(run, weights), axis)


def _adamw_state(run: TrainingModel) -> Copies:
    """Returns this data rank's share of AdamW's state of parameters that the tensor axis does not cut.

    Where the axis cuts another parameter unevenly, the shares of its ranks may begin at other elements. These are not
    compared.
    """
    mesh = run.mesh
    names = [parameter_name(p) for p in run.layers.parameters() if mesh.tensor.size > 1 and not is_tensor_shard(p)]
    shares = {parameter_name(p): (begin, length, state) for p, begin, length, state in run.engine.adamw.fragments()}
    kinds, copies, spans = (MASTER, *MOMENTS), dict[str, torch.Tensor](), list[int]()
    nothing = torch.empty(0, device=mesh.device)
    for name in names:
        begin, length, state = shares.get(name, (0, 0, {}))
        copies |= {f"AdamW's {kind} of {name}": state.get(kind, nothing) for kind in kinds}
        spans += [begin << 32 | length] * len(kinds)  # both in one number, so that ranks can compare them like hashes
    values = torch.cat((_hashes(run, copies), torch.tensor(spans, dtype=torch.int64, device=mesh.device)))
    differs, other_span = _differ(values, mesh.tensor).chunk(2)
    return copies, differs & ~other_span


def _masters(run: TrainingModel) -> Copies:
    """Returns this rank's shards of the weights, and which of them are not their rounded masters."""
    pairs = [(f"{name}, shard of Muon", master, weight) for name, master, weight in run.muon.masters_and_weights()]
    for parameter, begin, length, state in run.engine.adamw.fragments():
        weight = parameter.detach().flatten()[begin : begin + length]
        pairs.append((f"{parameter_name(parameter)}, share of ZeRO", state[MASTER], weight))
    weights = {name: weight for name, _, weight in pairs}
    masters = {name: master.to(weight.dtype) for name, master, weight in pairs}
    return weights, _hashes(run, weights) != _hashes(run, masters)


def _hashes(run: TrainingModel, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    empty = torch.empty(0, dtype=torch.int64, device=run.mesh.device)
    return torch.stack([bit_hash(tensor) for tensor in tensors.values()]) if tensors else empty


def _differ(values: torch.Tensor, axis: Axis) -> torch.Tensor:
    """Returns for each of the values, int64 [n], whether the ranks of the axis have different ones."""
    both = torch.stack((values, ~values))  # the largest complement is that of the smallest value
    all_reduce(both, axis, "max", name="hashes of copies")
    return both[0] != ~both[1]
