"""Runs the step of a capsule on one process, and names what made its loss or gradient not finite."""

import gc
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from megachat.config import config_from_values
from megachat.convert.architecture import build_trainable
from megachat.convert.megachat import open_megachat
from megachat.convert.reader import CheckpointReader
from megachat.device import DTYPES, choose_compute_dtype, dtype_name, this_device
from megachat.errors import UserError
from megachat.model.gpt import Loss, ModelOptions, run_layers
from megachat.programs.nonfinite_trace import Culprit, Trace
from megachat.train.capsule import read_capsule

MOST_ROWS = 8  # the search ends when it has this many rows


class _Model(NamedTuple):
    """The capsule's model on one process. scale: of the loss before the backward pass."""

    layers: nn.ModuleList
    loss: Loss
    rows: torch.Tensor
    scale: float

    def run(self, numbers: Sequence[int]) -> bool:
        """Runs forward and backward of some rows of the step; returns whether loss and gradients are finite."""
        self.layers.zero_grad()
        rows = self.rows[list(numbers)].to(next(self.layers.parameters()).device)
        loss = self.loss(run_layers(self.layers, rows[:, :-1].contiguous()), rows[:, 1:].contiguous())
        if not loss.isfinite():
            return False
        (loss * self.scale).backward()
        gradients = (parameter.grad for parameter in self.layers.parameters() if parameter.grad is not None)
        return bool(torch.stack([gradient.isfinite().all() for gradient in gradients]).all())

    def trace(self, numbers: Sequence[int]) -> Culprit | None:
        """Runs the rows once more and returns the first module whose values are not finite."""
        trace = Trace(_named_modules(self.layers) | {"loss": self.loss})
        with trace.watching():
            self.run(numbers)
        return trace.culprit


def _named_modules(layers: nn.ModuleList) -> dict[str, nn.Module]:
    """Returns every module by a name such as blocks.3.mlp.c_fc, but for those that several layers share."""
    uses = Counter(module for layer in layers for module in layer.modules())
    named: dict[str, nn.Module] = {}
    for number, layer in enumerate(layers):
        head = "head" if number == len(layers) - 1 else f"blocks.{number - 1}" if number else "embed"
        named |= {
            ".".join(filter(None, (head, name))): module for name, module in layer.named_modules() if uses[module] == 1
        }
    return named


