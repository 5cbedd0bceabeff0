"""Whole jobs with n-gram tables, a lookup layer, learned scales of norms, z-loss and QK clip: resumed twice in a row,
with other text, evaluated on other layouts.
"""

import pytest

from megachat.planning.dimensions import NORMS
from tests.runs.job import STEPS, bits_per_byte, checkpoint, different, facts, losses, refused, train
from tests.runs.test_evaluate import evaluated

TABLES = {
    "ngram": {"blocks": [0, 1], "rows": 400, "storage": "host", "bos": 256},
    "lookup": {"after_blocks": [0], "sample_tokens": 3000},
    "model": {"norm_scales": list(NORMS)},
    "optimizer": {"z_loss": 1e-3, "qk_clip": 5.78},  # scales of 1 allow logits of 5.76
}


@pytest.fixture(scope="module")
def whole(place):
    return train(place, "tables", world=2, config=TABLES)


def test_a_job_with_tables_in_host_memory_is_evaluated_on_other_layouts(whole, tmp_path):
    for world, settings in ((1, ()), (2, ("--set", "parallel.tensor=2"))):
        result = evaluated(None, world, checkpoint(whole, STEPS), tmp_path / "out.json", "--bpb", *settings)
        assert result["bpb"]["bpb"] == pytest.approx(bits_per_byte(whole)[STEPS], rel=1e-6)


def test_two_resumes_in_a_row_are_bit_equal_and_keep_the_allocation(whole, place):
    """Stops after neighboring steps. The resumed jobs would allocate other rows: the checkpoint's stay."""
    for stop, method in ((3, "lzw"), (4, "uniform"), (None, "frequency")):
        settings = TABLES | {"lookup": TABLES["lookup"] | {"allocation": method}}
        arguments = () if stop == 3 else ("--resume", "auto")
        horizon = {"steps": STEPS, "stop_step": stop}
        run = train(place, "tables_resumed", *arguments, world=2, config=settings | {"horizon": horizon})
    assert losses(run) == losses(whole)
    assert different(checkpoint(run, STEPS), checkpoint(whole, STEPS)) == []
    saved = [facts(checkpoint(each, STEPS))["model"]["lookup"] for each in (run, whole)]
    assert saved[0] == saved[1] and len(saved[0]["rows_per_token"].split()) > 256


def test_other_tables_are_refused_on_resume(whole, place):
    for section, key, value in (("lookup", "rows", 2000), ("lookup", "after_blocks", [1]), ("ngram", "rows", 500)):
        settings = TABLES | {section: TABLES[section] | {key: value}}
        sentence = refused(place, whole.name, "--resume", "auto", config=settings)
        assert "holds another model" in sentence and f"{section}." in sentence
