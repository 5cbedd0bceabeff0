"""Measures one n-gram table on gloo ranks: whole on each rank, or divided by rows in device or host memory."""

import statistics
from argparse import Namespace
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn.functional as F

from megachat.job.local_ranks import run_local_ranks
from megachat.optim.row_tables import RowTable, RowTables
from megachat.parallel.build import start_collectives
from megachat.parallel.collectives import all_gather, reduce_scatter
from megachat.parallel.mesh import Mesh, build_mesh
from tools.bench.partition_contenders import Wire
from tools.bench.turns import compare_rates, time_in_turn

WIDTH, TOKENS = 256, 4096  # of the table; of a rank's micro-batch
ROWS = 1024, 16384, 65536, 262144
BETAS, EPSILON = (0.8, 0.995), 1e-10
Step = Callable[[torch.Tensor, torch.Tensor], None]  # of the rows read [TOKENS] and a gradient [TOKENS, WIDTH]


def frequent_rows(rows: int, generator: torch.Generator) -> torch.Tensor:
    """Returns rows as a text's n-grams read them: their frequency falls with their rank, as 1 / rank."""
    rank = rows ** torch.rand(TOKENS, generator=generator)
    return (rank.long() * 2654435761) % rows


def whole_table(rows: int, mesh: Mesh) -> Step:
    """Returns a step with the whole table on each rank and its optimizer state divided, as ZeRO-1 does."""
    weight, share = torch.nn.Parameter(torch.zeros(rows, WIDTH)), rows * WIDTH // mesh.data.size
    master = torch.zeros(share, requires_grad=True)
    adamw = torch.optim.AdamW([master], lr=1e-3, betas=BETAS, eps=EPSILON, weight_decay=0.0, fused=True)

    def step(index: torch.Tensor, gradient: torch.Tensor) -> None:
        F.embedding(index, weight).backward(gradient)
        assert weight.grad is not None
        master.grad = torch.empty(share)
        reduce_scatter(master.grad, weight.grad.view(-1), mesh.data)
        master.grad.div_(mesh.data.size)
        weight.grad = None
        adamw.step()
        all_gather(weight.data.view(-1), master.data, mesh.data)

    return step


def divided_table(rows: int, mesh: Mesh, optimizer: str, host: bool) -> Step:
    """Returns a step with the rows divided over the ranks."""
    tables = RowTables(
        [RowTable("table", rows, WIDTH)], mesh, optimizer=optimizer, host=host, betas=BETAS, epsilon=EPSILON
    )
    tables.set_lr("table", 1e-3)

    def step(index: torch.Tensor, gradient: torch.Tensor) -> None:
        tables.read("table", index).backward(gradient)
        tables.wait_for_reduce()
        tables.step(1.0)
        tables.state_shards()  # waits for the write

    return step


def measure_rank(rows: int, rounds: int) -> tuple[dict[str, list[float]], dict[str, float], int]:
    """Returns the seconds of each round and the bytes sent per step by way, and a micro-batch's distinct rows; all
    ranks call it.
    """
    wire = Wire()
    start_collectives(torch.device("cpu"), "gloo", timedelta(seconds=600))
    mesh = build_mesh(torch.device("cpu"))
    generator = torch.Generator().manual_seed(mesh.data.rank)
    steps = {"whole, adamw": whole_table(rows, mesh)}
    for optimizer in ("adamw", "rowwise"):
        for place in ("device", "host"):
            steps[f"{place}, {optimizer}"] = divided_table(rows, mesh, optimizer, place == "host")
    batches = [
        (frequent_rows(rows, generator), torch.randn(TOKENS, WIDTH, generator=generator)) for _ in range(rounds + 1)
    ]
    sent: dict[str, float] = {}

    def turn(name: str) -> Callable[[], None]:
        numbers = iter(batches)

        def run() -> None:
            dist.barrier()
            before = wire.bytes
            steps[name](*next(numbers))
            sent[name] = wire.bytes - before
            dist.barrier()

        return run

    seconds = time_in_turn({name: turn(name) for name in steps}, rounds)
    return seconds, sent, round(statistics.median(len(index.unique()) for index, _ in batches))


def bench_tables(arguments: Namespace) -> dict:
    """Measures read, backward pass and update of one table on `ranks` gloo ranks, for several numbers of rows."""
    results = {}
    for rows in ROWS:
        seconds, sent, distinct = run_local_ranks(
            measure_rank, arguments.ranks, rows, arguments.rounds, preload=[__name__]
        )[0]
        rates = compare_rates(seconds, "whole, adamw")
        ways = {name: {"sent_bytes": round(sent[name])} | rate for name, rate in rates.items()}
        results[f"{rows} rows"] = {"distinct_rows": distinct} | ways
    what = f"steps per second of a table of {WIDTH} channels, {TOKENS} tokens per rank, {arguments.ranks} ranks"
    return {"what": what, "found": results}
