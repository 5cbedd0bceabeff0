"""The learning-rate range test (Smith 2017, arXiv 1506.01186): one run whose rates rise exponentially by step.

The rate at which the loss falls fastest is a guess, no more: from random weights the loss falls at any rate, so the
place depends on how long the ramp is.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megachat.config import Config
from megachat.errors import UserError
from megachat.planning.plan import RATES
from megachat.schedule import ramp_multiplier
from megachat.studies.runs import RunRecord, flat_config, is_run, load_run
from megachat.studies.trials import Diverged, Train, Trial

_LEAST_POINTS = 20  # points without which there is no slope


def range_trial(rates: Sequence[str], low: float, high: float) -> Trial:
    """Returns the run of a test. rates: keys of Plan.rates that rise, all if empty. low, high: factors at its ends."""
    return Trial(
        "_".join(("range_test", *rates)),
        (
            f"optimizer.ramp={json.dumps([low, high])}",
            f"optimizer.ramp_rates={json.dumps(list(rates))}",
            "optimizer.warmup_steps=0",
            "optimizer.warmup_ratio=null",
            "optimizer.warmdown_ratio=0",
            "evaluate.every=0",
            "checkpoint.every=0",
            "log.every=1",
        ),
    )


def run_range_test(train: Train, trial: Trial, config: Config, folder: Path) -> dict[str, Any]:
    """Trains a test in `folder` until its loss diverges, unless it has. Returns its result as JSON values: see _read,
    and "suggested": "optimizer.key" -> its value times the factor of the steepest fall.

    config: of the trial. Raises UserError if the run is too short, or if one of another config is there.
    """

    def diverged(record: RunRecord) -> bool:
        return _ramp_results(record, config)["diverged"] is not None

    run, burst = load_run(folder / trial.name) if is_run(folder / trial.name) else None, False
    if run is not None:
        _check_same_config(run, config)
    if run is None or not diverged(run):
        try:
            run = train(trial, diverged)
        except Diverged as error:
            run, burst = error.run, True
    result = _ramp_results(run, config)
    if burst and result["points"] and result["diverged"] is None:
        result["diverged"] = result["points"][-1][0]
    if result["steepest"] is None:
        raise UserError(
            f"{run.folder} has fewer than {_LEAST_POINTS} steps, too few for a slope: give more horizon.steps"
        )
    rates = config.optimizer.ramp_rates or list(run.plan["rates"])
    keys = dict.fromkeys(RATES[rate].setting for rate in rates)
    factor = result["steepest"]
    return result | {"suggested": {f"optimizer.{key}": getattr(config.optimizer, key) * factor for key in keys}}


def _check_same_config(run: RunRecord, config: Config) -> None:
    """Raises UserError if the run was trained with other settings: its losses belong to other factors then."""
    here, saved = flat_config(config.model_dump(mode="json", exclude_defaults=True)), flat_config(run.config)
    differ = [key for key in sorted(here.keys() | saved.keys()) if here.get(key) != saved.get(key)]
    if differ := [key for key in differ if key not in ("run.name", "run.folder")]:
        value = json.dumps(saved.get(differ[0])) if differ[0] in saved else "the default"
        raise UserError(f"{run.folder} has a range test of other settings ({differ[0]} is {value}): give another --out")


def _ramp_results(run: RunRecord, config: Config) -> dict[str, Any]:
    """Returns the factors of a ramp, as JSON values, where the smoothed loss falls fastest, is lowest, and has risen
    from there by half of what it fell (null: never). "points" are [factor, loss, smoothed loss].
    """
    lines = run.lines_with("train/loss")
    factors = np.array([ramp_multiplier(config.optimizer, line["step"], run.plan["steps"]) for line in lines])
    losses = np.array([line.get("train/loss_raw", line["train/loss"]) for line in lines], dtype=np.float64)
    result: dict[str, Any] = {"steepest": None, "lowest": None, "diverged": None, "points": []}
    if len(lines) < _LEAST_POINTS:
        return result
    width = max(2, len(lines) // 20)  # smoothed in a window around each point, which does not lag behind
    smooth = np.array([losses[max(0, n - width) : n + width + 1].mean() for n in range(len(losses))])
    lowest = int(np.argmin(smooth))
    slopes = np.gradient(smooth, np.log(factors))
    fall = slopes[: lowest + 1]
    result["points"] = [list(point) for point in zip(factors.tolist(), losses.tolist(), smooth.tolist(), strict=True)]
    result["steepest"], result["lowest"] = float(factors[np.argmin(fall)]), float(factors[lowest])
    risen = np.flatnonzero(smooth[lowest:] > smooth[lowest] + (smooth[0] - smooth[lowest]) / 2)
    if risen.size and lowest > width:
        result["diverged"] = float(factors[lowest + risen[0]])
    return result


def range_lines(result: Mapping[str, Any], fits: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns what a test suggests as lines of text, beside the optima of a sweep."""
    end = f"{result['diverged']:.3g} times" if result["diverged"] else "no factor of the ramp"
    lines = [
        f"range test: the loss falls fastest at {result['steepest']:.3g} times the rates, is lowest at "
        f"{result['lowest']:.3g} times, and diverges at {end}"
    ]
    for key, value in result["suggested"].items():
        swept = [fit for fit in fits if fit["key"] == key]
        others = [f"{fit['value']:.3g}" + "".join(f" at {k}={v}" for k, v in fit["others"].items()) for fit in swept]
        beside = f"; the sweep's optimum is {', '.join(others)}" if others else ""
        lines.append(f"  {key}: {value:.3g}{beside}")
    lines.append(
        "a range test is a guess: it was reported to be unreliable for transformers, and from random weights its place "
        "moves with the length of the ramp; a short sweep with its noise decides"
    )
    return lines
