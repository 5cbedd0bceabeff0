"""The summary at the end of a job, of a run that an earlier job began."""

import json
from types import SimpleNamespace

import pytest

from megachat.config import Config
from megachat.errors import start_by
from megachat.settings import ReliabilityConfig
from megachat.train import summary
from megachat.train.check_cost import CheckCost, describe_device_checks
from megachat.train.save_cost import SaveCost
from megachat.train.state import LoopState
from megachat.train.summary import likely_causes, log_end, next_commands, read_history, summary_rows

LINES = [
    {"step": 0, "train/mfu": 1.0, "train/dt": 90.0, "train/peak_memory_bytes": 5_000_000_000},
    {"step": 4, "val/bpb": 3.5},
    {"step": 11, "train/mfu": 30.0, "train/dt": 1.0, "train/peak_memory_bytes": 4_000_000_000},
    {"step": 12, "train/mfu": 36.0, "train/dt": 2.0},
    {"step": 13, "val/bpb": 1.25, "core_metric": None},
    {"step": 13, "core_metric": 0.125},
    {"step": 16, "val/bpb": 1.5},
]


@pytest.fixture
def trainer(tmp_path):
    text = "".join(json.dumps(line) + "\n" for line in LINES)
    (tmp_path / "metrics.jsonl").write_bytes(b"\xff\n[]\n" + text.encode() + b'{"step": 17, "val/b')
    plan = SimpleNamespace(
        flops_per_token=10,
        tokens_per_step=500,
        micro_rows=2,
        bubble=0.3,
        steps=16,
        dims=SimpleNamespace(sequence_len=1024),
        layout=SimpleNamespace(pipeline=2, tensor=2),
    )
    mesh = SimpleNamespace(data=SimpleNamespace(size=2), world=SimpleNamespace(size=8))
    kernels = SimpleNamespace(attention=SimpleNamespace(name="sdpa", warning="reads hidden blocks"))
    loader = SimpleNamespace(cropped_share=0.125)
    config = Config()
    run = SimpleNamespace(folder=tmp_path, plan=plan, mesh=mesh, kernels=kernels, loader=loader, config=config)
    state = LoopState(step=16, training_s=3600.0, training_flops=16 * 5000, skipped_steps=1)
    cost = SaveCost()
    times = {"first_step": 12, "steps_s": 8.0, "save_cost": cost, "check_cost": CheckCost()}
    return SimpleNamespace(run=run, state=state, **times)


def test_the_whole_run_beside_this_job(trainer):
    rows = dict(summary_rows(trainer, 4.0, 20.0))
    assert rows["validation bpb"] == "3.5000 at step 4 to 1.5000 at step 16 (best 1.2500)"
    assert rows["CORE"] == "0.1250" and rows["MFU"] == "34.0 % mean of the logged steps"
    assert rows["tokens"] == "8,000 in 16 steps (4 of them in this job); 250 per second"
    assert rows["time"] == "0:00:20: start-up 0:00:04, steps 0:00:08, rest evaluation, saving and checks"
    assert rows["whole run"] == "1:00:00 in steps after the first 11, earlier jobs included"
    assert rows["peak memory"] == "5.00 GB on rank 0" and rows["skipped"].startswith("1 step")
    assert rows["cropped"] == "12.5% of the tokens that rank 0 has read"


def test_what_saving_cost_the_steps(trainer):
    assert "saving" not in dict(summary_rows(trainer, 4.0, 20.0))
    trainer.save_cost.finish(0.25, 5.0)
    assert dict(summary_rows(trainer, 4.0, 20.0))["saving"] == "1 save; training waited 0.25 s, 5.0% of their 5.00 s"


def test_what_the_checks_did_and_cost(trainer):
    assert (
        "checks" not in dict(summary_rows(trainer, 4.0, 20.0)) and describe_device_checks(ReliabilityConfig()) is None
    )
    for replay_s, hashes_s in ((1.5, 0.0), (0.0, 0.5), (0.0, 0.25), (0.0, 0.0)):
        trainer.check_cost.add(replay_s, hashes_s)
    expected = "1 replay and 2 hash comparisons: all passed; 2.2 s"
    assert dict(summary_rows(trainer, 4.0, 20.0))["checks"] == expected
    line = describe_device_checks(ReliabilityConfig(replay_every=50, hash_every=1))
    assert line == "checks of the devices: a micro-batch is replayed every 50 steps, hashes are compared every 1 step"


