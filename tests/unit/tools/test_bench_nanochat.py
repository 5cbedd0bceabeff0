"""The measurement against nanochat without a clone of it: its refusals, and how a step is accumulated."""

import sys

import pytest
import torch

from megachat.errors import UserError
from tests.runs.forked import run_forked
from tools.bench.nanochat import accumulate, open_nanochat, row_counts


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
