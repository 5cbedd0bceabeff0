"""Muon over data-parallel ranks: megachat's partition beside other rules. `python tools/partition_table.py [--json FILE] [--measure 2,4,8]`

By the plans alone, for 2 to 1,024 ranks: how much more than the mean the busiest rank orthogonalizes, and how many bytes a rank sends over the
lower bound, (ranks - 1) / ranks x 4 bytes an element: bfloat16 gradients in, bfloat16 weights out. With --measure, gloo ranks of this machine
run a small model's matrices through megachat, DeepSpeed's built-in Muon under ZeRO-1, and the two other rules (partition_contenders.py).
"""

import argparse
import json
import multiprocessing
import statistics
import sys
import traceback
from multiprocessing.connection import wait
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a clone that was not installed

from megachat.errors import UserError, user_errors_end_the_program  # noqa: E402
from megachat.files import write_atomically  # noqa: E402
from megachat.job.launch import become_rank, describe_environment, free_port  # noqa: E402
from megachat.optim.matrix import Matrix  # noqa: E402
from tools.bench.partition_contenders import MEASURED, by_shape, dealt_by_cost, measure_here, model_matrices  # noqa: E402

MODELS = {"d12": (12, 64), "d24": (24, 64), "d32": (32, 64), "7B": (32, 128)}  # depth, width a block
RANKS = tuple(2**power for power in range(1, 11))


def planned_megachat(matrices: list[Matrix], ranks: int) -> tuple[list[int], float]:
    """(FLOPs of each rank, bytes sent a rank) of megachat's partition."""
    from megachat.optim.partition_plan import make_plan

    plan, loads = make_plan(matrices, ranks), [0] * ranks
    for matrix, owner in zip(plan.matrices, plan.owners, strict=True):
        loads[owner] += matrix.flops
    wires = {"gradient_bytes": 2, "weight_bytes": 2, "direction_bytes": 2}
    return loads, sum(sum(plan.wire_bytes(rank, **wires).values()) for rank in range(ranks)) / ranks