def test_a_low_mfu_has_likely_causes(trainer):
    texts = [text for label, text in summary_rows(trainer, 4.0, 20.0) if not label]
    for words in ("2,048 tokens", "bubble is 30%", "tensor axis of 2", "hidden blocks", "megachat bench profile"):
        assert any(words in text for text in texts), words
    trainer.run.plan.micro_rows, trainer.run.plan.layout = 16, SimpleNamespace(pipeline=1, tensor=1)
    trainer.run.kernels.attention.warning = None
    config = Config.model_validate({"precision": {"compile": True}})
    (cause,) = likely_causes(config, trainer.run.plan, trainer.run.kernels)
    assert "waits for other ranks" in cause
    path = trainer.run.folder / "metrics.jsonl"
    path.write_text(json.dumps({"step": 11, "train/mfu": 41.0, "train/dt": 1.0}) + "\n")
    rows = summary_rows(trainer, 4.0, 20.0)
    assert "below 40" not in str(rows) and "bench profile" not in str(rows) and "validation bpb" not in dict(rows)


def test_a_run_without_metrics_has_a_summary(trainer):
    (trainer.run.folder / "metrics.jsonl").unlink()
    assert read_history(trainer.run.folder).bpb == []
    trainer.first_step, trainer.steps_s = 0, 0.0
    rows = dict(summary_rows(trainer, 4.0, 20.0))
    assert rows["tokens"] == "8,000 in 16 steps" and "MFU" not in rows and "whole run" not in rows


@pytest.mark.parametrize(
    "world, local, launcher, begin",
    [
        (1, 1, "python", "megachat pretrain --config"),
        (8, 8, "deepspeed", "deepspeed --num_accelerators 8 --module megachat pretrain --config"),
        (8, 8, "torchrun", "torchrun --nproc-per-node 8 -m megachat pretrain --config"),
        (8, 4, "torchrun", "the command that started the job"),
        (8, 8, "srun", "the command that started the job"),
    ],
)
def test_a_stopped_run_is_continued_by_the_first_command(world, local, launcher, begin, trainer, monkeypatch):
    monkeypatch.setattr(summary.shutil, "which", lambda name: "/bin/megachat")
    trainer.run.mesh.world.size = world
    commands = next_commands(trainer, launcher, local, stopped=True)
    assert commands[0].startswith(begin) and commands[0].endswith("--resume auto") and len(commands) == 3
    finished = next_commands(trainer, launcher, local, stopped=False)
    assert [command.split()[1] for command in finished] == ["generate", "evaluate", "inspect"]
    lines = []
    trainer.metrics = SimpleNamespace(log=lines.append, close_bar=lambda: None)
    log_end(trainer, summary_rows(trainer, 4.0, 20.0), commands, stopped=True)
    assert lines[0].startswith("stopped after step 16, ") and lines[1].startswith("  validation bpb  3.5")
    assert lines[-4:] == ["next:", *(f"  {command}" for command in commands)]


def test_a_run_of_the_speedrun_is_continued_by_it(trainer, monkeypatch):
    monkeypatch.setattr("megachat.errors._how_to_resume", "")
    start_by("speedrun")
    again, lines = "the same `megachat speedrun` command", []
    assert next_commands(trainer, "deepspeed", 8, stopped=True)[0] == again
    trainer.metrics = SimpleNamespace(log=lines.append, close_bar=lambda: None)
    log_end(trainer, [], [], stopped=True)
    assert lines[0] == f"stopped after step 16, which is saved: continue with {again}"


def test_a_run_that_reached_stop_step_is_continued_without_it(trainer):
    trainer.run.mesh.world.size, trainer.run.plan.steps = 1, 60
    commands = next_commands(trainer, "python", 1, stopped=False)
    assert commands[0].endswith("config.json --set horizon.stop_step=null --resume auto")
    lines = []
    trainer.metrics = SimpleNamespace(log=lines.append, close_bar=lambda: None)
    log_end(trainer, [], commands, stopped=False)
    assert lines[0].startswith("stopped at horizon.stop_step, after step 16 of 60")
