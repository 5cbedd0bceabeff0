"""A whole job with n-gram tables and a lookup layer is evaluated on other layouts."""

import pytest

from tests.runs.job import STEPS, bits_per_byte, checkpoint, train
from tests.runs.test_evaluate import evaluated


def test_a_job_with_tables_in_host_memory_is_evaluated_on_other_layouts(place, tmp_path):
    ngram = {"blocks": [0, 1], "rows": 400, "storage": "host", "bos": 256}
    run = train(
        place, "tables", world=2, config={"ngram": ngram, "lookup": {"after_blocks": [0], "sample_tokens": 3000}}
    )
    for world, settings in ((1, ()), (2, ("--set", "parallel.tensor=2"))):
        result = evaluated(None, world, checkpoint(run, STEPS), tmp_path / "out.json", "--bpb", *settings)
        assert result["bpb"]["bpb"] == pytest.approx(bits_per_byte(run)[STEPS], rel=1e-6)
