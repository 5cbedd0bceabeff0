"""tools/bench.py's training steps and attention: what they compare is what they say, and bytes are counted."""

import json

import pytest

from tests.runs.forked import run_forked

SMALL = (
    "model.depth=4",
    "model.aspect_ratio=16",
    "model.head_size=16",
    "batch.tokens=2048",
    "batch.micro_rows=8",
)  # activations prevail


def measured(kind: str, *words: str) -> dict:
    line = [
        "tools/bench.py",
        kind,
        "--config",
        "configs/d2_cpu.json",
        "--vocab-size",
        "300",
        "--rounds",
        "1",
        *words,
    ]
    done = run_forked(line)
    assert done.status == 0, done.err
    return json.loads(done.out)


@pytest.mark.slow
def test_recompute_has_fewer_bytes_at_every_level():
    result = measured("recompute", *(word for setting in SMALL for word in ("--set", setting)))
    assert result["rows_at_a_time"] == 8 and result["where"]["torch"]
    none, selective, block = (result[kind]["bytes_in_a_step"] for kind in ("none", "selective", "block"))
    assert none > selective > block > 0
    assert all(result[kind]["per_sec"] > 0 and result[kind]["rounds"] == 1 for kind in ("none", "selective", "block"))


@pytest.mark.slow
def test_attention_is_compared_for_each_shape():
    shapes = measured("attention")["found"]
    assert len(shapes) == 8
    for ways in shapes.values():
        assert ways["mask"]["times_faster_than_mask"] == 1 and ways["windowed"]["per_sec"] > 0


@pytest.mark.slow
def test_the_checks_are_measured_in_steps_of_their_round():
    result = measured("checks", *(word for setting in SMALL for word in ("--set", setting)))
    for check in ("replay", "hashes"):
        steps = result["steps"][check]
        assert 0 < steps["from"] == steps["median"] == steps["to"]  # one round
        assert steps["median"] == pytest.approx(result["seconds"][check] / result["seconds"]["step"])


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("dtype", "--rounds", "0"), "--rounds 0: dtype takes 1 or more"),
        (("lookup", "--rounds", "-1"), "--rounds -1: lookup takes 0 or more"),
        (("nanochat", "--vocab-size", "100000000000"), "--vocab-size 100000000000: give 2 to 1,048,576 tokens"),
        (("nanochat", "--minutes", "0"), "--minutes 0: give more than 0"),
    ],
)
def test_numbers_that_measure_nothing_are_refused(words, sentence):
    done = run_forked(["tools/bench.py", *words])
    assert (done.status, done.out, done.err) == (2, "", f"error: {sentence}\n")