def find_rows(rows: Sequence[int], finite: Callable[[Sequence[int]], bool], most: int = MOST_ROWS) -> list[list[int]]:
    """Returns the rows that are not finite alone, by bisection of rows that are not together. Stops at `most` entries.

    If no half of some rows is the cause, they are one entry: they are not finite only together.
    """
    if len(rows) == 1:
        return [list(rows)]
    causes: list[list[int]] = []
    for half in (rows[: len(rows) // 2], rows[len(rows) // 2 :]):
        if len(causes) < most and not finite(half):
            causes += find_rows(half, finite, most - len(causes))
    return causes or [list(rows)]


def micro_batches_of_step(rows: int, data_ranks: int, micro_rows: int) -> list[list[int]]:
    """Returns the rows of each micro-batch of the step, as the data ranks had them."""
    of_ranks = [list(range(rank, rows, data_ranks)) for rank in range(data_ranks)]
    return [mine[at : at + micro_rows] for mine in of_ranks for at in range(0, len(mine), micro_rows)]


def replay_capsule(folder: Path, device: str = "auto", dtype: str = "auto") -> dict:
    """Returns the report of a capsule's replay. dtype: of the computation, "auto" is the run's.

    Raises UserError if the folder is no capsule, or for another device.
    """
    rows, capsule = read_capsule(folder)
    reader = open_megachat(folder)
    where = _usable_device(device)
    compute = DTYPES[capsule["compute_dtype"]] if dtype == "auto" else choose_compute_dtype(dtype, where)[0]
    numbers, data_ranks = torch.from_numpy(rows), reader.facts["layout"]["data"]
    batches = micro_batches_of_step(len(rows), data_ranks, capsule["micro_rows"])
    scale = capsule["loss_scale"] / (len(batches) / data_ranks)
    model = _build_model(reader, numbers, where, compute, scale)
    bad, good = list[list[int]](), 0

    def finite(numbers: Sequence[int]) -> bool:
        nonlocal good
        good += (is_finite := model.run(numbers))
        return is_finite

    for batch in batches:
        if len(bad) < MOST_ROWS and not finite(batch):
            bad += find_rows(batch, finite, MOST_ROWS - len(bad))
    culprit = model.trace(bad[0]) if bad else None
    cured = None
    if bad and compute != torch.float32:
        del model
        gc.collect()
        exact = _build_model(reader, numbers, where, torch.float32, 1.0)
        cured = all(exact.run(group) for group in bad)
    return {
        "capsule": str(folder),
        "step": capsule["step"],
        "what": capsule["what"],
        "device": str(where),
        "dtype": dtype_name(compute),
        "run_device": torch.device(capsule["ranks"][0].get("device", where)).type,
        "run_dtype": capsule["compute_dtype"],
        "reproduced": bool(bad),
        "culprit": _culprit_values(culprit),
        "rows": [_row_values(group, capsule["documents"], culprit if group is bad[0] else None) for group in bad],
        "rows_of_step": len(rows),
        "all_rows": len(bad) > 1 and not good,
        "more_rows": len(bad) >= MOST_ROWS and bad[-1][-1] != batches[-1][-1],
        "float32_is_finite": cured,
        "ranks": capsule["ranks"],
        "notes": _limits_of_replay(capsule),
    }


def _build_model(reader: CheckpointReader, rows: torch.Tensor, device: torch.device, dtype: torch.dtype, scale: float):
    config = config_from_values(reader.facts["config"], str(reader.folder))
    layers = build_trainable(reader, ModelOptions(compute_dtype=dtype, rotary=config.model.rotary))
    token_bytes = torch.zeros(reader.dims.vocab_size, dtype=torch.int64)
    loss = Loss(reader.dims, token_bytes, z_loss=config.optimizer.z_loss)
    return _Model(layers.to(device).train(), loss.to(device).train(), rows, scale)


def _usable_device(name: str) -> torch.device:
    """Returns the device, after a first tensor on it. Raises UserError if torch cannot use it."""
    if name == "auto":
        return this_device()
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UserError(f"--device {name}: torch cannot use it on this machine; give cpu, or leave it out") from None
    return device


def _limits_of_replay(capsule: dict) -> list[str]:
    """Returns lines on what the replay cannot repeat, and on ranks whose copy of the weights was not finite."""
    notes = []
    if capsule["weights_changed"]:
        notes.append("the step changed the weights before the loss was read: these are those after it")
    if (fp8 := capsule["config"]["precision"]["fp8"]) != "off":
        notes.append(f"the run has precision.fp8={fp8}; the replay computes in the dtype above instead")
    notes += [
        f"rank {rank['rank']} ({rank['host']}) had {rank['weight']} not finite in its copy of the weights"
        for rank in capsule["ranks"]
        if rank["weight"]
    ]
    return notes


def _culprit_values(culprit: Culprit | None) -> dict | None:
    if culprit is None:
        return None
    return {key: value for key, value in vars(culprit).items() if key != "tokens"}


def _row_values(group: list[int], documents: list[list[dict]], culprit: Culprit | None) -> dict:
    """Returns the rows that are not finite (several only if they are so together) and their documents. "document" is
    the one in which values first are not finite: in the forward pass the first token, in the backward pass the last.
    """
    values: dict = {"rows": group, "documents": [documents[row] for row in group], "token": None, "document": None}
    if culprit is not None and culprit.tokens is not None and len(group) == 1 and not culprit.tokens.all():
        bad = culprit.tokens.nonzero().flatten().tolist()
        token = bad[0] if culprit.during == "forward" else bad[-1]
        values["token"] = token
        values["document"] = next(
            (each for each in documents[group[0]] if each["start"] <= token < each["start"] + each["tokens"]), None
        )
    return values


def report_lines(report: dict) -> list[str]:
    """Returns the report as text."""
    lines = [report["what"], f"replayed on {report['device']} in {report['dtype']}, {report['rows_of_step']} rows"]
    if not report["reproduced"]:
        lines.append(_not_reproduced(report))
    if report["culprit"]:
        lines += _culprit_lines(report["culprit"])
    lines += _row_lines(report)
    if report["float32_is_finite"] is not None:
        cure = "these rows are finite in float32" if report["all_rows"] else "float32 cures it"
        lines.append(cure if report["float32_is_finite"] else "float32 does not cure it")
    for rank in report["ranks"]:
        seen = f"loss {rank['loss']}, " if rank["loss"] is not None else ""
        bad = f"gradient of {rank['gradient']} not finite" if rank["gradient"] else "its gradients finite or not read"
        lines.append(f"rank {rank['rank']} ({rank['host']}) saw: {seen}{bad}")
    return lines + report["notes"]


def _not_reproduced(report: dict) -> str:
    computed = [(report[key], report[f"run_{key}"]) for key in ("dtype", "device")]
    if others := [run for here, run in computed if here.partition(":")[0] != run]:
        return (
            f"FINITE in {report['dtype']} on {report['device']}, but the run computed in {' on '.join(others)}: repeat "
            "with the run's device and dtype (without --dtype)"
        )
    return (
        "NOT REPRODUCED: loss and gradients of all rows are finite. The saved weights and rows do not cause it; look "
        "at the ranks below"
    )


def _culprit_lines(culprit: dict) -> list[str]:
    of = "" if culprit["during"] == "forward" else "gradient of "
    lines = [f"{culprit['during']} pass: {culprit['name']} ({culprit['kind']}) is the first that is not finite"]
    lines += _numbered(f"{of}input", culprit["inputs"]) + _numbered(f"{of}output", culprit["outputs"])
    if culprit["passed_to"]:
        lines.append(f"  computed in {culprit['name']} itself, before {culprit['passed_to']}")
        lines += _numbered("passed on", culprit["passed"])
    return lines + [f"  parameter {name}: {_facts(facts)}" for name, facts in culprit["parameters"].items()]


def _numbered(what: str, tensors: Sequence[dict]) -> list[str]:
    numbers = [f" {number}" for number in range(1, len(tensors) + 1)] if len(tensors) > 1 else [""]
    return [f"  {what}{number}: {_facts(facts)}" for number, facts in zip(numbers, tensors, strict=False)]


def _row_lines(report: dict) -> list[str]:
    if report["all_rows"]:
        count = sum(len(entry["rows"]) for entry in report["rows"])
        rows = f"all {count} rows of the step" if not report["more_rows"] else f"all {count} rows that were searched"
        return [f"{rows} are not finite: the weights are the likely cause, not a document"]
    lines = []
    for entry in report["rows"]:
        listed = ", ".join(map(str, entry["rows"]))
        lines.append(f"row {listed}" if len(entry["rows"]) == 1 else f"rows {listed}, only together")
        if entry["document"]:
            lines.append(f"  token {entry['token']}, in {_document(entry['document'])}")
        elif len(entry["rows"]) == 1:
            lines += [f"  {_document(each)}" for each in entry["documents"][0]]
    if report["more_rows"]:
        lines.append(f"the search ended after {len(report['rows'])} rows; others were not searched")
    return lines


def _facts(facts: dict) -> str:
    shape = "x".join(map(str, facts["shape"]))
    limits = "no finite element" if facts["min"] is None else f"{facts['min']:.4g} to {facts['max']:.4g}"
    largest = torch.finfo(DTYPES[facts["dtype"]]).max
    return f"{facts['dtype']} {shape}, {limits} (largest possible {largest:.5g}), {facts['not_finite']:.2%} not finite"


def _document(document: dict) -> str:
    return f"document {document['document']} of epoch {document['epoch']} ({document['place']})"
