"""Replay: one micro-batch runs forward and backward twice from one state, and every bit must be equal.

Both results are thrown away before the step begins, so a run with replays computes what it computes without. They run
by the engine's schedule, so all communication of the layout takes part. Recorded hashes of everything that a rank sends
show on which rank a difference began.
"""

import math
from pathlib import Path
from typing import Any

import torch

from megachat.device import random_states, restore_random_states
from megachat.kernels.bit_hash import bits_differ
from megachat.parallel.instructions import BACKWARD
from megachat.parallel.mesh import Mesh
from megachat.train.build import TrainingModel
from megachat.train.corruption import (
    MAX_TENSORS,
    TensorDifference,
    as_values,
    corrupted,
    on_any_rank,
    parameter_name,
)
from megachat.train.rank_reports import gather_reports, ranks_text

LOSS = "loss"
Results = dict[str, torch.Tensor]
Sent = list[tuple[str, int]]


def replay_micro_batch(run: TrainingModel, rows: torch.Tensor, step: int, folder: Path) -> None:
    """Runs this rank's first micro-batch of `rows`, int64 [rows, tokens + 1], twice; all ranks call it before a step.

    folder: the run folder, which gets the evidence. Raises CorruptionError on all ranks if a rank's loss, gradients,
    buffers or random numbers differ by more than reliability.replay_tolerance. No weight or state changes.
    """
    rows, tolerance = rows[: run.plan.micro_rows], run.config.reliability.replay_tolerance
    micro_batch = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
    run.mesh.world.progress.note(f"replay of a micro-batch before step {step}")
    state = _saved_state(run)
    first, first_sent = _run_once(run, micro_batch)
    # on the host, so that the device needs no more memory than in a step
    first = {name: tensor.to("cpu", copy=True) for name, tensor in first.items()}
    _restore(run, state)
    second, second_sent = _run_once(run, micro_batch)
    differences = compare_results(first, second, tolerance)
    if not on_any_rank(torch.tensor(bool(differences)), run.mesh, "replay compared"):
        _restore(run, state)
        return
    kept = {difference.tensor for difference in differences[:MAX_TENSORS]}
    evidence = {
        side: {name: results[name].cpu() for name in results.keys() & kept}
        for side, results in (("first", first), ("second", second))
    }
    event = None if tolerance else _first_difference(first_sent, second_sent, run.mesh)
    reports = gather_reports(run.mesh, differences=as_values(differences), event=event)
    report: dict[str, Any] = {"check": "replay", "step": step, "tolerance": tolerance}
    report |= {"suspects": suspects(reports, coupled=bool(run.rows.tables)), "ranks": reports}
    tensors = {"rows": rows.cpu(), **evidence} if differences else {}
    raise corrupted(run.mesh, folder, _replay_sentence(report), report, tensors)


def compare_results(first: Results, second: Results, tolerance: float) -> list[TensorDifference]:
    """Returns the tensors whose difference is above the tolerance, in the order of `second`, then those it lacks.

    The tensors of `second` may be on a device: those of `first` are moved there one by one. tolerance: as a share of
    the tensor's largest magnitude; at 0 every bit counts.
    """
    differences = []
    for name in [*second, *(first.keys() - second.keys())]:
        if name not in first or name not in second or first[name].shape != second[name].shape:
            elements = max(results[name].numel() for results in (first, second) if name in results)
            differences.append(TensorDifference(name, elements, elements, math.inf))
            continue
        now = second[name]
        before = first[name].to(now.device)
        where = bits_differ(before, now)
        if not (count := int(where.sum())):
            continue
        largest = (now[where].double() - before[where].double()).abs().max().item()
        if not tolerance or not largest <= tolerance * before.double().abs().max().item():
            largest = largest if math.isfinite(largest) else math.inf
            differences.append(TensorDifference(name, now.numel(), count, largest))
    return differences


def suspects(reports: list[dict[str, Any]], *, coupled: bool) -> list[int]:
    """Returns the ranks on which a difference began, from the reports of all ranks.

    A rank that computes wrong numbers sends them to others of its data rank, or of its stage if the data ranks are
    coupled by sparse tables. So those count that sent a different value first: in the forward pass the first stage, in
    the backward pass the last one. Where nothing that was sent differs, the rank with a difference is alone with it.
    """
    ranks = []
    for group in {0 if coupled else report["data"] for report in reports}:
        members = [report for report in reports if coupled or report["data"] == group]
        orders = {report["rank"]: tuple(report["event"]["order"]) for report in members if report["event"]}
        if orders:
            ranks += [rank for rank, order in orders.items() if order == min(orders.values())]
        else:
            ranks += [report["rank"] for report in members if report["differences"]]
    return sorted(ranks)


