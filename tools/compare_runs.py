"""Is the difference of two evaluations real? `python tools/compare_runs.py runs/a runs/b`, or several runs of a recipe on each side:
`python tools/compare_runs.py runs/a1 runs/a2 --against runs/b1 runs/b2`. Is a recipe better than GPT-2?
`python tools/compare_runs.py runs/a1 runs/a2 --against gpt2`.

A RUN is a run's folder, of which its last evaluation with CORE counts, or a JSON file of launch/evaluate.py. docs/evaluation.md tells how the
error is made. Exit status: 0 whatever the verdict is, 2 for what cannot be compared.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a clone that was not installed

from megachat.errors import UserError, user_errors_end_the_program  # noqa: E402
from megachat.evals.comparison import compare_evaluations, compare_with_gpt2, comparison_lines, gpt2_lines  # noqa: E402
from megachat.evals.results import load_results, newest_results  # noqa: E402


def evaluation(path: Path) -> tuple[Path, dict]:
    """(its JSON file, what is in it)."""
    if not path.exists():
        raise UserError(f"{path} does not exist: give a run's folder, or a JSON file of launch/evaluate.py")
    file = newest_results(path) if path.is_dir() else path
    return file, load_results(file)


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="the two to be compared, or with --against those of the first side",
    )
    parser.add_argument("--against", nargs="+", type=Path, metavar="RUN", help="those of the second side, or gpt2")
    parser.add_argument(
        "--same-weights",
        action="store_true",
        help="both sides are evaluations of one set of weights: add no run-to-run deviation",
    )
    parser.add_argument("--json", dest="as_json", action="store_true", help="as JSON")
    return parser


@user_errors_end_the_program
def main(arguments: list[str] | None = None) -> None:
    asked = command_line().parse_args(arguments)
    if asked.against is None and len(asked.runs) != 2:
        raise UserError(f"{len(asked.runs)} runs were given: give two, or --against before those of the second side")
    first, second = (asked.runs, asked.against) if asked.against else (asked.runs[:1], asked.runs[1:])
    threshold = second == [Path("gpt2")] and not second[0].exists()
    sides = [[evaluation(path) for path in side] for side in (first, [] if threshold else second)]
    for side in sides:
        files = [file.resolve() for file, _ in side]
        if twice := next((file for file in files if files.count(file) > 1), None):
            raise UserError(f"{twice} is given twice on one side: give each run once")
    told = compare_with_gpt2(sides[0]) if threshold else compare_evaluations(*sides, same_weights=asked.same_weights)
    lines = gpt2_lines(told) if threshold else comparison_lines(told)
    print(json.dumps(told, indent=1) if asked.as_json else "\n".join(lines))


if __name__ == "__main__":
    main()
