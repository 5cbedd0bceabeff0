"""A job that trains in FP8 as a user starts it; it goes on without, and what it saved is used on machines that have
none of its kernels.
"""

import json
import shutil

import numpy as np
import pytest

from megachat.checkpoint.facts import read_facts, write_facts
from megachat.config import Config
from megachat.convert.conversion import export_checkpoint
from megachat.planning.plan import Layout, resolve_plan
from megachat.programs.verify_resume import resolve_without_fp8_if_needed, resume_config
from tests.runs.forked import run_forked
from tests.runs.job import STEPS, bits_per_byte, checkpoint, command, losses, train
from tools.generate import main as generate

STOP = 3
MODEL = {"model": {"depth": 2, "aspect_ratio": 128, "head_size": 64, "sequence_len": 64, "window_pattern": "L"}}
FP8 = MODEL | {"precision": {"compute": "bfloat16", "fp8": "tensorwise"}, "parallel": {"tensor": 2, "sequence": True}}
FOREIGN = {"attention": "flash3", "fp8_backend": "te"}


@pytest.fixture(scope="module")
def run_with_output(place):
    """(folder, what it said) of a run that stopped half-way, on two ranks of the tensor axis."""
    done = run_forked(command(place, "fp8", "--set", f"horizon.stop_step={STOP}", config=FP8), 2)
    assert done.status == 0, done.err
    return place.runs / "fp8", done.out


@pytest.fixture(scope="module")
def foreign(run_with_output, place):
    """Its checkpoint, as if a Hopper with flash-attention 3 and Transformer Engine had made it."""
    shutil.copytree(run_with_output[0], place.runs / "foreign")
    saved = checkpoint(place.runs / "foreign", STOP)
    facts = read_facts(saved)
    facts["config"]["precision"] |= FOREIGN
    write_facts(saved, {key: value for key, value in facts.items() if not key.endswith("version")})
    return place.runs / "foreign"


def test_it_says_what_is_in_fp8_and_goes_on_without(run_with_output, place):
    run, said = run_with_output
    assert (
        "fp8 tensorwise by torch (auto: not te, because this machine has no CUDA device; slow: this "
        "CPU has no FP8 units) for attn.c_q, "
    ) in said
    shutil.copytree(run, place.runs / "onward")
    onward = train(place, "onward", "--resume", "auto", config=MODEL | {"precision": {"compute": "bfloat16"}})
    after = losses(onward)
    assert list(after) == list(range(STEPS)) and after | losses(run) == after
    assert np.isfinite(list(after.values())).all() and after[STEPS - 1] < after[0] - 0.1


def test_what_it_saved_is_used_anywhere(run_with_output, foreign, tmp_path, capsys):
    """Evaluated in a dtype without FP8 and on another layout, sampled from, and converted."""
    line = [
        "launch/evaluate.py",
        "--checkpoint",
        foreign,
        "--bpb",
        "--sample",
        "--out",
        tmp_path / "out.json",
        "--set",
        "precision.compute=float32",
    ]
    done = run_forked([*line, "--set", "parallel.tensor=1", "--set", "parallel.sequence=false"])
    assert done.status == 0, done.err
    run, results = run_with_output[0], json.loads((tmp_path / "out.json").read_text())
    assert results["bpb"]["bpb"] == pytest.approx(bits_per_byte(run)[STOP], rel=5e-3) and results["samples"]
    assert "attention sdpa (auto: torch's own; not available: flash3 (it needs a CUDA device))" in done.out
    generate(["--checkpoint", str(foreign), "--prompt", "the old", "--tokens", "3", "--temperature", "0"])
    assert capsys.readouterr().out.startswith("the old")
    export_checkpoint("nanochat", foreign, tmp_path / "nanochat")
    assert (tmp_path / "nanochat" / f"model_{STOP:06d}.pt").is_file()


def test_its_resumption_is_verified_with_the_kernels_that_are_here():
    saved_config = Config.model_validate(MODEL | {"precision": {"compute": "bfloat16", "fp8": "blockwise"} | FOREIGN})
    config, plan = resolve_without_fp8_if_needed(
        resume_config(saved_config, saved_config, 4, vars(Layout(1, 1, 1)), exact=True), 1, 300
    )
    assert (config.precision.attention, config.precision.fp8_backend, config.precision.fp8) == (
        "auto",
        "auto",
        "off",
    )  # 64 tokens, not 128
    tensorwise = saved_config.model_copy(
        update={"precision": saved_config.precision.model_copy(update={"fp8": "tensorwise"})}
    )
    config, again = resolve_without_fp8_if_needed(
        resume_config(tensorwise, tensorwise, 4, vars(Layout(1, 1, 1)), exact=True), 1, 300
    )
    assert config.precision.fp8 == "tensorwise" and again == plan == resolve_plan(config, 1, 300)
