"""Reads metrics.jsonl, also while its job writes it."""

import json
import os
from pathlib import Path

from megachat.errors import UserError, raise_if_unreadable
from megachat.files import METRICS_NAME


def read_metrics(run: str | os.PathLike) -> list[dict]:
    """Returns the lines of a run's metrics.jsonl, in order: one per training step or evaluation, each with "step".

    run: a run folder. Training steps have train/loss (a moving average in nats), train/loss_raw (of the step alone)
    and more, validations have val/bpb. A line that a running job has not finished is left out.

    Raises UserError if the folder has no metrics or a line is damaged.
    """
    path = Path(run) / METRICS_NAME
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise_if_unreadable(path, error)
        raise UserError(f"{run} has no {METRICS_NAME}: give the folder of a run that has trained") from None
    metrics = []
    for number, line in enumerate(lines[:-1], 1):
        try:
            metrics.append(dict(json.loads(line)))
        except (ValueError, TypeError, RecursionError):
            raise UserError(f"{path} line {number} is damaged: remove it, or resume the run, which drops it") from None
    return metrics


def steps_recorded(lines: list[dict]) -> int:
    """Returns how many steps the lines show as done: a training line has the number of its step, counted from 0, an
    evaluation or a save the number of steps before it.
    """
    return max((int(line["step"]) + ("train/loss" in line) for line in lines if "step" in line), default=0)
