"""The order of a step's periodic work, and what an error in it does not prevent."""

import dataclasses
import json
from types import SimpleNamespace

import pytest

from megachat.errors import UserError
from megachat.parallel.mesh import Axis
from megachat.settings import EvaluateConfig
from megachat.train.state import LoopState
from megachat.train.tasks import Checkpoint, Core, LogStep, Samples, Task, Validation, deviations_above
from megachat.train.trainer import Trainer


class Recorded(Task):
    """Records that it ran, and the tasks that were pending then; raises or interrupts if it has to."""

    def __init__(self, name, seen, *, runs_on_stop=False, error=None):
        self.name, self.seen, self.runs_on_stop, self.error = name, seen, runs_on_stop, error

    def run(self, trainer):
        self.seen.append((self.name, list(trainer.state.pending)))
        if self.error:
            raise self.error
        return True


class FakeSaver:
    def __init__(self, error=None):
        self.error, self.waits = error, 0

    def wait(self, *, blocks=False):
        self.waits += 1
        if self.error:
            raise self.error

    def finished(self):
        return []


def trainer(tmp_path, saver=None, **state):
    made = Trainer.__new__(Trainer)
    mesh = SimpleNamespace(world=Axis("world", 1, 0, None, (0,)))
    made.run, made.state, made.source = SimpleNamespace(folder=tmp_path, mesh=mesh), LoopState(**state), None
    made.saver, made.saved_step, made.lines = saver or FakeSaver(), None, []
    made.metrics = SimpleNamespace(log=made.lines.append, advance=lambda step: None)
    made.checkpoint = Checkpoint()
    made.tasks = (LogStep(), made.checkpoint, Validation(), Samples(), Core())
    return made


def due(seen, **errors):
    kinds = {"log": True, "checkpoint": True, "validation": False, "core": False}
    return [Recorded(name, seen, runs_on_stop=stop, error=errors.get(name)) for name, stop in kinds.items()]


def test_the_checkpoint_lists_what_follows_it(tmp_path):
    seen = []
    assert trainer(tmp_path)._run_tasks(due(seen), stop=False) is False
    assert seen[1] == ("checkpoint", ["validation", "core"]) and [name for name, _ in seen[2:]] == [
        "validation",
        "core",
    ]
    assert seen[3][1] == []


def test_an_error_before_the_checkpoint_does_not_prevent_it(tmp_path):
    seen, full = [], OSError(28, "No space left on device")
    with pytest.raises(OSError) as raised:
        trainer(tmp_path)._run_tasks(due(seen, log=full), stop=False)
    assert raised.value is full and [name for name, _ in seen] == ["log", "checkpoint"]


@pytest.mark.parametrize("save_error", [None, UserError("disk full")])
def test_an_error_waits_for_the_save_in_progress(tmp_path, save_error):
    made, bad = trainer(tmp_path, FakeSaver(save_error)), RuntimeError("a bad text")

    def fail():
        raise bad

    made._fit = fail
    with pytest.raises(RuntimeError) as raised:
        made.fit()
    assert raised.value is bad and made.saver.waits == 1
    assert made.lines == (["error: disk full"] if save_error else [])


def test_a_validation_in_the_metrics_is_not_made_again(tmp_path):
    lines = [{"step": 4, "val/bpb": 2.0}, {"step": 6, "train/loss": 1.0}, {"step": 6, "val/bpb": 1.5}]
    text = "\n".join(map(json.dumps, lines)).encode()
    (tmp_path / "metrics.jsonl").write_bytes(b'\xff "val/bpb"\n' + text + b'\n{"step": 6, "val/bp')
    made = trainer(tmp_path, step=6, pending=["validation", "samples"], val_bpb=2.0, min_val_bpb=1.75)
    assert [task.name for task in made._pending_tasks()] == ["samples"]
    assert (made.state.val_bpb, made.state.min_val_bpb) == (1.5, 1.5)
    other = trainer(tmp_path, step=5, pending=["validation"])
    assert [task.name for task in other._pending_tasks()] == ["validation"] and other.state.val_bpb is None


def test_samples_are_due_every_so_many_steps_and_at_the_end():
    def due_steps(**settings):
        config = SimpleNamespace(evaluate=EvaluateConfig(**settings))
        at = [
            SimpleNamespace(run=SimpleNamespace(config=config), state=SimpleNamespace(step=step), at_end=step == 7)
            for step in range(1, 8)
        ]
        return [trainer.state.step for trainer in at if Samples().due(trainer)]

    assert due_steps() == [7] and due_steps(sample_every=3) == [3, 6, 7] and due_steps(sample_every=3, prompts=()) == []


def test_a_spike_is_far_above_the_median_and_earlier_spikes_do_not_hide_it():
    quiet = [3.0 + 0.01 * (step % 5) for step in range(60)]
    assert deviations_above(3.05, quiet, 6) is None and deviations_above(2.0, quiet, 6) is None
    assert deviations_above(9.0, quiet, 6) == pytest.approx((9.0 - 3.02) / (1.4826 * 0.01))
    assert deviations_above(9.0, [*quiet, 50.0, 50.0, 50.0], 6) == pytest.approx(deviations_above(9.0, quiet, 6))
    assert deviations_above(9.0, quiet[:19], 6) is None and deviations_above(9.0, [3.0] * 64, 6) is None


@pytest.mark.parametrize(("step", "every", "names"), [(0, 3, ["validation"]), (0, 0, []), (6, 3, ["core"])])
def test_a_new_run_is_validated_before_its_first_step_and_a_resumed_one_is_not(step, every, names, tmp_path):
    made = trainer(tmp_path, step=step, pending=["core"])
    made.run.config = SimpleNamespace(evaluate=EvaluateConfig(every=every))
    assert [task.name for task in made._first_tasks()] == names


def test_the_average_of_the_losses_is_nanochats_and_survives_a_checkpoint():
    whole, resumed, smooth = LoopState(), LoopState(), 0.0
    for step, loss in enumerate((5.0, 4.0, 4.5, 3.0, 3.25)):
        smooth = 0.9 * smooth + (1 - 0.9) * loss
        for state in (whole, resumed):
            state.add_loss(loss)
        assert whole.shown_loss == resumed.shown_loss == smooth / (1 - 0.9 ** (step + 1))
        resumed = LoopState.from_saved(json.loads(json.dumps(dataclasses.asdict(resumed))))
    earlier = LoopState.from_saved({"step": 4, "training_s": 0.0, "skipped_steps": 0, "val_bpb": None})
    earlier.add_loss(2.5)
    assert earlier.shown_loss == pytest.approx(2.5, rel=1e-12)
