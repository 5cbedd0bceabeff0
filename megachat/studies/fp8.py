"""Whether FP8 pays for a config: which matrices gain, whether the loss of a paired run stays in its gate, and the time
to an equal loss. Pure; the measurement is megachat/programs/fp8_check.py.
"""

import math
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from megachat.errors import UserError
from megachat.studies.comparison import compare_curves
from megachat.studies.curves import Ratio, interval_of_ratios, median_ratio
from megachat.studies.runs import RunRecord
from megachat.text import text_table

HEAD = "lm_head"
LAST_SHARE = 0.25  # of the steps, whose losses are averaged at the end
UNTIMED_RUN_STEPS = 3  # of each run, which allocate and compile


class MatrixTime(NamedTuple):
    """Measured passes of the matrices of one kind and shape on a rank, in a micro-batch.

    rows, columns: of the weight. count: matrices in the whole model. plain, fp8: seconds of forward and both backward
    products of one matrix in each round, with rounding to FP8. fp8 is empty if the recipe does not cover the shape.
    """

    name: str
    rows: int
    columns: int
    count: int  # type: ignore[assignment]  # a tuple has a method count
    plain: Sequence[float]
    fp8: Sequence[float]

    @property
    def factor(self) -> Ratio | None:
        """Plain over FP8 time, above 1 where FP8 is faster, with the 95 % interval of the rounds' median."""
        if not self.fp8:
            return None
        return interval_of_ratios([plain / fp8 for plain, fp8 in zip(self.plain, self.fp8, strict=True)])

    @property
    def gains(self) -> bool:
        """Whether FP8 is faster beyond the interval."""
        return self.factor is not None and self.factor.low > 1

    def seconds(self, *, fp8: bool) -> float:
        """Returns the median seconds of all matrices of the kind."""
        return self.count * statistics.median(self.fp8 if fp8 and self.fp8 else self.plain)


def matrix_row(matrix: MatrixTime) -> dict[str, Any]:
    """Returns the measurement as JSON values."""
    factor = matrix.factor
    return {
        "matrix": matrix.name,
        "weight": [matrix.rows, matrix.columns],
        "count": matrix.count,
        "plain_s": statistics.median(matrix.plain),
        "fp8_s": statistics.median(matrix.fp8) if matrix.fp8 else None,
        "factor": factor and factor._asdict(),
        "advice": "not covered" if factor is None else "convert" if matrix.gains else "keep",
    }


def settings_time(matrices: Sequence[MatrixTime]) -> dict[str, float]:
    """Returns the seconds of all products of a micro-batch for each choice of the settings: "off", "fp8" (all matrices
    of the blocks), and where the recipe covers lm_head "fp8 with fp8_head"."""
    head = [matrix for matrix in matrices if matrix.name == HEAD]
    blocks = [matrix for matrix in matrices if matrix.name != HEAD]

    def total(in_blocks: bool, in_head: bool) -> float:
        return sum(each.seconds(fp8=in_blocks) for each in blocks) + sum(each.seconds(fp8=in_head) for each in head)

    times = {"off": total(False, False), "fp8": total(True, False)}
    return times | ({"fp8 with fp8_head": total(True, True)} if any(each.fp8 for each in head) else {})


def advice(matrices: Sequence[MatrixTime], recipe: str) -> list[str]:
    """Returns which matrices to convert and to keep, and which settings do it."""
    blocks = [matrix for matrix in matrices if matrix.name != HEAD and matrix.fp8]
    head = next((matrix for matrix in matrices if matrix.name == HEAD and matrix.fp8), None)
    convert, keep = ([each.name for each in blocks if each.gains is gains] for gains in (True, False))
    times = settings_time(matrices)
    lines = []
    if convert and keep:
        together = sum(each.seconds(fp8=False) for each in blocks) / sum(each.seconds(fp8=True) for each in blocks)
        lines.append(
            f"convert {', '.join(convert)}, keep {', '.join(keep)}: no setting does that; precision.fp8 converts all "
            f"of them, which together take {1 / together:.2f} times as long"
        )
    elif blocks:
        lines.append(
            f"convert all of {', '.join(convert)}: precision.fp8={recipe}"
            if convert
            else f"keep all of {', '.join(keep)}: precision.fp8=off"
        )
    if head:
        sense = "" if convert else ", if precision.fp8 is on at all"
        lines.append(f"{HEAD}: precision.fp8_head={'true' if head.gains else 'false'}{sense}")
    best = min(times, key=lambda name: times[name])
    each = ", ".join(f"{name} {1000 * seconds:.1f} ms" for name, seconds in times.items())
    return [*lines, f"all products of a micro-batch: {each}; fastest: {best}"]


def gate_result(base: RunRecord, fp8: RunRecord, gate: float, noise: RunRecord | None) -> dict[str, Any]:
    """Returns the losses (nats) averaged over the last quarter of the steps, their relative difference, and whether it
    is within the gate. noise: the baseline with another seed; its relative difference is "noise".

    Both runs train on the same rows with the same initial weights, so what differs is FP8 alone. Raises UserError if
    a run has no losses.
    """
    losses = [step_losses(run) for run in (base, fp8)]
    steps = sorted(set(losses[0]) & set(losses[1]))
    if not steps:
        raise UserError(f"{base.folder} and {fp8.folder} have no steps in common: remove both and start again")
    last = steps[-max(1, round(LAST_SHARE * len(steps))) :]
    means = [statistics.fmean(each[step] for step in last) for each in losses]
    difference = means[1] / means[0] - 1
    result = {"base": means[0], "fp8": means[1], "difference": difference, "gate": gate, "steps": len(last)}
    if noise:
        other = step_losses(noise)
        result["noise"] = abs(statistics.fmean(other[step] for step in last if step in other) / means[0] - 1)
    return result | {"passed": math.isfinite(difference) and difference <= gate}


