"""The measurement against nanochat without a clone of it: its refusals, and how a step is accumulated."""

import itertools
import sys
from argparse import Namespace

import pytest
import torch

from megachat.config import load_config
from megachat.errors import UserError
from megachat.planning.plan import resolve_plan
from tests.runs.forked import run_forked
from tools.bench import nanochat
from tools.bench.nanochat import PartClock, accumulate, open_nanochat, row_counts


def test_no_clone_is_one_sentence(tmp_path):
    line = ["tools/bench.py", "nanochat", "--nanochat", str(tmp_path)]
    done = run_forked(line)
    assert (done.status, done.out) == (2, "")
    (line,) = done.err.splitlines()
    assert line.startswith(f"error: --nanochat {tmp_path} is not a clone") and "nanochat/gpt.py" in line
    with pytest.raises(UserError, match="--nanochat is not given"):
        open_nanochat(None)


def test_what_nanochat_lacks_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "nanochat").mkdir()
    (tmp_path / "nanochat" / "gpt.py").write_text("import a_package_that_nobody_has\n")
    with pytest.raises(UserError, match="cannot be imported .*a_package_that_nobody_has.*: install .* pyproject.toml"):
        open_nanochat(str(tmp_path))


def test_rows_at_a_time_divide_a_step():
    assert row_counts("4 8 32", 32) == [4, 8, 32]
    for wrong in ("", "3", "4 x", "0", "64", "-4"):
        with pytest.raises(UserError, match="must be divisors of the 32 rows of a step"):
            row_counts(wrong, 32)


def test_gradients_do_not_depend_on_rows_at_a_time():
    """A step's gradient is the mean over its rows, and targets are the next tokens."""
    table = torch.randn(7, 7, dtype=torch.float64, requires_grad=True)
    rows = torch.randint(0, 7, (8, 6))

    def gradient(micro_rows: int) -> torch.Tensor:
        table.grad = None
        accumulate(
            lambda ids, targets: torch.nn.functional.cross_entropy(table[ids].mT, targets),
            rows,
            micro_rows,
            torch.device("cpu"),
        )
        return table.grad

    whole = torch.nn.functional.cross_entropy(table[rows[:, :-1]].mT, rows[:, 1:])
    assert torch.equal(gradient(8), torch.autograd.grad(whole, table)[0])
    torch.testing.assert_close(gradient(2), gradient(8), rtol=1e-12, atol=0)


def plan(*settings: str):
    return resolve_plan(load_config("configs/d4_cpu.json", list(settings)), 1, 4096)


def test_steps_have_fewer_tokens_only_where_time_is_short():
    whole = plan()
    fits = [nanochat.tokens_that_fit(whole, seconds, [1e11, 1e11]) for seconds in (1e9, 16, 8, 1e-9)]
    seconds_per_token = 2 * whole.flops_per_token / (0.5 * 1e11)
    assert fits[0] == whole.tokens_per_step == 16384
    assert fits[3] == 4 * 512  # a micro-batch
    for tokens, seconds in zip(fits[1:3], (16, 8), strict=True):
        assert tokens * seconds_per_token <= seconds < 2 * tokens * seconds_per_token


def test_each_moment_of_a_step_belongs_to_the_part_that_was_entered_last():
    clock = PartClock(itertools.count().__next__)
    for text in ("forward", "rows of a step", "backward", "loading a micro-batch", "backward", "optimizer step"):
        clock.note(text)
    clock.enter("forward")
    assert clock.seconds == {"forward": 3, "backward": 2, "optimizer": 1}


class Step:
    """Stands for a side's step: its parts take given seconds of a clock that only steps move."""

    now = 0.0

    def __init__(self, clock: PartClock, **parts: float):
        self.clock, self.parts, self.calls = clock, parts, 0

    def __call__(self) -> None:
        self.calls += 1
        for part, seconds in self.parts.items():
            self.clock.enter(part)
            Step.now += seconds * (9 if self.calls == 1 else 1)  # the first one compiles


def test_the_report_has_parts_ratios_and_the_share_of_the_peak(capsys):
    clock = PartClock(lambda: Step.now)
    steps = {
        "nanochat, 2 rows at a time": Step(clock, forward=1.0, backward=2.0, optimizer=1.0),
        "nanochat, 4 rows at a time": Step(clock, forward=2.0, backward=2.0, optimizer=1.0),
        "megachat, float32, compiled": Step(clock, forward=0.5, backward=1.0, optimizer=0.5),
    }
    peaks = {torch.float32: 1.0}
    parts = nanochat.time_parts(steps, 3, 1e12, clock, peaks)
    assert [step.calls for step in steps.values()] == [4, 4, 4] and peaks[torch.float32] > 1e6
    printed = capsys.readouterr()
    assert printed.out == "" and "round 3 of 3" in printed.err and "s left" in printed.err
    result = nanochat.summarize(parts, plan(), dict.fromkeys(steps, torch.float32), {torch.float32: 1e12}, muon_flops=0)
    assert result["baseline"] == "nanochat, 2 rows at a time"
    fast = result["megachat, float32, compiled"]
    assert fast["ms"] == {"forward": 500, "backward": 1000, "optimizer": 500}
    assert fast["times_faster_than_nanochat, 2 rows at a time"] == 2 and fast["per_sec"] == 16384 / 2
    assert fast["share_of_peak"] == pytest.approx(6 * (4 * 12 * 256**2 + 4096 * 256) * 16384 / 1e12 / 2, abs=2e-3)


def test_rounds_end_with_the_time(capsys):
    clock = PartClock()
    assert len(nanochat.time_parts({"a": lambda: None}, 5, 0.0, clock, {})["a"]) == 1


def test_equal_dtype_comes_first():
    arguments = Namespace(config="configs/d4_cpu.json", set=["precision.compute=bfloat16"])
    both = {"float32, compiled": torch.float32, "float32": torch.float32}
    both |= {"bfloat16, compiled": torch.bfloat16, "bfloat16": torch.bfloat16}
    sides = nanochat.megachat_sides(arguments, torch.float32)
    assert list(sides.items()) == [(f"megachat, {name}", dtype) for name, dtype in both.items()]
    arguments.set = ["precision.compute=float32"]
    assert list(nanochat.megachat_sides(arguments, torch.float32).values()) == [torch.float32] * 2