def planned_chunks(matrices: list[Matrix], ranks: int) -> tuple[list[int], float]:
    """The same of nanochat's rule: stacks by shape, ceil(count / ranks) of each a rank, padded, float32 both ways (nanochat/optim.py)."""
    loads, sent = [0] * ranks, 0
    for stack in by_shape(matrices):
        chunk = -(-len(stack) // ranks)
        sent += 2 * 4 * (ranks - 1) * chunk * stack[0].elements
        for place, matrix in enumerate(stack):
            loads[place // chunk] += matrix.flops
    return loads, sent


def planned_whole(matrices: list[Matrix], ranks: int) -> tuple[list[int], float]:
    """The same of whole matrices dealt by cost, bfloat16 both ways, every rank's part padded to the fullest."""
    dealt = dealt_by_cost(matrices, ranks)
    fullest = max(sum(matrix.elements for matrix in own) for own in dealt)
    return [sum(matrix.flops for matrix in own) for own in dealt], 2 * 2 * (ranks - 1) * fullest


RULES = {"megachat": planned_megachat, "nanochat's chunks": planned_chunks, "whole matrices by cost": planned_whole}


def lower_bound(matrices: list[Matrix], ranks: int) -> float:
    """Bytes that each rank must send when every element is updated once and wires have two bytes."""
    return 4 * sum(matrix.elements for matrix in matrices) * (ranks - 1) / ranks


def planned_table(rank_counts: tuple[int, ...]) -> dict:
    """model -> rule -> ranks -> {"load": max / mean, "bytes": over the lower bound}."""
    table: dict = {}
    for model, size in MODELS.items():
        matrices = model_matrices(*size)
        for rule, planned in RULES.items():
            for ranks in rank_counts:
                loads, sent = planned(matrices, ranks)
                found = {"load": max(loads) * ranks / sum(loads), "bytes": sent / lower_bound(matrices, ranks)}
                table.setdefault(model, {}).setdefault(rule, {})[ranks] = found
    return table


def show_planned(table: dict) -> None:
    """Markdown: load max / mean and bytes over the lower bound."""
    for model, rules in table.items():
        counts = list(next(iter(rules.values())))
        print(
            f"\n| {model}: load, bytes | {' | '.join(f'{count:,}' for count in counts)} |\n|{'---|' * (len(counts) + 1)}"
        )
        for rule, found in rules.items():
            cells = ["{load:.2f}, {bytes:.2f}".format(**found[count]) for count in counts]
            print(f"| {rule} | {' | '.join(cells)} |")


def rank_program(rank: int, world: int, port: int, rounds: int, answer) -> None:
    """What each rank's process runs; sends (problem, result)."""
    become_rank(rank, world, port)
    import torch

    torch.set_num_threads(1)
    try:
        result = measure_here(rounds)
        answer.send((None, result))
    except BaseException:
        answer.send((traceback.format_exc(), None))


def measure(world: int, rounds: int) -> dict:
    """Start the ranks and put their answers together: contender -> ratios. Raises UserError naming the first rank that failed."""
    context = multiprocessing.get_context("forkserver")
    port, ranks, waiting, answers = free_port(), [], {}, {}
    for rank in range(world):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=rank_program, args=(rank, world, port, rounds, sender), daemon=True)
        process.start()
        sender.close()
        ranks.append(process)
        waiting[receiver] = rank
    try:
        while waiting:
            for receiver in wait(list(waiting)):
                rank = waiting.pop(receiver)
                try:
                    problem, answers[rank] = receiver.recv()
                except EOFError:
                    problem = "the process died"
                if problem:
                    raise UserError(f"rank {rank} of {world} failed: {problem}")
    finally:
        for process in ranks:
            process.kill()
    return summary([answers[rank] for rank in range(world)])


def summary(answers: list[dict]) -> dict:
    """Ranks' measurements to ratios: to the lower bound, to the work there is, to an even share of 8 bytes an element, to megachat's seconds."""
    matrices, world = model_matrices(*MEASURED), len(answers)
    work, elements = sum(matrix.flops for matrix in matrices), sum(matrix.elements for matrix in matrices)
    told = {}
    for name in answers[0]:
        each = [answer[name] for answer in answers]
        flops = [one["flops"] for one in each]
        ratios = [slow / fast for slow, fast in zip(each[0]["seconds"], answers[0]["megachat"]["seconds"], strict=True)]
        told[name] = {
            "bytes": statistics.mean(one["bytes"] for one in each) / lower_bound(matrices, world),
            "load": max(flops) * world / sum(flops),
            "work": sum(flops) / work,
            "state": max(one["state"] for one in each) * world / (8 * elements),
            "time": statistics.median(ratios),
            "seconds": statistics.median(each[0]["seconds"]),
        }
    return told


@user_errors_end_the_program
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--ranks",
        type=lambda text: tuple(map(int, text.split(","))),
        default=RANKS,
        help="rank counts of the planned table",
    )
    parser.add_argument(
        "--measure",
        type=lambda text: tuple(map(int, text.split(","))),
        default=(),
        help="gloo ranks to run here, as 2,4,8",
    )
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds (default 7)")
    parser.add_argument("--json", type=Path, help="write everything there, too")
    arguments = parser.parse_args()
    if min((*arguments.ranks, *arguments.measure)) < 2 or arguments.rounds < 1:
        parser.error("--ranks and --measure are 2 or more, --rounds 1 or more")
    import torch

    document = {"environment": describe_environment(torch.device("cpu")), "planned": {}, "measured": {}}
    document["planned"] = planned_table(arguments.ranks)
    show_planned(document["planned"])
    for world in arguments.measure:
        document["measured"][world] = measure(world, arguments.rounds)
        keys = ("bytes", "load", "work", "state", "time", "seconds")
        print(f"\n| {world} gloo ranks | {' | '.join(keys)} |\n|{'---|' * (len(keys) + 1)}")
        for name, row in document["measured"][world].items():
            print(f"| {name} | {' | '.join(f'{row[key]:.3g}' for key in keys)} |", flush=True)
    if arguments.json:
        write_atomically(arguments.json, (json.dumps(document, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
