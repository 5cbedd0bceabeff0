"""Real text, a real config: the loss curves of tensor and pipeline layouts beside one process's, by the tool that users
have.
"""

import json

import pytest

from tests.reference import FOLDER, needs_reference
from tests.runs.forked import run_forked
from tools.train_tokenizer import main as train_tokenizer

ENGLISH = FOLDER.parents[1] / "data" / "english"


@needs_reference
@pytest.mark.skipif(
    not ENGLISH.is_dir(), reason="../shared/data/english is absent: it comes with the developers' checkout"
)
def test_thirty_steps_of_english_lie_within_two_thousandths_of_one_process(tmp_path):
    train_tokenizer(["--import-nanochat", str(FOLDER / "tokenizer"), "--out", str(tmp_path / "tokenizer")])
    # the config as it is but for a sixteenth of its batch; docs/benchmarks.md has the table of all layouts, which takes
    # five times as long
    line = [
        "tools/bench.py",
        "layouts",
        "--data",
        str(ENGLISH),
        "--tokenizer",
        str(tmp_path / "tokenizer"),
    ]
    line += ["--layouts", "dp=2,tp=2,pp=2", "--set", "batch.tokens=1024", "--set", "batch.micro_rows=1"]
    line += ["--set", "evaluate.tokens=4096", "--set", "evaluate.prompts=[]"]
    done = run_forked(line)
    assert done.status == 0, done.err
    curves = json.loads(done.out)["found"]
    assert len(curves) == 2 and curves["dp=1"]["last_loss"] < 5.8
    for layout, curve in curves.items():
        assert curve["largest_difference"] < 2e-3, f"{layout}: {curve}"
