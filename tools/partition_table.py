"""Compares megachat's Muon partition with other ways to distribute Muon over data-parallel ranks.

    python tools/partition_table.py [--ranks 2,4,8] [--measure 2,4,8] [--json FILE]

From the plans alone it prints, for 2 to 1,024 ranks, the load of the busiest rank over the mean, and the bytes sent per
rank over the lower bound: (ranks - 1) / ranks x 4 bytes per element, bfloat16 gradients in and bfloat16 weights out.
With --measure, gloo ranks on this machine also run the matrices of a small model through megachat, DeepSpeed's built-in
Muon under ZeRO-1 and the two other rules.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a clone that was not installed

from megachat.errors import UserError, user_errors_end_the_program  # noqa: E402
from megachat.files import write_json  # noqa: E402

RANKS = tuple(2**power for power in range(1, 11))


def rank_counts(text: str) -> tuple[int, ...]:
    """Returns the rank counts of a list like 2,4,8."""
    counts = tuple(map(int, text.split(",")))
    if min(counts) < 2:
        raise argparse.ArgumentTypeError(f"{min(counts)} is below 2 ranks")
    return counts


def print_table(header: list[str], rows: dict[str, list[str]]) -> None:
    """Prints a Markdown table, one row per rule."""
    print(f"\n| {' | '.join(header)} |\n|{'---|' * len(header)}")
    for name, cells in rows.items():
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


@user_errors_end_the_program
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=rank_counts, default=RANKS, help="rank counts of the planned table, as 2,4,8")
    parser.add_argument("--measure", type=rank_counts, default=(), help="numbers of gloo ranks to run here, as 2,4,8")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds (default 7)")
    parser.add_argument("--json", type=Path, help="also write everything to this file")
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        raise UserError(f"--rounds is {arguments.rounds}; use 1 or more")
    import torch

    from megachat.job.launch import describe_environment
    from tools.bench.partition_rules import planned_table

    planned, measured = planned_table(arguments.ranks), {}
    for model, rules in planned.items():
        header = [f"{model}: load, bytes", *(f"{count:,}" for count in arguments.ranks)]
        rows = {
            rule: ["{load:.2f}, {bytes:.2f}".format(**values[count]) for count in arguments.ranks]
            for rule, values in rules.items()
        }
        print_table(header, rows)
    for world in arguments.measure:
        from tools.bench.partition_contenders import measure  # loads DeepSpeed

        measured[world] = measure(world, arguments.rounds)
        keys = ("bytes", "load", "work", "state", "time", "seconds")
        rows = {name: [f"{values[key]:.3g}" for key in keys] for name, values in measured[world].items()}
        print_table([f"{world} gloo ranks", *keys], rows)
    if arguments.json:
        environment = describe_environment(torch.device("cpu"))
        document = {"environment": environment, "planned": planned, "measured": measured}
        write_json(arguments.json, document)


if __name__ == "__main__":
    main()
