"""Measures one host. tools/doctor.py starts this program on each host of a hostfile; rank 0 prints all results."""

import contextlib
import json
import statistics
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # works from a clone that was not installed

from megachat.device import collective_backend, seconds_of  # noqa: E402
from megachat.errors import user_errors_end_the_program  # noqa: E402
from megachat.job.agreement import meet_ranks  # noqa: E402
from megachat.job.launch import bootstrap_environment, choose_device  # noqa: E402

_MATRIX_SIDE = {"cuda": 8192, "cpu": 1024}
_PRODUCT_COUNT = {"cuda": 20, "cpu": 4}
_SENT_BYTES = {"cuda": 256 * 2**20, "cpu": 16 * 2**20}
_TIMES = 5
_MEET_S = 60.0


def median_seconds(action: Callable[[], None], device: torch.device) -> float:
    """Returns the median time of _TIMES calls, after one that is not counted."""
    return statistics.median([seconds_of(action, device) for _ in range(_TIMES + 1)][1:])


def matrix_rates(device: torch.device) -> list[float]:
    """Returns FLOPs per second of square products, in bfloat16 for each GPU of this host or in float32 for its CPU."""
    kind, rates = device.type, []
    side, products, gpu = _MATRIX_SIDE[kind], _PRODUCT_COUNT[kind], kind == "cuda"
    for index in range(torch.cuda.device_count() if gpu else 1):
        where = torch.device(kind, index) if gpu else device
        matrix = torch.ones(side, side, device=where, dtype=torch.bfloat16 if gpu else torch.float32)

        def multiply(matrix=matrix) -> None:
            for _ in range(products):
                matrix @ matrix

        rates.append(2 * side**3 * products / median_seconds(multiply, where))
    return rates


def rounds_of_pairs(count: int) -> list[list[tuple[int, int]]]:
    """Returns every pair of `count` ranks once, in rounds where a rank has at most one partner (the circle method)."""
    ranks: list[int] = [*range(count), *([-1] if count % 2 else [])]  # the partner of -1 has no pair in that round
    rounds = []
    for _ in range(len(ranks) - 1):
        half = len(ranks) // 2
        pairs = zip(ranks[:half], reversed(ranks[half:]), strict=True)
        rounds.append([(min(pair), max(pair)) for pair in pairs if -1 not in pair])
        ranks = [ranks[0], ranks[-1], *ranks[1:-1]]
    return rounds


def send_rate(is_sender: bool, peer: int, device: torch.device) -> float:
    """Returns bytes per second from the sender to its peer. Both ranks call it."""
    data = torch.zeros(_SENT_BYTES[device.type], dtype=torch.uint8, device=device)
    answer = torch.zeros(1, device=device)

    def exchange() -> None:
        for tensor, sends in ((data, is_sender), (answer, not is_sender)):
            (dist.send if sends else dist.recv)(tensor, peer)

    return data.numel() / median_seconds(exchange, device)


def pair_rates(device: torch.device) -> dict[str, float]:
    """Returns "sender receiver" -> bytes per second for the pairs in which this rank sends. All ranks call it."""
    rank, rates = dist.get_rank(), {}
    for pairs in rounds_of_pairs(dist.get_world_size()):
        dist.barrier()
        for pair in (pair for pair in pairs if rank in pair):
            for sender, receiver in (pair, pair[::-1]):
                rate = send_rate(rank == sender, pair[1 - pair.index(rank)], device)
                if rank == sender:
                    rates[f"{sender} {receiver}"] = rate
    return rates


@user_errors_end_the_program
def main() -> None:
    """Measures this rank and prints every rank's result as JSON on rank 0."""
    environment = bootstrap_environment()
    device = choose_device(environment)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    local: dict = {"device": name, "matrix": matrix_rates(device), "pairs": {}}
    results: list = [local]
    if environment.world_size > 1:
        with meet_ranks(environment, {}, _MEET_S), contextlib.redirect_stdout(sys.stderr):
            dist.init_process_group(collective_backend(device), timeout=timedelta(seconds=2 * _MEET_S))
        local["pairs"] = pair_rates(device)
        results = [None] * environment.world_size
        dist.all_gather_object(results, local)
        dist.barrier()
        dist.destroy_process_group()
    if environment.rank == 0:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
