"""Measures saving and loading of one state, ours and torch's in turn. tools/bench.py starts this program on each rank.

Both sides read from the page cache. Rank 0 prints JSON.
"""

import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402

from megachat.checkpoint.facts import checkpoint_name, files_of_rank, find_file_problems, read_facts  # noqa: E402
from megachat.checkpoint.save import save_checkpoint  # noqa: E402
from megachat.checkpoint.saver import Saver  # noqa: E402
from megachat.checkpoint.storage import load_checkpoint  # noqa: E402
from megachat.config import load_config  # noqa: E402
from megachat.errors import user_errors_end_the_program  # noqa: E402
from megachat.files import sync_to_disk  # noqa: E402
from megachat.job.join import end_collectives, start_mesh  # noqa: E402
from megachat.job.launch import bootstrap_environment, choose_device  # noqa: E402
from megachat.job.local_ranks import rank_parser, require_ranks, run_with_torchrun, set_options  # noqa: E402
from megachat.parallel.collectives import all_gather_objects, barrier  # noqa: E402
from megachat.planning.plan import resolve_plan  # noqa: E402
from megachat.programs.verify_layout import related_rows  # noqa: E402
from megachat.train.build import TrainingModel, build_training_model  # noqa: E402
from megachat.train.save_cost import COMPARED_STEPS  # noqa: E402
from megachat.train.state import state_pieces  # noqa: E402
from megachat.train.step import set_schedules, update  # noqa: E402
from tools.bench.turns import round_ratios  # noqa: E402


def build_and_step(arguments: Namespace) -> TrainingModel:
    """Builds the training and takes one step, so that no state is zero."""
    environment = bootstrap_environment()
    config = load_config(arguments.config, arguments.set)
    # before the mesh, so that a layout that does not fit is refused first
    plan = resolve_plan(config, environment.world_size, config.model.vocab_size or arguments.vocab_size)
    mesh = start_mesh(config, choose_device(environment))
    training = build_training_model(config, plan, mesh, torch.ones(plan.dims.vocab_size, dtype=torch.int64))
    set_schedules(training, 0)
    take_step(training)
    return training


def take_step(training: TrainingModel, before_update=None) -> None:
    """Takes one optimizer step on this rank's rows."""
    plan, data = training.plan, training.mesh.data
    rows = related_rows(0, plan.rows_per_step, plan.dims.sequence_len + 1, plan.dims.vocab_size)[data.rank :: data.size]
    update(training, rows, before_update=before_update)[0].item()


def take_steps(training: TrainingModel, count: int = COMPARED_STEPS, before_update=None) -> None:
    """Takes some steps."""
    for _ in range(count):
        take_step(training, before_update=before_update)


class Timings:
    """Collects the seconds of each action in each round, of the slowest rank."""

    def __init__(self, training: TrainingModel):
        self.world = training.mesh.world
        self.seconds: dict[str, list[float]] = {}

    def add(self, name: str, seconds: float) -> None:
        """Adds the time of the slowest rank. All ranks call it."""
        self.seconds.setdefault(name, []).append(max(all_gather_objects(seconds, self.world)))

    def time(self, name: str, action: Callable[[], object]) -> None:
        """Times an action that all ranks begin together, after earlier writes have reached the disk."""
        if self.world.rank == 0:
            os.sync()
        barrier(self.world)
        begin = time.perf_counter()
        action()
        self.add(name, time.perf_counter() - begin)


def save_with_torch(state: dict, path: Path, *, sync: bool) -> None:
    """Saves as a plain script would."""
    with open(path, "wb") as file:
        torch.save(state, file)
        if sync:
            file.flush()
            os.fsync(file.fileno())
    if sync:
        sync_to_disk(path.parent)


