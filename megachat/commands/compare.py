"""Is the difference between two evaluations larger than its error?

    megachat compare runs/a runs/b
    megachat compare runs/a1 runs/a2 --against runs/b1 runs/b2    several runs of a recipe on each side
    megachat compare runs/a1 runs/a2 --against gpt2               is a recipe better than GPT-2?

RUN is a run's folder (its newest evaluation with CORE) or a JSON file of an evaluation. docs/evaluation.md explains how
the error is computed. Exit status: 0 whatever the verdict, 2 if the evaluations cannot be compared.
"""

import argparse
import json
from pathlib import Path

from megachat.commands.options import Parser
from megachat.errors import UserError


def add_arguments(parser: Parser) -> None:
    """Adds the options of `megachat compare`."""
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="the two runs, or with --against the runs of the first side")
    add("--against", nargs="+", type=Path, metavar="RUN", help="the runs of the second side, or gpt2")
    add("--same-weights", action="store_true", help="both sides evaluate the same weights: no run-to-run error")
    add("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> None:
    """Prints the comparison."""
    if options.against is None and len(options.runs) != 2:
        raise UserError(f"{len(options.runs)} runs were given: give two, or a second side after --against")
    from megachat.evals.comparison import (
        compare_evaluations,
        compare_with_gpt2,
        comparison_lines,
        gpt2_lines,
        load_side,
    )

    first, second = (options.runs, options.against) if options.against else (options.runs[:1], options.runs[1:])
    if second == [Path("gpt2")] and not second[0].exists():
        comparison = compare_with_gpt2(load_side(first))
        lines = gpt2_lines(comparison)
    else:
        comparison = compare_evaluations(load_side(first), load_side(second), same_weights=options.same_weights)
        lines = comparison_lines(comparison)
    print(json.dumps(comparison, indent=1) if options.json else "\n".join(lines))
