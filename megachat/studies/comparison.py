"""Compares the curves of runs: what one recipe needs to reach another's value, whether the comparison is fair."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megachat.config import Config
from megachat.errors import UserError
from megachat.studies.curves import AXES, Curve, axis_ratio, common_value, curve_of, noise_of, overall_verdict
from megachat.studies.runs import RunRecord, given_twice, load_run, newest_facts, newest_start
from megachat.text import text_table

_WORDS = {"steps": "steps", "seconds": "time", "flops": "FLOPs"}
_CONSEQUENCES = {  # what differs -> what follows
    "tokenizer": "bits per byte stay comparable, train/loss (per token) and numbers of tokens do not",
    "validation rows": "values of other rows are not comparable",
    "row length": "longer rows have more context, which lowers the loss by itself",
    "packing": "rows are made of other parts of the text, in another order",
    "cropped share": "another part of the text is left out",
    "device": "seconds are not comparable",
    "layout": "seconds are not comparable; steps and FLOPs are",
}
_CROPPED_TOLERANCE = 0.02  # each rank counts the rows that it has read


def load_runs(folders: Sequence[Path]) -> list[RunRecord]:
    """Loads one side's runs. Raises UserError if one is no run or is given twice."""
    if twice := given_twice(folders):
        raise UserError(f"{twice[0]} is given twice on one side: give each run once")
    return [load_run(folder) for folder in folders]


def compare_curves(first: Sequence[RunRecord], second: Sequence[RunRecord], key: str = "val/bpb") -> dict[str, Any]:
    """Returns as JSON values: the value that all curves reach, and per axis the ratio second / first with its interval
    and verdict. Also the overall verdict, the noise of each curve, and warnings where the comparison is not fair.

    Raises UserError if a run has no curve or the curves share no values.
    """
    sides = left, right = tuple([_curve(run, key) for run in side] for side in (first, second))
    warnings = fairness_warnings(first, second)
    try:
        value = common_value(left, right)
    except UserError as error:
        raise UserError("; ".join([str(error), *warnings])) from None
    ratios = {axis: axis_ratio(left, right, value, axis) for axis in AXES}
    return {
        "runs": [[str(run.folder) for run in side] for side in (first, second)],
        "metric": key,
        "value": value,
        "last": [[float(curve.values[-1]) for curve in side] for side in sides],
        "noise": [[noise_of(curve) for curve in side] for side in sides],
        "axes": {axis: ratio and {**ratio._asdict(), "verdict": ratio.verdict} for axis, ratio in ratios.items()},
        "verdict": overall_verdict(ratios),
        "seeds": [len(side) for side in sides],
        "warnings": warnings,
    }


def compare_last(
    first: Sequence[RunRecord], second: Sequence[RunRecord], key: str = "val/bpb"
) -> dict[str, Any] | None:
    """Returns the last values as JSON values, and why curves cannot be compared, where a run has a single value.

    None if every run has a curve, or one has no value at all.
    """
    values = {run.folder: run.values(key) for run in (*first, *second)}
    short = [folder for folder, recorded in values.items() if len(recorded) == 1]
    if not short or not all(values.values()):
        return None
    often = "validate more often (evaluate.every)" if key.startswith("val/") else "train longer"
    return {
        "runs": [[str(run.folder) for run in side] for side in (first, second)],
        "metric": key,
        "last": [[values[run.folder][-1] for run in side] for side in (first, second)],
        "no_curve": f"{short[0]} has one value of {key}, and a curve needs 2: {often}",
        "verdict": "cannot tell",
        "warnings": fairness_warnings(first, second),
    }


def _curve(run: RunRecord, key: str) -> Curve:
    try:
        return curve_of(run.lines, key)
    except UserError as error:
        raise UserError(f"{run.folder}: {error}") from None


