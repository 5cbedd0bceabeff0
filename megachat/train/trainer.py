"""The training loop, the same for every layout: take a step, then run the tasks that are due."""

import contextlib
import gc
import math
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

from megachat.activity import announced
from megachat.checkpoint.facts import checkpoint_step
from megachat.checkpoint.saver import Saver
from megachat.optim.joint import Requests
from megachat.parallel.collectives import all_gather_objects
from megachat.parallel.rectangles import RectanglesByName
from megachat.planning.step_time import UNTIMED_STEPS
from megachat.train.build import Run
from megachat.train.check_cost import CheckCost
from megachat.train.compiled import NewGraphs
from megachat.train.metrics import Metrics, Pace
from megachat.train.nonfinite import Fault, handle_fault, rewind
from megachat.train.save_cost import SaveCost
from megachat.train.state import LoopState, state_pieces
from megachat.train.step import StepResult, train_step
from megachat.train.stragglers import RANK_TIMES_WINDOW
from megachat.train.tasks import Checkpoint, Core, LogStep, RankTimes, Samples, Spikes, Task, Validation

SETTLED_STEPS = 2  # by then everything in a step is compiled: a new graph is worth a log line


class Trainer:
    """Trains a run from `state` to the plan's stop step. All ranks build one and call fit().

    stop_requested: returns whether this rank was requested to stop. before_step: called with the number of each step.
    after_first_step: called when the first step of this job is counted. source: the run folder that `state` was loaded
    from. Pending tasks that have a result there do not run again.

    Attributes: first_step, steps_s: the first step of this job, and the seconds that its steps have taken. work_s: the
    seconds that this rank worked in each of the last steps. save_cost, check_cost: of saves and checks of the devices.
    """

    last_result: StepResult

    def __init__(
        self,
        run: Run,
        state: LoopState,
        metrics: Metrics,
        stop_requested: Callable[[], bool],
        before_step: Callable[[int], object],
        source: Path | None = None,
        after_first_step: Callable[[], object] = lambda: None,
    ):
        self.run, self.state, self.metrics, self.source = run, state, metrics, source
        self.stop_requested, self.before_step, self.after_first_step = stop_requested, before_step, after_first_step
        self.checkpoint = Checkpoint()
        # In the order in which they run. The checkpoint comes before everything that can fail or take minutes.
        self.tasks: list[Task] = [Spikes(), LogStep(), RankTimes(), self.checkpoint, Validation(), Samples(), Core()]
        self.saver = Saver(run.mesh.saving, background=run.config.checkpoint.background)
        self.saved_step: int | None = None  # step of the last checkpoint that this job began to write
        self.first_step, self.steps_s = state.step, 0.0
        self.work_s = deque[float](maxlen=RANK_TIMES_WINDOW)
        self.pace = Pace(state.step)
        self.save_cost, self.check_cost = SaveCost(), CheckCost()
        self._graphs = NewGraphs(compiles=run.config.precision.compile)

    def fit(self) -> bool:
        """Trains until the stop step, or until a rank is requested to stop. Returns whether it stopped on request.

        In both cases the state is saved. Raises UserError on all ranks when a save fails, or for a loss or gradient
        that is not finite, as reliability.on_nonfinite says. Whatever this raises, a save that had begun is complete.
        """
        run = self.run
        try:
            return self._fit()
        except Exception:
            self._finish_save_after_error()
            raise
        finally:
            if self.run is not run:  # rewound: the caller closes the loader that it made
                self.run.loader.close()

    def _fit(self) -> bool:
        """The loop: take a step, act on a fault or count the step, run the tasks that are due."""
        pieces = state_pieces(self.run, replicas=False)  # makes the optimizers' state
        stopped = self._run_first_tasks()
        while self.state.step < self.run.plan.stop_step and not stopped:
            first = self.steps_s == 0
            result = self.last_result = self._take_step(first)
            fault = handle_fault(self.run, self.state, result, self.metrics, self.saved_step)
            if fault:
                self._rewind(fault)
                tasks = self._pending_tasks()
            else:
                self._count(result, first)
                tasks = [task for task in self.tasks if task.due(self)]
            if result.requests.save_failed:
                self.saver.wait()  # raises on every rank: a save fails on all ranks or on none
            stopped = self._run_tasks(tasks, result.requests.stop)
            if first:
                self._settle(pieces)
        with self._long_running("saving the checkpoint"):
            self.saver.wait(blocks=True)
        self._log_saves()
        return stopped

    @property
    def at_end(self) -> bool:
        """Whether training is complete (plan.steps). With horizon.stop_step a job ends earlier."""
        return self.state.step == self.run.plan.stop_step == self.run.plan.steps

    def _take_step(self, first: bool) -> StepResult:
        """Runs step state.step, and counts what its checks cost. first: no step of this job is counted yet."""
        step = self.state.step
        if self.saved_step == step:
            self.save_cost.begin(step)
        self.before_step(step)
        self._graphs.count()  # leave out the graphs that evaluation compiled since the last step
        with self._announced_first_step() if first else contextlib.nullcontext():
            requests = Requests(stop=self.stop_requested(), save_failed=self.saver.failed)
            result = train_step(self.run, step, requests=requests, before_update=self.saver.wait_copied)
        self.check_cost.add(result.replay_s, result.hashes_s)
        return result

    def _rewind(self, fault: Fault) -> None:
        """Goes back to an earlier checkpoint, to continue without the rows of the step that was just taken."""
        with self._long_running("going back to a checkpoint"):
            self.saver.wait(blocks=True)
            self._log_saves()
            self.run, self.state = rewind(self.run, self.state, fault, self.metrics)
        self.source, self.pace = None, Pace(self.state.step)
        self.saved_step = None  # the checkpoint does not say what is left out: a stop now has to save

    def _count(self, result: StepResult, first: bool) -> None:
        """Counts the step that was taken, and logs what it shows of compilation and of saving."""
        self._report_new_graphs()
        state = self.state
        if state.step >= UNTIMED_STEPS:  # with the checks: a record's clock excludes evaluation and saving only
            state.training_s += result.seconds + result.replay_s + result.hashes_s
        state.skipped_steps += result.skipped
        if math.isfinite(result.loss):
            state.add_loss(result.loss)
        state.training_flops += self.run.plan.flops_per_step
        state.step += 1
        self.steps_s += result.seconds
        self.work_s.append(result.work_s)
        self.pace.finish(state.step)
        self._measure_save_cost(result)
        if first:
            self.after_first_step()

    def _report_new_graphs(self) -> None:
        made = self._graphs.count()
        if made and self.state.step - self.first_step >= SETTLED_STEPS:
            self.metrics.log(
                f"step {self.state.step:05d} | torch.compile made {made} new graphs, which takes time: "
                "TORCH_LOGS=recompiles shows why"
            )

    def _measure_save_cost(self, result: StepResult) -> None:
        """Compares steps after a save with those before it, and logs the comparison when it is complete."""
        step = self.state.step
        if step - self.first_step > SETTLED_STEPS and self.save_cost.add(result.seconds):
            self.metrics.log(f"step {step - 1:05d} | {self.save_cost.line}")
            self.metrics.record({"step": step} | self.save_cost.values)

    def _settle(self, pieces: RectanglesByName) -> None:
        """Does what later steps and saves need, which may take a second, after the first step is logged. pieces: of the
        state.
        """
        self.saver.reserve(pieces)
        # what the first save needs, but no step: a package may be replaced while training runs
        import megachat.checkpoint.storage  # noqa: F401

        gc.collect()  # objects that exist now live until the end; do not scan them at every collection
        gc.freeze()

    def _run_tasks(self, due: list[Task], stop: bool) -> bool:
        """Runs the due tasks in order; returns whether a stop was requested.

        After a stop request or an error only tasks with runs_on_stop run, so an error on one rank does not prevent the
        checkpoint. The others become pending and are saved with the state. The first error is then raised.
        """
        waiting, errors = [task.name for task in due if not task.runs_on_stop], list[Exception]()
        for task in due:
            if (stop or errors) and not task.runs_on_stop:
                continue
            if task.name in waiting:
                waiting.remove(task.name)
            self.state.pending = list(waiting)
            try:
                completed = self._run(task)
            except Exception as error:
                errors.append(error)
                continue
            if not completed:
                waiting.insert(0, task.name)
                stop = True
        if errors:
            raise errors[0]
        self.state.pending = waiting
        if stop and self.saved_step != self.state.step:
            self._run(self.checkpoint)
        self.metrics.advance(self.state.step)
        self._log_saves()
        return stop

    def _run(self, task: Task) -> bool:
        with self._long_running(task.activity):
            return task.run(self)

    def _run_first_tasks(self) -> bool:
        """Runs the tasks before the first step of this job; returns whether a stop was requested."""
        step, last, tasks = self.state.step, self.run.plan.stop_step, self._first_tasks()
        if step >= last and not tasks:
            self.metrics.log(
                f"nothing to do: step {step} is not before the last step {last}; raise horizon.steps or "
                "horizon.stop_step to continue"
            )
        shown = bool(tasks) and self.run.is_writer
        with announced("evaluation before the first step", shown=shown, write=self.metrics.log):
            return self._run_tasks(tasks, stop=False)

    def _first_tasks(self) -> list[Task]:
        """Returns the tasks before the first step of this job: of a new run the validation, as in nanochat; of a
        resumed one those that its checkpoint lists as pending.
        """
        if self.state.step == 0:
            every = self.run.config.evaluate.every
            return [task for task in self.tasks if isinstance(task, Validation) and every]
        return self._pending_tasks()

    def _pending_tasks(self) -> list[Task]:
        """Returns the tasks that were due at the checkpoint and have no result in its run folder, as rank 0 sees it.

        A result that is part of the state is restored from there.
        """
        folder, state = self.source or self.run.folder, self.state
        pending = [task for task in self.tasks if task.name in state.pending]
        results = all_gather_objects([task.load_result(folder, state.step) for task in pending], self.run.mesh.world)[0]
        for task, result in zip(pending, results, strict=True):
            if result is not None:
                task.restore(state, result)
        return [task for task, result in zip(pending, results, strict=True) if result is None]

    def _long_running(self, activity: str) -> contextlib.AbstractContextManager:
        """Returns a context in which other ranks may wait longer than usual; for "" one that does nothing."""
        return self.run.mesh.world.progress.long_running(activity) if activity else contextlib.nullcontext()

    @contextlib.contextmanager
    def _announced_first_step(self) -> Iterator[None]:
        """Announces the first step, which may compile for minutes; other ranks may wait longer than usual."""
        activity = "first step, with torch.compile" if self.run.config.precision.compile else "first step"
        shown = announced(activity, shown=self.run.is_writer, write=self.metrics.log)
        with self._long_running("first step"), shown:
            yield

    def _finish_save_after_error(self) -> None:
        """Completes the save in progress, to which the other ranks' savers contribute whatever their training does.

        Records no progress: the failure monitor reports the collective that failed.
        """
        try:
            self.saver.wait(blocks=True)
            self._log_saves()
        except Exception as error:  # the first error is raised, this one is logged as well
            self.metrics.log(f"error: {error}")

    def _log_saves(self) -> None:
        for saved in self.saver.finished():
            self.save_cost.finish(saved.blocked_s, saved.total_s)
            self.metrics.log(f"saved {saved.path} (training waited {saved.blocked_s:.2f} s of {saved.total_s:.2f} s)")
            seconds = {"checkpoint/blocked_s": saved.blocked_s, "checkpoint/total_s": saved.total_s}
            # "step" is the current step; the save finished some steps after "checkpoint/step"
            self.metrics.record({"step": self.state.step, "checkpoint/step": checkpoint_step(saved.path)} | seconds)
