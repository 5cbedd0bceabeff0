"""Which of two runs is better, on steps, time and FLOPs and in CORE, and is the difference larger than its error?

    megachat compare runs/a runs/b
    megachat compare runs/a1 runs/a2 --against runs/b1 runs/b2    several runs of a recipe on each side
    megachat compare runs/a1 runs/a2 --against gpt2               is a recipe better than GPT-2?

RUN is a run's folder (its curve of bits per byte, and its newest evaluation with CORE) or a JSON file of an evaluation
(CORE alone). A curve's ratio says how much of the steps, the time and the FLOPs the second side needs to reach the
lowest value that both reach; better is what is better on all three. Where a run has a single value, the last values
are compared. docs/studies.md and docs/evaluation.md explain the intervals. Runs may still train. Exit status: 0
whatever the verdict, 2 if the runs cannot be compared.
"""

import argparse
from pathlib import Path
from typing import Any

from megachat.commands.options import Parser, print_result
from megachat.errors import UserError


def add_arguments(parser: Parser) -> None:
    """Adds the options of `megachat compare`."""
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="the two runs, or with --against the runs of the first side")
    add("--against", nargs="+", type=Path, metavar="RUN", help="the runs of the second side, or gpt2")
    metric = "the falling metric whose curves are compared (default val/bpb; train/loss is a moving average)"
    add("--metric", default="val/bpb", help=metric)
    add("--strict", action="store_true", help="refuse the comparison where it would warn")
    add("--same-weights", action="store_true", help="both sides evaluate the same weights: no run-to-run error")
    add("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> None:
    """Prints the comparison."""
    if options.against is None and len(options.runs) != 2:
        raise UserError(f"{len(options.runs)} runs were given: give two, or a second side after --against")
    first, second = (options.runs, options.against) if options.against else (options.runs[:1], options.runs[1:])
    for path in (*first, *second):
        if not path.exists() and path != Path("gpt2"):
            raise UserError(f"{path} does not exist: give run folders, or files of evaluations")
    report: dict[str, Any] = {}
    lines: list[str] = []
    if all(path.is_dir() for path in (*first, *second)):
        report["curves"], lines = _compare_curves(first, second, options.metric, strict=options.strict)
    try:
        core, core_lines = _compare_core(first, second, same_weights=options.same_weights)
        report |= core
        lines += core_lines
    except UserError as error:
        if not lines:
            from megachat.studies.runs import is_run

            others = [path for path in (*first, *second) if path.is_dir() and not is_run(path)]
            if others:  # such as the folder above the runs
                raise UserError(f"{others[0]} is no run folder, so curves are not compared; {error}") from None
            raise
        report["core_not_compared"] = str(error)
        lines.append(f"CORE is not compared: {error}")
    if options.strict and report.get("warnings"):
        raise UserError(f"--strict: {report['warnings'][0]}")
    print_result(options, report, *lines)


def _compare_curves(
    first: list[Path], second: list[Path], metric: str, *, strict: bool
) -> tuple[dict | None, list[str]]:
    """Returns the comparison of the curves, and its lines. Runs that only have evaluations give none.

    Raises UserError for runs whose curves have nothing in common, and with `strict` where there is a warning.
    """
    from megachat.studies.comparison import compare_curves, compare_last, curve_lines, last_lines, load_runs
    from megachat.studies.runs import is_run

    if not all(map(is_run, (*first, *second))):
        return None, []
    sides = load_runs(first), load_runs(second)
    last = compare_last(*sides, metric)
    comparison = last or compare_curves(*sides, metric)
    if strict and comparison["warnings"]:
        raise UserError(f"--strict: {comparison['warnings'][0]}")
    return comparison, last_lines(last) if last else curve_lines(comparison)


def _compare_core(first: list[Path], second: list[Path], *, same_weights: bool) -> tuple[dict, list[str]]:
    """Returns the comparison of the evaluations, and its lines."""
    from megachat.evals.comparison import (
        compare_evaluations,
        compare_with_gpt2,
        comparison_lines,
        gpt2_lines,
        load_side,
    )

    if second == [Path("gpt2")] and not second[0].exists():
        comparison = compare_with_gpt2(load_side(first))
        return comparison, gpt2_lines(comparison)
    comparison = compare_evaluations(load_side(first), load_side(second), same_weights=same_weights)
    return comparison, comparison_lines(comparison)
