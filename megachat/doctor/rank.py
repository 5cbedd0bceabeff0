"""What tools/doctor.py starts on each host of a hostfile: its matrix rate, and with the others the bandwidth of every pair. Rank 0 prints JSON."""

import contextlib
import json
import statistics
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # works from a clone that was not installed

from megachat.device import collective_backend, synchronize  # noqa: E402
from megachat.errors import user_errors_end_the_program  # noqa: E402
from megachat.job.agreement import meet_ranks  # noqa: E402
from megachat.job.launch import bootstrap_environment, choose_device  # noqa: E402

_SIDE = {"cuda": 8192, "cpu": 1024}
_PRODUCTS = {"cuda": 20, "cpu": 4}
_SENT_BYTES = {"cuda": 256 * 2**20, "cpu": 16 * 2**20}
_TIMES = 5
_GATHER_S = 60.0


def matrix_rates(device: torch.device) -> list[float]:
    """FLOPs a second of square products: bfloat16 on each GPU of this host, one after the other; float32 on the CPU with all its cores."""
    kind = device.type
    found = []
    for index in range(torch.cuda.device_count() if kind == "cuda" else 1):
        where = torch.device(kind, index) if kind == "cuda" else device
        one = torch.ones(
            _SIDE[kind], _SIDE[kind], device=where, dtype=torch.bfloat16 if kind == "cuda" else torch.float32
        )
        seconds = []
        for _ in range(_TIMES + 1):
            synchronize(where)
            begin = time.perf_counter()
            for _ in range(_PRODUCTS[kind]):
                one @ one
            synchronize(where)
            seconds.append(time.perf_counter() - begin)
        found.append(
            2 * _SIDE[kind] ** 3 * _PRODUCTS[kind] / statistics.median(seconds[1:])
        )  # the first is not counted
    return found


def rounds_of_pairs(count: int) -> list[list[tuple[int, int]]]:
    """Every pair of `count` places once, in rounds in which each place has one partner at most (the circle method of tournaments)."""
    places = [*range(count), *([None] if count % 2 else [])]
    found = []
    for _ in range(len(places) - 1):
        half = len(places) // 2
        pairs = zip(places[:half], reversed(places[half:]), strict=True)
        found.append([(min(pair), max(pair)) for pair in pairs if None not in pair])
        places = [places[0], places[-1], *places[1:-1]]
    return found


def sent_rate(sender: bool, other: int, device: torch.device) -> float:
    """Bytes a second from one rank to another, the median of some; both call it."""
    data, answer = (
        torch.zeros(_SENT_BYTES[device.type], dtype=torch.uint8, device=device),
        torch.zeros(1, device=device),
    )
    seconds = []
    for _ in range(_TIMES + 1):
        synchronize(device)
        begin = time.perf_counter()
        for tensor, gives in ((data, sender), (answer, not sender)):
            (dist.send if gives else dist.recv)(tensor, other)
        synchronize(device)
        seconds.append(time.perf_counter() - begin)
    return data.numel() / statistics.median(seconds[1:])


def pair_rates(device: torch.device) -> dict[str, float]:
    """ "sender receiver" -> bytes a second, of the pairs in which this rank sends; all ranks call it."""
    rank, found = dist.get_rank(), {}
    for pairs in rounds_of_pairs(dist.get_world_size()):
        dist.barrier()
        for pair in (pair for pair in pairs if rank in pair):
            for sender, receiver in (pair, pair[::-1]):
                rate = sent_rate(rank == sender, pair[1 - pair.index(rank)], device)
                if rank == sender:
                    found[f"{sender} {receiver}"] = rate
    return found


@user_errors_end_the_program
def main() -> None:
    """Measures on this rank and, on rank 0, prints every rank's result as JSON."""
    environment = bootstrap_environment()
    device = choose_device(environment)
    own = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "matrix": matrix_rates(device),
        "pairs": {},
    }
    told = [own]
    if environment.world_size > 1:
        with meet_ranks(environment, {}, _GATHER_S), contextlib.redirect_stdout(sys.stderr):
            dist.init_process_group(collective_backend(device), timeout=timedelta(seconds=2 * _GATHER_S))
        own["pairs"] = pair_rates(device)
        told = [None] * environment.world_size
        dist.all_gather_object(told, own)
        dist.barrier()
        dist.destroy_process_group()
    if environment.rank == 0:
        print(json.dumps(told))


if __name__ == "__main__":
    main()
