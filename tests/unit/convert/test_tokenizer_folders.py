"""Where a checkpoint's tokenizer is searched."""

from pathlib import Path

import pytest

from megachat.convert.megachat import tokenizer_folders

STEP = Path("/home/text/runs/demo/checkpoints/step_000010")


@pytest.mark.parametrize(
    "runs, last",
    [("runs", "/home/text/data/tokenizer"), ("text/runs", "/home/data/tokenizer"), ("models", "data/tokenizer")],
)
def test_a_relative_path_counts_from_where_the_run_was_started(runs, last):
    facts = {"config": {"run": {"folder": runs}}}
    assert tokenizer_folders(STEP, facts)[-1] == Path(last)
    assert Path("data/tokenizer") in tokenizer_folders(STEP, facts), "the current folder comes first"