def _saved_state(run: TrainingModel) -> Results:
    """Returns copies of what a forward pass may change: the model's buffers and the generators' states."""
    state = {f"buffer {name}": buffer.clone() for name, buffer in _buffers(run).items()}
    return state | _random_states(run.mesh.device)


def _buffers(run: TrainingModel) -> Results:
    return dict(run.engine.module.named_buffers())


def _random_states(device: torch.device) -> Results:
    return {f"random numbers ({kind})": state for kind, state in random_states(device).items()}


@torch.no_grad()
def _restore(run: TrainingModel, state: Results) -> None:
    """Forgets the gradients of a pass and restores the state before it."""
    for optimizer in run.optimizers.values():
        optimizer.discard_gradients()
    for name, buffer in _buffers(run).items():
        buffer.copy_(state[f"buffer {name}"])
    kinds = {"cpu", run.mesh.device.type}
    restore_random_states({kind: state[f"random numbers ({kind})"] for kind in kinds}, run.mesh.device)


def _run_once(run: TrainingModel, micro_batch: tuple[torch.Tensor, torch.Tensor]) -> tuple[Results, Sent]:
    """Returns this rank's results of forward and backward, gradients in the order of the backward pass, and the hashes
    of what it sent. The tensors are live.
    """
    progress = run.mesh.world.progress
    progress.sent = []
    try:
        loss = run.engine.run_micro_batch(micro_batch)
        sent = progress.sent
    finally:
        progress.sent = None
    results = {} if loss is None else {LOSS: loss}
    gradients = {parameter_name(parameter): g for parameter, g in run.engine.adamw.accumulated_gradients()}
    gradients |= run.muon.collected_gradients()
    order = [parameter_name(parameter) for parameter in run.layers.parameters()]
    results |= {f"gradient of {name}": gradients[name] for name in reversed(order) if name in gradients}
    run.rows.wait_for_reduce()
    for name, (index, rows) in run.rows.gradient_rows().items():
        results |= {f"gradient of rows of {name}": rows, f"rows of {name} that were read": index}
    results |= {f"buffer {name}": buffer for name, buffer in _buffers(run).items()}
    hashes = torch.stack([value for _, value in sent]).tolist() if sent else []
    names = [name for name, _ in sent]
    return results | _random_states(run.mesh.device), list(zip(names, hashes, strict=True))


def _first_difference(first: Sent, second: Sent, mesh: Mesh) -> dict[str, Any] | None:
    """Returns the first value that this rank sent and that differs: its name, pass and number, and its place in the
    order in which stages compute.
    """
    backward = first.index((BACKWARD, 0))
    for number, (before, now) in enumerate(zip(first, second, strict=False)):
        if before != now:
            in_backward = number > backward
            stage = -mesh.pipeline.rank if in_backward else mesh.pipeline.rank  # the last stage is first in backward
            order = [int(in_backward), stage, number]
            return {"sent": now[0], "pass": BACKWARD if in_backward else "forward", "number": number, "order": order}
    return None


def _replay_sentence(report: dict[str, Any]) -> str:
    """Returns what differs, on which rank it began, and what that means."""
    reports, ranks = report["ranks"], report["suspects"]
    differing = [entry for entry in reports if entry["differences"]]
    example = next((reports[rank] for rank in ranks if reports[rank]["differences"]), differing[0])
    text, more = example["differences"][0]["text"], len(example["differences"]) - 1
    event = reports[ranks[0]]["event"]
    began = f", which began in the {event['pass']} pass in what it sent for: {event['sent']}" if event else ""
    hint = ""
    if len(ranks) == len(reports) > 1:
        hint = "; all ranks differ, so the kernels may not be deterministic: see reliability.replay_tolerance"
    return (
        f"{ranks_text(reports[rank] for rank in ranks)} computed another result when a micro-batch was replayed"
        f"{began}; rank {example['rank']} differs in {text}{f' and {more} more tensors' if more else ''}; "
        f"{len(differing)} of {len(reports)} ranks differ; no weight was changed by this step{hint}"
    )