def measure_round(training: TrainingModel, saver: Saver, state: dict, folder: Path, timings: Timings) -> dict[str, int]:
    """Saves and loads once each way. Returns the bytes on disk."""
    world, pieces = training.mesh.world, state_pieces(training, replicas=False)
    torch_file = folder / f"rank_{world.rank}.pt"
    for name, sync in (("torch.save", False), ("torch.save_and_fsync", True)):
        timings.time(name, lambda sync=sync: save_with_torch(state, torch_file, sync=sync))
    barrier(world)
    torch_bytes = sum(path.stat().st_size for path in folder.glob("rank_*.pt"))
    timings.time("step", lambda: take_step(training))
    timings.time("steps_before_save", lambda: take_steps(training))
    for name, steps in (
        ("ours_beside_a_step", 1),
        (f"ours_beside_{COMPARED_STEPS}_steps", COMPARED_STEPS),
        ("ours", 0),
    ):
        if world.rank == 0:
            shutil.rmtree(folder / checkpoint_name(1), ignore_errors=True)
            os.sync()
        barrier(world)
        saver.begin(pieces, lambda copies, axis: save_checkpoint(folder, 1, copies, {}, lambda _: None, axis))
        if steps:
            begin = time.perf_counter()
            take_steps(training, steps, before_update=saver.wait_copied)
            timings.add("step_beside_it" if steps == 1 else "steps_after_save", time.perf_counter() - begin)
        else:
            saver.wait_copied()  # as if the next update followed immediately
        saver.wait()
        (saved,) = saver.finished()
        timings.add(name + "_blocked", saved.blocked_s)
        timings.add(name + "_total", saved.total_s)
    facts = read_facts(saved.path)
    timings.time(
        "ours_check_hashes", lambda: find_file_problems(saved.path, facts, files_of_rank(facts, world.rank, world.size))
    )
    timings.time("ours_load", lambda: load_checkpoint(saved.path, state_pieces(training)))
    timings.time(
        "torch.load",
        lambda: [state[name].copy_(tensor) for name, tensor in torch.load(torch_file, weights_only=True).items()],
    )
    ours_bytes = sum(path.stat().st_size for path in saved.path.rglob("*") if path.is_file())
    barrier(world)
    torch_file.unlink()
    if world.rank == 0:
        shutil.rmtree(saved.path)
    return {"ours": ours_bytes, "torch.save": torch_bytes}


def least_bytes(training: TrainingModel) -> int:
    """Returns the bytes of the state: master, momentum and second moments of Muon; master and two moments of AdamW."""
    parameters = training.plan.parameters
    others = parameters["total"] - parameters["matrices"]
    moments = {
        name: shape
        for part in all_gather_objects(_second_moments(training), training.mesh.world)
        for name, shape in part.items()
    }
    return 8 * parameters["matrices"] + 12 * others + 4 * sum(torch.Size(shape).numel() for shape in moments.values())


def _second_moments(training: TrainingModel) -> dict[str, tuple[int, ...]]:
    return {
        name: tuple(shape) for name, (shape, _) in state_pieces(training).items() if name.endswith("/second_moment")
    }


def bench_checkpoint(arguments: Namespace) -> dict:
    """Measures saving and loading beside torch.save and torch.load: waiting time, duration, bytes."""
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        program = [__file__, "--config", arguments.config, "--vocab-size", str(arguments.vocab_size)]
        program += ["--rounds", str(arguments.rounds), "--folder", folder, *set_options(arguments.set)]
        output = run_with_torchrun("the ranks", arguments.ranks, program)
    return {"what": "seconds of saving and loading, of the slowest rank"} | json.loads(output.strip().splitlines()[-1])


@user_errors_end_the_program
def main() -> None:
    parser = rank_parser((__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True)
    arguments = parser.parse_args()
    training = build_and_step(arguments)
    saver, timings = Saver(training.mesh.saving), Timings(training)
    pieces = state_pieces(training, replicas=False)
    saver.reserve(pieces)
    state = {
        f"{name} {index}": view.detach().cpu().clone()
        for name, (_, rectangles) in pieces.items()
        for index, (_, _, view) in enumerate(rectangles)
    }
    for number in range(arguments.rounds + 1):
        sizes = measure_round(training, saver, state, arguments.folder, timings)
        if not number:
            timings.seconds.clear()  # the first round is not counted
    seconds, least = timings.seconds, least_bytes(training)
    if training.mesh.world.rank == 0:
        ratios = {
            f"{ours}_over_{theirs}": statistics.median(round_ratios(seconds[ours], seconds[theirs]))
            for ours in ("ours_beside_a_step_blocked", "ours_blocked")
            for theirs in ("torch.save", "torch.save_and_fsync")
        }
        # "ours_total" is a save for which training waits: what checkpoint.background=false costs
        shares = {
            f"{share}_over_{whole}": round_ratios(seconds[share], seconds[whole])
            for share, whole in (
                (f"ours_beside_{COMPARED_STEPS}_steps_blocked", "ours_total"),
                ("steps_after_save", "steps_before_save"),
            )
        }
        result = {
            "parameters": training.plan.parameters["total"],
            "ranks": training.mesh.world.size,
            "rounds": arguments.rounds,
            "median_s": {name: statistics.median(values) for name, values in seconds.items()},
            "ratios": ratios | {name: statistics.median(values) for name, values in shares.items()},
            "spread": {name: [min(values), max(values)] for name, values in shares.items()},
            "bytes": sizes | {"least": least},
            "bytes_over_least": sizes["ours"] / least,
            "all_s": seconds,
        }
        print(json.dumps(result), flush=True)
    end_collectives()


if __name__ == "__main__":
    require_ranks("checkpoint")
    main()
