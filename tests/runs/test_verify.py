"""tools/verify.py as a user runs it."""

import json
import subprocess
import sys

from tests.runs.job import ROOT, environment

SMALL = ["--set", "model.sequence_len=64", "--set", "model.vocab_size=300", "--set", "model.head_size=32"]


def verify(*arguments):
    line = [sys.executable, "tools/verify.py", "--config", "configs/d4_cpu.json", *SMALL, *map(str, arguments)]
    return subprocess.run(line, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=400)


def test_two_layouts_are_equal_and_certified(tmp_path):
    done = verify("--depth", 2, "--layout", "tp=2,pp=2,dp=2", "--layout", "tp=2", "--rows", 2, "--out", tmp_path / "certificate.json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("  equal") == 2 and "8 ranks against one process" in done.stdout and "tolerance 1e-05" in done.stdout
    told = json.loads((tmp_path / "certificate.json").read_text())
    assert told["passed"] and [entry["layout"] for entry in told["layouts"]] == [
        {"data": 2, "tensor": 2, "pipeline": 2}, {"data": 1, "tensor": 2, "pipeline": 1},
    ]  # fmt: skip
    assert len(told["layouts"][0]["compared"]) == 2 + 2 * 21 and told["environment"]["packages"]["torch"]


def test_what_cannot_be_laid_out_is_refused_before_anything_starts(tmp_path):
    out = tmp_path / "certificate.json"
    done = verify("--layout", "tp=3", "--out", out)
    assert done.returncode == 2 and not out.exists()
    assert done.stderr == "error: parallel.tensor is 3, which does not divide the model's 8 query heads: set parallel.tensor to 2\n"
