"""The same config under every launcher: equal losses, and what a run folder holds."""

import fcntl
import json
import math
import os
import shutil
import socket

import pytest

from megachat.data.tokenizer import load_tokenizer
from tests.limits import limit_s
from tests.runs.forked import run_forked
from tests.runs.job import (
    STEPS,
    begin,
    bits_per_byte,
    checkpoints,
    command,
    launched,
    losses,
    metrics,
    train,
    unread,
    until,
)

HYDRA = shutil.which("mpiexec.hydra")
LAUNCHERS = ["torchrun", "deepspeed", "mpirun"]
LAUNCHERS += [pytest.param("mpiexec", marks=pytest.mark.skipif(HYDRA is None, reason="no mpiexec.hydra of MPICH here"))]


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_the_launchers_agree_bit_for_bit(launcher, two, place):
    """Every launcher starts the job that forked ranks are."""
    run = train(place, f"two_{launcher}", launcher=launcher, world=2)
    assert len(losses(two)) == STEPS and len(bits_per_byte(two)) == 3
    assert losses(run) == losses(two) and bits_per_byte(run) == bits_per_byte(two), (
        f"{launcher} differs from ranks without a launcher"
    )
    variables = json.loads((run / "environment.json").read_text())[0]["launch"]
    assert (variables["rank"], variables["world_size"], variables["local_size"], variables["launcher"]) == (
        0,
        2,
        2,
        launcher,
    )


def test_two_ranks_have_the_losses_of_one_process(one, two):
    alone, together = losses(one), losses(two)
    assert [together[step] for step in range(STEPS)] == pytest.approx([alone[step] for step in range(STEPS)], rel=1e-5)
    assert bits_per_byte(two) == pytest.approx(bits_per_byte(one), rel=1e-5)
    assert alone[STEPS - 1] < alone[0] - 1, "nothing was learnt, so equal losses would say little"


def test_three_ranks_have_the_losses_of_one_process(one, place):
    three = train(place, "three", world=3)
    alone, together = losses(one), losses(three)
    assert together[0] == pytest.approx(alone[0], rel=1e-6)
    # means over three ranks round otherwise, and orthogonalizing the nearly singular first gradients magnifies that
    assert [together[step] for step in range(STEPS)] == pytest.approx([alone[step] for step in range(STEPS)], rel=5e-3)


def test_a_run_folder_tells_everything(one, place):
    files = sorted(path.name for path in one.iterdir())
    assert files == ["checkpoints", "config.json", "environment.json", "lock", "metrics.jsonl", "plan.json", "samples"]
    assert checkpoints(one) == ["step_000002", "step_000004", "step_000006"]
    plan = json.loads((one / "plan.json").read_text())
    assert (plan["steps"], plan["tokens_per_step"], plan["layout"]) == (
        STEPS,
        384,
        {"data": 1, "tensor": 1, "pipeline": 1},
    )
    environment, *_ = json.loads((one / "environment.json").read_text())  # one entry per start of the run
    assert (
        environment["compute_dtype"] == "torch.float32"
        and environment["packages"]["torch"]
        and "--config" in environment["command"]
    )
    (samples,) = (one / "samples").iterdir()
    ((prompt, text),) = json.loads(samples.read_text()).items()
    assert samples.name == f"step_{STEPS:06d}.json" and prompt == "the old" and text.startswith(prompt)
    assert len(load_tokenizer(place.tokenizer).encode(text)) == len(prompt) + 4


def test_metrics_have_the_dashboard_keys(one):
    lines = [line for line in metrics(one) if "train/loss" in line]
    assert [line["step"] for line in lines] == list(range(STEPS))
    for line in lines:
        assert {
            "train/loss",
            "train/lrm",
            "train/dt",
            "train/tok_per_sec",
            "train/epoch",
            "total_training_time",
            "total_training_flops",
            "time",
        } <= line.keys()
        assert 0 <= line["data/cropped_share"] < 1
        assert "train/mfu" not in line, "the peak of a CPU is not known"
        assert (
            line["train/dt"] > 0
            and line["train/epoch"] == 1
            and math.isfinite(line["train/grad_norm"])
            and not line["train/skipped"]
        )
        assert line["train/muon_matrices"] == 13
    assert [line["train/lrm"] for line in lines[:3]] == [0.5, 1.0, 1.0]
    flops = [line["total_training_flops"] for line in metrics(one) if "total_training_flops" in line]
    assert flops[0] == 0 and flops == sorted(flops)
    saved = [line for line in metrics(one) if "checkpoint/total_s" in line]
    assert [line["checkpoint/step"] for line in saved] == [2, 4, STEPS]
    assert all(0 <= line["checkpoint/blocked_s"] <= line["checkpoint/total_s"] for line in saved)
    evaluated = [line for line in metrics(one) if "val/bpb" in line]
    smooth, raw = losses(one, "train/loss"), losses(one)
    assert smooth[0] == pytest.approx(raw[0], rel=1e-12)
    assert smooth[2] == pytest.approx((0.81 * raw[0] + 0.9 * raw[1] + raw[2]) / 2.71, rel=1e-12)
    assert [line["step"] for line in evaluated] == [0, 3, STEPS] and all(
        {"total_training_time", "total_training_flops"} <= line.keys() for line in evaluated
    )
    assert evaluated[2]["val/bpb"] < evaluated[1]["val/bpb"] < evaluated[0]["val/bpb"]
    assert evaluated[2]["total_training_flops"] == pytest.approx(
        STEPS * 384 * json.loads((one / "plan.json").read_text())["flops_per_token"]
    )


def test_the_saved_config_runs_again_under_plain_python_without_a_console(one, place):
    arguments = ["--config", str(one / "config.json"), "--set", "run.folder=" + str(place.runs / "again")]
    program = [command(place, "unused")[0], *arguments, "--set", 'evaluate.prompts=["caf\u00e9"]']
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    os.write(writer, b"." * 3072)  # it prints twice as much as there is room now, and waits
    job = begin(launched("python", 1, program), {"PYTHONIOENCODING": "ascii"}, stdout=writer)
    os.close(writer)
    until(lambda: job.poll() is not None or unread(reader) > 3072, "output")
    os.close(reader)  # as `| head -1` does
    assert job.wait(limit_s()) == 0, job.stderr.read()
    lost = "stdout takes no more output (Broken pipe)"
    assert job.stderr.read() == f"note: {lost}: continuing without it\n"
    again = place.runs / "again" / "one"
    assert losses(again) == losses(one) and bits_per_byte(again) == bits_per_byte(one)
    assert [line["console"] for line in metrics(again) if "console" in line] == [lost]
    assert "caf\u00e9" in (again / "samples" / f"step_{STEPS:06d}.json").read_text(encoding="utf-8")


def test_ranks_started_with_other_settings_are_refused(place):
    """As on two hosts with other copies of the config: rank 1 gets another seed."""
    done = run_forked(command(place, "unlike"), 2, extra={1: ["--set", "run.seed=1"]})
    assert done.status != 0
    host = socket.gethostname()
    message = (
        f"rank 1 on {host} has another config than rank 0 on {host} (run.seed): start all ranks "
        f"with the same --config and --set"
    )
    assert done.errors == [f"error: {message}"]
    assert not (place.runs / "unlike").exists()
