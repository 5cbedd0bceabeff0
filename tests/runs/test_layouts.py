"""Tensor and pipeline axes as a user starts them: the losses, evaluations, samples and resumes of one process."""

import json

import pytest

from tests.runs.forked import run_forked
from tests.runs.job import (
    STEPS,
    bits_per_byte,
    checkpoint,
    command,
    facts,
    ledgers,
    losses,
    metrics,
    train,
)

ROWS12 = {"batch": {"tokens": 12 * 64, "micro_rows": 1}}  # 12 rows are shared evenly by 1, 2 and 4 data ranks


def layout(tensor: int, pipeline: int) -> list[str]:
    return ["--set", f"parallel.tensor={tensor}", "--set", f"parallel.pipeline={pipeline}"]


@pytest.fixture(scope="module")
def twelve(place):
    """One process on twelve rows a step."""
    return train(place, "twelve", config=ROWS12)


@pytest.fixture(scope="module")
def grid(place):
    """The same on two tensor ranks times two stages."""
    return train(place, "grid", *layout(2, 2), world=4, config=ROWS12)


def check_like(run, wanted, tolerance):
    """A pipeline alone repeats one process; the tensor axis sums in another order, which a cold start magnifies
    (LOG.md).
    """
    assert losses(run)[0] == pytest.approx(losses(wanted)[0], rel=1e-6)
    assert losses(run) == pytest.approx(losses(wanted), rel=tolerance) and len(losses(run)) == STEPS
    assert bits_per_byte(run) == pytest.approx(bits_per_byte(wanted), rel=tolerance)
    (samples,) = (run / "samples").iterdir()
    assert list(json.loads(samples.read_text())) == ["the old"]
    assert ledgers(checkpoint(run, STEPS)) == ledgers(checkpoint(wanted, STEPS)), "other documents were read"


def test_a_pipeline_repeats_one_process(place, one):
    run = train(place, "stages", *layout(1, 2), world=2)
    check_like(run, one, 1e-6)
    (samples,), (wanted,) = (run / "samples").iterdir(), (one / "samples").iterdir()
    assert samples.read_text() == wanted.read_text()


def test_tensor_and_pipeline_together(grid, twelve):
    check_like(grid, twelve, 5e-3)
    assert json.loads((grid / "plan.json").read_text())["layout"] == {"data": 1, "tensor": 2, "pipeline": 2}
    counts = [{line["train/muon_matrices"] for line in metrics(run) if "train/loss" in line} for run in (grid, twelve)]
    assert counts[0] == counts[1] and len(counts[0]) == 1, "of the whole model, not of rank 0"


def test_eight_ranks_on_three_axes_in_float16(place):
    half = {"precision": {"compute": "float16", "loss_scale": 256.0}, "optimizer": {"clip_norm": 0.5}}
    run = train(place, "eight", *layout(2, 2), world=8, config=ROWS12 | half)
    wanted = train(place, "eight_alone", config=ROWS12 | half)
    assert losses(run) == pytest.approx(losses(wanted), rel=2e-2)
    assert facts(checkpoint(run, STEPS))["loss_scaler"] == facts(checkpoint(wanted, STEPS))["loss_scaler"] != {}


def test_a_run_goes_on_where_another_layout_stopped(place, grid):
    """tp2 x pp2 for two steps, then four data ranks for two, then one process."""
    first = train(place, "moves", *layout(2, 2), "--set", "horizon.stop_step=2", world=4, config=ROWS12)
    assert losses(first) == {step: loss for step, loss in losses(grid).items() if step < 2}
    train(place, "moves", "--resume", "auto", "--set", "horizon.stop_step=4", world=4, config=ROWS12)
    run = train(place, "moves", "--resume", "auto", config=ROWS12)
    assert losses(run) == pytest.approx(losses(grid), rel=5e-3)
    assert losses(run)[2] == pytest.approx(losses(grid)[2], rel=1e-6), (
        "the first step after the move starts from the same weights and rows"
    )
    assert ledgers(checkpoint(run, STEPS)) == ledgers(checkpoint(grid, STEPS))


@pytest.mark.parametrize(
    ("world", "arguments", "message"),
    [
        (
            3,
            layout(2, 1),
            "parallel.tensor 2 x parallel.pipeline 1 does not divide the 3 ranks that were started: start 2 or 4 ranks",
        ),
        (
            3,
            layout(3, 1),
            "parallel.tensor is 3, which does not divide the model's 2 query heads: "
            "set parallel.tensor to 1, or to 2 on a multiple of 2 ranks",
        ),
        (
            3,
            layout(1, 3),
            "parallel.pipeline is 3, more stages than the model's 2 blocks: set parallel.pipeline to 2 or less",
        ),
    ],
)
def test_a_layout_that_does_not_fit_is_refused_before_anything_starts(place, world, arguments, message):
    done = run_forked(command(place, "misfit", *arguments), world)
    assert done.status != 0 and not (place.runs / "misfit").exists()
    assert [error for error in done.errors if message in error] and "Traceback" not in done.out