def fairness_warnings(first: Sequence[RunRecord], second: Sequence[RunRecord]) -> list[str]:
    """Returns one sentence for each thing that differs between runs and that moves the values or an axis by itself."""
    traits = {run.folder: _traits(run) for run in (*first, *second)}
    reference, *others = traits.values()
    folder = first[0].folder
    both = {run.folder.resolve() for run in first} & {run.folder.resolve() for run in second}
    warnings = [f"run: {each} is on both sides; give another run, or its difference says nothing" for each in both]
    for name, text in _CONSEQUENCES.items():
        for other_folder, other in zip(list(traits)[1:], others, strict=True):
            if not _same(reference[name], other[name]):
                one, two = _short_fact(reference[name]), _short_fact(other[name])
                warnings.append(f"{name}: {folder} has {one}, {other_folder} has {two}; {text}")
                break
    return warnings


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other) <= _CROPPED_TOLERANCE
    return one == other


def _traits(run: RunRecord) -> dict[str, Any]:
    """Returns what is compared; None where the run has no such value."""
    plan, data = run.plan, Config().data.model_copy(update=dict(run.config.get("data", {})))
    cropped, start = run.values("data/cropped_share"), newest_start(run.folder)
    shards = (start.get("data") or {}).get("shards") or {}
    shard, digest = next(reversed(shards.items()), (None, None))  # the last one is for validation
    fingerprint = newest_facts(run.folder).get("tokenizer", {}).get("fingerprint")
    return {
        "tokenizer": fingerprint or (start.get("tokenizer") or {}).get("fingerprint"),
        "validation rows": (plan.get("evaluation_rows"), f"{shard} {digest[:12]}" if digest else data.folder),
        "row length": plan.get("dims", {}).get("sequence_len"),
        "packing": (data.streams, data.buffer_documents, data.shuffle),
        "cropped share": cropped[-1] if cropped else None,
        "device": start.get("device"),
        "layout": tuple(plan.get("layout", {}).values()),
    }


def curve_lines(comparison: dict[str, Any]) -> list[str]:
    """Returns the comparison as lines of text."""
    sides, metric, value = comparison["runs"], comparison["metric"], comparison["value"]
    names = [", ".join(Path(run).name for run in side) for side in sides]
    lasts = [sum(side) / len(side) for side in comparison["last"]]
    rows = [(metric, "last", "noise of a value")]
    rows += [
        (name, f"{last:.4f}", f"{max(noise):.4f}")
        for name, last, noise in zip(names, lasts, comparison["noise"], strict=True)
    ]
    lines = text_table(rows, right=(1, 2))
    lines.append(f"to {metric} {value:.4f}, which all reach, {names[1]} needs, relative to {names[0]}:")
    for axis, ratio in comparison["axes"].items():
        if ratio is None:
            lines.append(f"  {_WORDS[axis]}: not known there")
        else:
            interval = f"{ratio['low']:.3f} to {ratio['high']:.3f}"
            lines.append(f"  {ratio['value']:.3f} of the {_WORDS[axis]} ({interval}): {ratio['verdict']}")
    lines.append(f"verdict on {names[1]}: {comparison['verdict']}")
    if min(comparison["seeds"]) < 2:
        lines.append(
            "a side has one run: the intervals show the noise of the curves only, not that from run to run; "
            "give several seeds per side"
        )
    return lines + [f"warning: {text}" for text in comparison["warnings"]]


def last_lines(comparison: dict[str, Any]) -> list[str]:
    """Returns the comparison of last values as lines of text."""
    names = [", ".join(Path(run).name for run in side) for side in comparison["runs"]]
    lasts = [sum(side) / len(side) for side in comparison["last"]]
    rows = [(comparison["metric"], "last"), *zip(names, (f"{last:.4f}" for last in lasts), strict=True)]
    return [
        *text_table(rows, right=(1,)),
        f"{names[1]} ends {lasts[1] - lasts[0]:+.4f} from {names[0]}; whether that is more than noise cannot be told",
        f"curves are not compared: {comparison['no_curve']}",
        *(f"warning: {text}" for text in comparison["warnings"]),
    ]


def _short_fact(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.2f}"
    return "none recorded" if value is None else value[:12] if isinstance(value, str) else str(value)
