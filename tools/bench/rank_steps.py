"""Steps of a layout of several ranks, each a process with one thread, that take turns with steps of this process."""

import contextlib
import functools
import math
import multiprocessing
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection

import torch

from megachat.job.join import start_mesh
from megachat.job.launch import bootstrap_environment, choose_device
from megachat.job.local_ranks import run_local_ranks
from megachat.planning.layouts import parse_layout
from megachat.programs.probe_step import random_rows
from megachat.train.build import build_training_model
from megachat.train.step import set_schedules, update
from tools.bench.nanochat import PartClock, plan_side

Sides = dict[str, list[str]]  # name -> settings that only this side has


class WaitingRanks:
    """Ranks that use no core until a step is requested. A thread starts them and keeps their error."""

    def __init__(self, arguments: Namespace, sides: Sides):
        ranks = math.prod(parse_layout(arguments.layout).values())
        pipes = [multiprocessing.Pipe() for _ in range(ranks)]
        self._connections = [ours for ours, _ in pipes]
        self._problem: Exception | None = None
        self._thread = threading.Thread(
            target=self._run, args=([theirs for _, theirs in pipes], arguments, sides), daemon=True
        )
        self._thread.start()
        self._answers()  # all models are built

    def _run(self, connections: list[Connection], arguments: Namespace, sides: Sides) -> None:
        try:
            run_local_ranks(serve_steps, len(connections), connections, arguments, sides, preload=[__name__])
        except Exception as error:
            self._problem = error

    def _answers(self) -> list[dict[str, float]]:
        answers = []
        for connection in self._connections:
            while not connection.poll(1.0):
                if not self._thread.is_alive():
                    raise self._problem or RuntimeError("the ranks ended")
            answers.append(connection.recv())
        return answers

    def _request(self, side: str | None) -> None:
        for connection in self._connections:
            with contextlib.suppress(OSError):  # the rank ended: _answers raises its error
                connection.send(side)

    def step(self, side: str) -> dict[str, float]:
        """Takes a step of a side on all ranks. Returns the seconds of its parts on rank 0. Raises UserError if a rank
        fails."""
        self._request(side)
        return self._answers()[0]

    def close(self) -> None:
        """Ends the ranks."""
        self._request(None)
        self._thread.join()


@contextlib.contextmanager
def waiting_ranks(arguments: Namespace, sides: Sides, clock: PartClock) -> Iterator[dict[str, Callable]]:
    """Starts the ranks of arguments.layout with a model per side, if there is one, and ends them with the block.

    Yields {side: function that takes a step on all ranks and leaves the parts' seconds in the clock}, which raises
    UserError if a rank fails, as this does.
    """
    if not sides:
        yield {}
        return
    waiting = WaitingRanks(arguments, sides)

    def step(side: str) -> None:
        clock.set(waiting.step(side))

    try:
        yield {side: functools.partial(step, side) for side in sides}
    finally:
        waiting.close()


def serve_steps(connections: list[Connection], arguments: Namespace, sides: Sides) -> None:
    """Builds the models, then takes a step of each side that is requested, until None is; all ranks run it. Sends {}
    when the models are built, and the seconds of the parts of each step."""
    plans = {name: plan_side(arguments, changes, parse_layout(arguments.layout)) for name, changes in sides.items()}
    first_config, _ = next(iter(plans.values()))
    mesh, models = start_mesh(first_config, choose_device(bootstrap_environment())), {}
    mesh.world.progress.note = (clock := PartClock(time.perf_counter)).note
    for name, (config, plan) in plans.items():
        models[name] = build_training_model(config, plan, mesh, torch.ones(plan.dims.vocab_size, dtype=torch.int64))
        set_schedules(models[name], 0)
    connection = connections[mesh.world.rank]
    connection.send({})
    while side := connection.recv():
        training = models[side]
        rows = random_rows(training.plan, mesh.data.rank)
        clock.restart()
        update(training, rows)[0].item()
        training.muon.wait_for_gather()  # else it would go on beside the next step, which is another side's
        clock.enter("forward")
        connection.send(clock.seconds)