def step_losses(run: RunRecord) -> dict[int, float]:
    """Returns step -> the step's mean loss in nats; train/loss is a moving average where train/loss_raw exists."""
    return {
        line["step"]: float(loss)
        for line in run.lines
        if isinstance(loss := line.get("train/loss_raw", line.get("train/loss")), int | float)
    }


def time_to_equal_loss(base: RunRecord, fp8: RunRecord) -> dict[str, Any]:
    """Returns what FP8 needs, relative to the baseline, to reach an equal val/bpb: {"steps", "step_time", "time"}, each
    a ratio with interval or None, and "why" where there is none.

    time = steps x step_time, with the median time of the logged steps.
    """
    result: dict[str, Any] = {"step_time": None, "steps": None, "time": None, "value": None, "why": None}
    seconds = [run.values("train/dt")[UNTIMED_RUN_STEPS:] for run in (base, fp8)]
    if min(map(len, seconds)) >= 2:
        result["step_time"] = median_ratio(*seconds)
    try:
        comparison = compare_curves([base], [fp8])
    except UserError as error:
        return result | {"why": str(error)}
    steps = comparison["axes"]["steps"]
    if steps is None or result["step_time"] is None:
        return result | {"why": "too few steps are recorded"}
    result["steps"] = Ratio(steps["value"], steps["low"], steps["high"])
    return result | {"time": result["steps"].times(result["step_time"]), "value": comparison["value"]}


def verdict_of_products(matrices: Sequence[MatrixTime]) -> tuple[str, str]:
    """Returns ("go" or "no-go", why) of the products of a micro-batch alone, for the fastest choice of the settings."""
    times = settings_time(matrices)
    best = min((name for name in times if name != "off"), key=lambda name: times[name])
    in_fp8 = [bool(each.fp8) and (each.name != HEAD or best != "fp8") for each in matrices]
    rounds = min(len(each.plain) for each in matrices)
    plain, fp8 = (
        [
            sum(
                each.count * (each.fp8 if on and chosen else each.plain)[turn]
                for each, on in zip(matrices, in_fp8, strict=True)
            )
            for turn in range(rounds)
        ]
        for chosen in (False, True)
    )
    factor = interval_of_ratios([each / other for each, other in zip(fp8, plain, strict=True)])
    text = (
        f"of products alone (no runs: --steps 0), FP8 takes {factor.value:.2f} times as long "
        f"({factor.low:.2f} to {factor.high:.2f})"
    )
    return _decided(factor, text)


def verdict_of(gate: dict[str, Any], equal: dict[str, Any]) -> tuple[str, str]:
    """Returns ("go" or "no-go", why)."""
    if not math.isfinite(gate["difference"]):
        return "no-go", "a loss is no number"
    if not gate["passed"]:
        return (
            "no-go",
            f"the loss is {gate['difference']:+.3%} off the baseline's, beyond the gate of {gate['gate']:.2%}",
        )
    time: Ratio | None = equal["time"]
    if time is None:
        return "no-go", f"the time to an equal loss is not known: {equal['why']}"
    text = (
        f"FP8 needs {time.value:.2f} times the time ({time.low:.2f} to {time.high:.2f}) to an equal loss: "
        f"{equal['steps'].value:.3f} of the steps, each {equal['step_time'].value:.2f} times as long"
    )
    return _decided(time, text)


def _decided(time: Ratio, text: str) -> tuple[str, str]:
    """Returns the decision by a ratio of times: "go" only where FP8 is shown to be faster."""
    if time.verdict == "cannot tell":
        return "no-go", f"{text}; that it is faster is not shown"
    return ("go" if time.verdict == "better" else "no-go"), text


def check_lines(result: dict[str, Any]) -> list[str]:
    """Returns the result of the check (see programs/fp8_check.py) as lines of text."""
    rows = [("matrix", "weight", "count", result["dtype"], "FP8", "factor", "95 %", "advice")]
    for row in result["matrices"]:
        factor = row["factor"]
        rows.append(
            (
                row["matrix"],
                "{} x {}".format(*row["weight"]),
                str(row["count"]),
                f"{1000 * row['plain_s']:.2f} ms",
                "-" if factor is None else f"{1000 * row['fp8_s']:.2f} ms",
                "-" if factor is None else f"{factor['value']:.2f}",
                "-" if factor is None else f"{factor['low']:.2f} to {factor['high']:.2f}",
                row["advice"],
            )
        )
    lines = [f"{result['device']}, {result['tokens']:,} tokens per micro-batch; {result['backend']}"]
    lines += [*text_table(rows, right=(1, 2, 3, 4, 5)), *result["advice"]]
    if gate := result.get("gate"):
        noise = f"; another seed moves it by {gate['noise']:.3%}" if "noise" in gate else ""
        lines.append(
            f"mean loss of the last {gate['steps']} steps: {gate['base']:.5f} without, {gate['fp8']:.5f} with FP8 "
            f"({gate['difference']:+.3%}; gate {gate['gate']:.2%}: {'passed' if gate['passed'] else 'failed'}{noise})"
        )
        if gate.get("noise", 0) > gate["gate"]:
            lines.append("the gate is below the noise of the seed, which paired runs do not contain")
    return [*lines, f"{result['verdict']}: {result['why']}"]
